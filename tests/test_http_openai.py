"""The unmodified `openai` client creates, polls, lists, downloads, extends and deletes."""
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


def test_a_video_stopped_by_its_time_is_canceled(service):
    http = client(service)
    job = service.jobs.submit("generate", {"prompt": PROMPT}, model="shapes-t2v", cancel_after=0.01)
    time.sleep(0.05)
    service.jobs.expire()
    assert service.jobs.get(job.id).error["code"] == "cancel_after"
    error = http.get(f"/v1/videos/{job.id}").json()["error"]
    assert error["code"] == "canceled" and "Cancel-After" in error["message"]


def test_only_clips_are_videos(service):
    http = client(service)
    job = service.jobs.submit("noop", {})
    claim = take(service)
    claim.publish([], {})
    path = f"/v1/videos/{job.id}"
    said = [http.get(path), http.get(f"{path}/content"), http.post(f"{path}/remix", json={"prompt": PROMPT}), http.post("/v1/videos/extensions", json={"prompt": PROMPT, "seconds": "1", "video": {"id": job.id}}), http.delete(path)]
    assert [s.status_code for s in said] == [404] * 5 and all("no video" in s.json()["error"]["message"] for s in said)
    assert http.get("/v1/videos").json()["data"] == [] and http.get(f"/v1/jobs/{job.id}").status_code == 200


def test_sync_and_remix(service):
    http = client(service)
    worker(service)
    film = http.post("/v1/videos/sync", json={"prompt": PROMPT, "seed": 3})
    assert film.content == b"the film" and film.headers["content-type"] == "video/mp4"
    first = service.jobs.list()[0]
    assert first.result["seed"] == 7 and first.spec["seed"] == 3  # a worker by hand; a real one says the seed it used
    remix = http.post(f"/v1/videos/{first.id}/remix", json={"prompt": "a blue star moving up on a white background"}).json()
    assert remix["remixed_from_video_id"] == first.id and service.jobs.get(remix["id"]).spec["seed"] == 7


def film(folder):
    "A real film of 17 frames, as bytes."
    from vidgen.clip import Clip
    from vidgen.world import render, scene

    return Clip(render(scene(7, shape="circle", colour="red", motion="right", background="white")).frames, 8.0).save(folder / "given.mp4").read_bytes()


def test_a_clip_goes_on_where_it_ends(service, tmp_path):
    "The client extends; a real model makes what follows, and the worker joins the two."
    import numpy as np

    from vidgen.clip import Clip
    from vidgen.serve.generate import loader
    from vidgen.serve.pool import Pool
    from vidgen.serve.worker import Settings, Worker

    with served(service) as address:
        api = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        first = api.videos.create(prompt=PROMPT, extra_body={"num_inference_steps": 3})
        finish(service, film(tmp_path))
        more = api.videos.extend(prompt=PROMPT, seconds="1", video=("any.mp4", api.videos.download_content(first.id).read()))
        assert (more.status, more.seconds, more.size, more.model) == ("queued", "3.125", "96x64", "shapes-i2v")
        asked = service.jobs.get(more.id).spec
        assert (asked["num_frames"], asked["num_inference_steps"], asked["fps"], asked["extends"]["frames"]) == (9, 3, 8.0, 17)
        api.videos.delete(first.id)  # what follows has its own copy
        assert Worker(service.jobs, Settings(str(service.jobs.db.url), str(service.jobs.root), name="here"), Pool(loader("cpu"))).once()
        done = api.videos.retrieve(more.id)
        assert (done.status, done.seconds) == ("completed", "3.125")
        (tmp_path / "more.mp4").write_bytes(api.videos.download_content(more.id).read())
    given, made = Clip.open(tmp_path / "given.mp4").frames.astype(int), Clip.open(tmp_path / "more.mp4").frames.astype(int)
    assert len(made) == 25 and np.abs(made[:17] - given).mean() < 3  # the film as it was, but for packing it twice
    assert np.abs(made[17] - given[16]).mean() < 25 < np.abs(255 - made[17]).max()


def test_what_no_model_can_is_refused_in_words(service, tmp_path):
    key, _ = service.keys.create("ada")
    other, _ = service.keys.create("eve")
    with served(service) as address:
        api = openai.OpenAI(base_url=f"{address}/v1", api_key=key)
        video = api.videos.create(prompt=PROMPT)
        finish(service, film(tmp_path))
        data = api.videos.download_content(video.id).read()
        with pytest.raises(openai.BadRequestError, match="remix") as err:
            api.videos.edit(prompt="a blue circle", video=data)
        assert err.value.code == "unsupported" and err.value.param == "video"
        for who, given in ((api, data + b"x"), (api.with_options(api_key=other), data)):
            with pytest.raises(openai.BadRequestError, match="completed video of yours"):
                who.videos.extend(prompt=PROMPT, seconds="1", video=given)
        with pytest.raises(openai.UnprocessableEntityError, match="makes at most 48: 6 s"):
            api.videos.extend(prompt=PROMPT, seconds="8", video=data)


def test_a_video_is_named_by_its_id_in_json_and_in_a_form(service, tmp_path):
    http = client(service)
    video = http.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    asked = {"prompt": PROMPT, "seconds": "1", "video": {"id": video}}
    early = http.post("/v1/videos/extensions", json=asked)
    assert early.status_code == 409 and early.json()["error"]["code"] == "not_ready" and early.headers["x-should-retry"] == "false"
    finish(service, film(tmp_path))
    send = {"json": http.post("/v1/videos/extensions", json=asked | {"seed": 5}, headers={"Idempotency-Key": "k"}),
            "again": http.post("/v1/videos/extensions", json=asked | {"seed": 5}, headers={"Idempotency-Key": "k"}),
            "form": http.post("/v1/videos/extensions", data={"prompt": PROMPT, "seconds": "1", "video[id]": video}, files={"nothing": ("", b"")})}
    assert [a.status_code for a in send.values()] == [200] * 3 and send["json"].json()["id"] == send["again"].json()["id"] and service.jobs.get(send["json"].json()["id"]).spec["seed"] == 5
    for wrong, status in (({"video": {"id": "job_none"}}, 404), ({"video": {}}, 404), ({"video": video}, 422), ({"seed": -1}, 422), ({"seconds": 1}, 422), ({"fps": 9}, 422)):
        answer = http.post("/v1/videos/extensions", json=asked | wrong)
        assert answer.status_code == status and set(answer.json()) == {"error"}, answer.text


def test_a_clip_grows_only_as_far_as_the_service_makes_clips(opened, tmp_path):
    service = opened(serve_megapixels=0.15)  # 24 frames of 96 x 64
    http = client(service)
    video = http.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    finish(service, film(tmp_path))
    ask = lambda seconds: http.post("/v1/videos/extensions", json={"prompt": PROMPT, "seconds": seconds, "video": {"id": video}})  # noqa: E731
    assert ask("1").json()["error"]["code"] == "too_much" and ask("0.875").status_code == 200


def test_pictures_of_a_film(service, tmp_path):
    from PIL import Image

    http = client(service)
    video = http.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    finish(service, film(tmp_path))
    url = f"/v1/videos/{video}/content"
    answers = {variant: http.get(url, params={"variant": variant}) for variant in ("thumbnail", "spritesheet")}
    assert {a.headers["content-type"] for a in answers.values()} == {"image/png"}
    small, sheet = (Image.open(io.BytesIO(a.content)) for a in answers.values())
    assert small.size == (96, 64) and sheet.size[0] > 4 * 96 and small.getpixel((2, 2))[2] > 200
    tag = answers["thumbnail"].headers["etag"]
    assert http.get(url, params={"variant": "thumbnail"}, headers={"If-None-Match": tag}).status_code == 304 and http.get(url).headers["etag"] != tag
    broken = http.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    finish(service, b"no film")
    assert [http.get(f"/v1/videos/{broken}/content", params={"variant": v}).status_code for v in ("thumbnail", "spritesheet", "video", "poster")] == [404, 404, 200, 422]


def test_an_unknown_word_is_refused_with_the_nearest(service):
    http = client(service)
    for body, says in (({"guidance": 3}, "guidance_scale"), ({"num_inferencesteps": 3}, "num_inference_steps"), ({"lora": '{"name": "a", "scales": 1}'}, "scale"), ({"lora": '{"path": "/etc"}'}, "path"),
                       ({"lora": '{"name": "a", "scale": 9}'}, "-4 to 4"), ({"lora": "nobody"}, "unknown adapter")):
        said = http.post("/v1/videos", json={"prompt": PROMPT, **body})
        assert said.status_code == 422 and says in said.json()["error"]["message"] and said.json()["error"]["param"] == next(iter(body)), said.text


def test_a_request_that_is_repeated_with_its_picture_is_the_same_job(service):
    http = client(service)
    send = lambda prompt, key: http.post("/v1/videos", data={"prompt": prompt}, files={"input_reference": picture()}, headers={"Idempotency-Key": key})  # noqa: E731
    first, again = send(PROMPT, "k1").json(), send(PROMPT, "k1").json()
    assert first["id"] == again["id"] and send("another", "k1").status_code == 409 and send(PROMPT, "k2").json()["id"] != first["id"]
