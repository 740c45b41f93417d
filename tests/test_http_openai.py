"""The unmodified `openai` client creates, polls, lists, downloads and deletes."""
import io
import threading
import time

import pytest
from serving import PROMPT, client, finish, served, take

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


def worker(service, count=1):
    def work():
        until, left = time.monotonic() + 30, count
        while left and time.monotonic() < until:
            if service.jobs.counts()["states"]["queued"]:
                finish(service, b"the film")
                left -= 1
            time.sleep(0.05)
    threading.Thread(target=work, daemon=True).start()


def picture():
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (96, 64), "red").save(out, "PNG")
    return out.getvalue()


def test_the_client_creates_polls_lists_downloads_deletes(service):
    key, _ = service.keys.create("ada")
    with served(service) as address:
        api = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
        worker(service)
        video = api.videos.create_and_poll(prompt=PROMPT, model="shapes-t2v", seconds="2", size="96x64", poll_interval_ms=50)
        assert (video.status, video.progress, video.object, video.seconds, video.size) == ("completed", 100, "video", "2.125", "96x64") and video.completed_at >= video.created_at
        spec = service.jobs.get(video.id).spec
        assert (spec["num_frames"], spec["trim"], spec["width"], spec["height"]) == (16, True, 96, 64)
        assert api.videos.download_content(video.id).read() == b"the film"
        more = [api.videos.create(prompt=f"{PROMPT} {i}") for i in range(3)]
        assert [v.id for v in api.videos.list(limit=2)] == [v.id for v in reversed(more)] + [video.id]  # over two pages
        assert [v.id for v in api.videos.list(order="asc", limit=10).data] == [video.id] + [v.id for v in more]
        assert api.videos.delete(video.id).deleted and api.videos.list().data[-1].id != video.id
        with pytest.raises(openai.NotFoundError):
            api.videos.retrieve(video.id)


def test_the_client_is_refused_in_words_it_understands(service):
    key, _ = service.keys.create("ada")
    with served(service) as address:
        api = openai.OpenAI(base_url=f"{address}/v1", api_key=key)
        with pytest.raises(openai.UnprocessableEntityError, match="nearest: 9 or 17"):
            api.videos.create(prompt=PROMPT, extra_body={"num_frames": 16})
        with pytest.raises(openai.UnprocessableEntityError, match="unknown model"):
            api.videos.create(prompt=PROMPT, model="sora-2")
        waiting, start = api.videos.create(prompt=PROMPT), time.monotonic()
        with pytest.raises(openai.ConflictError, match="queued"):
            api.videos.download_content(waiting.id)
        assert time.monotonic() - start < 5 and len(service.jobs.list()) == 1  # x-should-retry: false
        with pytest.raises(openai.AuthenticationError):
            api.with_options(api_key="vg_wrong").videos.list()


def test_a_picture_as_file_upload_and_data_address(service):
    import base64

    with served(service) as address:
        api = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        by_file = api.videos.create(prompt=PROMPT, input_reference=("evil/../name.png", picture(), "image/png"))
        kept = client(service).post("/v1/uploads", files={"image": picture()}).json()["id"]
        for given in ({"image_url": "data:image/png;base64," + base64.b64encode(picture()).decode()}, {"file_id": kept}):
            by_object = api.post("/videos", body={"prompt": PROMPT, "input_reference": given}, cast_to=type(by_file))
            in_a_form = client(service).post("/v1/videos", data={"prompt": PROMPT} | {f"input_reference[{k}]": v for k, v in given.items()}).json()
            for video in (by_file.id, by_object.id, in_a_form["id"]):
                job = service.jobs.get(video)
                assert job.model == "shapes-i2v" and service.jobs.kept(job.spec["image"]).mime == "image/png"
        for wrong in ("https://pictures.example/a.png", "http://169.254.169.254/latest", "data:image/png;base64,%%%"):
            with pytest.raises(openai.UnprocessableEntityError):
                api.post("/videos", body={"prompt": PROMPT, "input_reference": {"image_url": wrong}}, cast_to=type(by_file))


def test_json_works_too_and_other_servers_names(service):
    http = client(service)
    (service.jobs.root / "adapters/my-brand").mkdir(parents=True)
    (service.jobs.root / "adapters/my-brand/pytorch_lora_weights.safetensors").write_bytes(b"")
    said = http.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 9, "fps": 4, "lora": '{"name": "my-brand", "scale": 0.5}', "negative_prompt": "", "guidance_scale": 2})
    assert said.status_code == 200 and said.json()["seconds"] == "2.25"
    assert {k: v for k, v in service.jobs.list()[0].spec.items() if k.startswith("adapter")} == {"adapter": "my-brand", "adapter_scale": 0.5}
    wrong = http.post("/v1/videos", json={"prompt": PROMPT, "flow_shift": 3})
    assert wrong.status_code == 422 and set(wrong.json()) == {"error"} and wrong.json()["error"]["param"] == "flow_shift"


def test_states_read_as_theirs_and_polling_has_a_pace(service):
    http = client(service)
    queued = http.post("/v1/videos", json={"prompt": PROMPT}).json()
    asked = http.get(f"/v1/videos/{queued['id']}")
    assert queued["status"] == "queued" and asked.headers["openai-poll-after-ms"] == "500"
    claim = take(service)
    claim.event("progress", {"progress": 33})
    running = http.get(f"/v1/videos/{queued['id']}").json()
    assert (running["status"], running["progress"]) == ("in_progress", 33) and http.delete(f"/v1/videos/{queued['id']}").status_code == 409
    service.jobs.cancel(queued["id"])
    claim.canceled()
    ended = http.get(f"/v1/videos/{queued['id']}")
    assert ended.json()["status"] == "failed" and ended.json()["error"]["code"] == "canceled" and "openai-poll-after-ms" not in ended.headers


def test_sync_and_remix(service):
    http = client(service)
    worker(service)
    film = http.post("/v1/videos/sync", json={"prompt": PROMPT, "seed": 3})
    assert film.content == b"the film" and film.headers["content-type"] == "video/mp4"
    first = service.jobs.list()[0]
    remix = http.post(f"/v1/videos/{first.id}/remix", json={"prompt": "a blue star moving up on a white background"}).json()
    assert remix["remixed_from_video_id"] == first.id and service.jobs.get(remix["id"]).spec["seed"] == 3
