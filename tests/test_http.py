"""The HTTP side's contracts: routes, fields, status words and shapes, on the real tables and files."""
import io
import json
import threading
import time
import zipfile

import httpx
import pytest
from PIL import Image
from serving import PROMPT, client, finish, served, take

from vidgen.serve.auth import Caller


@pytest.fixture
def http(service):
    return client(service)


def ask(http, **more):
    answer = http.post("/v1/jobs", json={"spec": {"prompt": PROMPT, **more}})
    assert answer.status_code == 202, answer.text
    return answer.json()


# the own API

def test_a_job_from_the_request_to_the_file(http, service):
    job = ask(http, seed=7)
    assert job["state"] == "queued" and job["spec"] == {"prompt": PROMPT, "seed": 7, "model": "shapes-t2v"}
    finish(service, b"0123456789")
    job = http.get(job["links"]["self"]).json()
    assert job["state"] == "succeeded" and job["progress"] == 100 and job["result"]["frames"] == 17
    assert http.get(job["links"]["video"]).content == b"0123456789"
    files = http.get(job["links"]["artifacts"]).json()
    assert [(f["name"], f["bytes"], f["mime"]) for f in files] == [("video.mp4", 10, "video/mp4")] and "path" not in files[0]


def test_ranges_and_etags(http, service):
    job = ask(http)
    finish(service, b"0123456789")
    url = f"/v1/jobs/{job['id']}/artifacts/video.mp4"
    part = http.get(url, headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
    whole = http.get(url)
    assert whole.headers["accept-ranges"] == "bytes" and http.get(url, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
    assert http.get(url, params={"download": True}).headers["content-disposition"].startswith("attachment")


def test_what_a_range_can_not_be(http, service):
    "Another unit than bytes is not understood and so ignored; what is wrong or beyond the end is a problem like any other."
    job = ask(http)
    finish(service, b"0123456789")
    url = f"/v1/jobs/{job['id']}/artifacts/video.mp4"
    for unit in ("items=0-5", "lines=1", "nonsense"):
        assert (whole := http.get(url, headers={"Range": unit})).status_code == 200 and whole.content == b"0123456789"
    for said, status in (("bytes=20-", 416), ("bytes=x-y,", 400), ("bytes=5-2", 400)):
        wrong = http.get(url, headers={"Range": said})
        assert (wrong.status_code, wrong.headers["content-type"], wrong.json()["code"]) == (status, "application/problem+json", "bad_range")
        assert wrong.headers.get("content-range") == ("bytes */10" if status == 416 else None)
    tag = http.get(url).headers["etag"]
    assert [http.get(url, headers={"If-None-Match": asked}).status_code for asked in ("*", f'"other", W/{tag}', '"other"')] == [304, 304, 200]


def test_head_is_answered_wherever_get_is(http, service):
    job = ask(http)
    finish(service, bytes(200_000))
    job = http.get(job["links"]["self"]).json()
    for path in ("/", "/docs", "/openapi.json", "/health/live", "/metrics", "/static/app.js", f"/video/{job['id']}", f"/v1/jobs/{job['id']}", job["links"]["video"], "/v1/jobs", "/v1/jobs/none"):
        whole, head = http.get(path), http.head(path)
        same = ("content-type", "etag", "accept-ranges", "content-disposition", *(("content-length",) if path not in ("/metrics", "/v1/jobs/none") else ()))
        assert head.status_code == whole.status_code and head.content == b"" and [head.headers.get(n) for n in same] == [whole.headers.get(n) for n in same], path
    assert http.head("/generate").status_code == 405 and all("head" not in methods for methods in http.get("/openapi.json").json()["paths"].values())
    with served(service) as address:
        asked = httpx.Client(base_url=address)
        assert asked.head(job["links"]["video"]).headers["content-length"] == "200000"
        assert asked.head(job["links"]["video"], headers={"Range": "bytes=0-9"}).headers["content-length"] == "10"
        running = ask(http)
        assert asked.head(running["links"]["events"], headers={"Accept": "text/event-stream"}, timeout=5).status_code == 200  # and doesn't stay
        assert asked.get("/health/live").status_code == 200  # on the same connection


def test_media_types_are_the_same_in_capitals(http):
    said = http.post("/generate-video", content=json.dumps({"prompt": PROMPT}), headers={"Content-Type": "Application/JSON; Charset=UTF-8", "Prefer": "respond-async"})
    job = http.get(f"/v1/jobs/{said.json()['job_id']}").json()
    assert said.status_code == 202 and "score" not in job["spec"] and "mode" not in job["spec"]  # as for a form


def test_one_key_is_one_job(http):
    send = lambda prompt: http.post("/v1/jobs", json={"spec": {"prompt": prompt}}, headers={"Idempotency-Key": "k1"})  # noqa: E731
    first, again, other = send(PROMPT), send(PROMPT), send("another prompt")
    assert first.json()["id"] == again.json()["id"] and again.json()["repeated"] and other.status_code == 409 and other.json()["code"] == "conflict"


@pytest.mark.parametrize("change", [{"priority": 9}, {"expires_in": 5}, {"headers": {"Cancel-After": "60"}}, {"spec": {"prompt": PROMPT, "seed": 1}}])
def test_a_key_stands_for_the_whole_request(http, change):
    head = {"Idempotency-Key": "k1"}
    send = lambda headers=(), **more: http.post("/v1/jobs", json={"spec": {"prompt": PROMPT}} | more, headers=head | dict(headers))
    assert send().status_code == send().status_code == 202
    assert (send(**change).status_code, send(**change).json()["code"]) == (409, "conflict") and send().json()["repeated"]


def test_what_was_accepted_is_answered_again_whatever_is_refused_by_now(opened, monkeypatch):
    from vidgen.serve import storage
    from vidgen.serve.records import Unavailable

    service = opened(serve_queued=3, serve_device_seconds_per_day=1)
    http, picture = client(service), io.BytesIO()
    Image.new("RGB", (96, 64)).save(picture, "PNG")
    up = http.post("/v1/uploads", files={"image": ("a.png", picture.getvalue())}).json()["id"]
    one = lambda key, **spec: http.post("/v1/jobs", json={"spec": {"prompt": PROMPT, **spec}}, headers={"Idempotency-Key": key})
    many = lambda: http.post("/v1/batches", json={"specs": [{"prompt": PROMPT}] * 2}, headers={"Idempotency-Key": "b"})
    first, batch = one("q0", image=up).json(), many().json()
    same = lambda: (one("q0", image=up).json().get("id"), many().json().get("id")) == (first["id"], batch["id"])
    assert one("new").status_code == 503 and same(), "the queue is full"
    finish(service)
    with service.jobs.writing() as ledger:
        ledger.run(ledger.t.job.update().where(ledger.t.job.c.state == "succeeded").values(started_at=ledger.now - 9))
        ledger.run(ledger.t.artifact.update().where(ledger.t.artifact.c.id == up).values(removed_at=ledger.now))
    assert one("new").status_code == 429 and one("new", image=up).status_code == 422 and same(), "the share is spent, and the picture gone"
    with service.jobs.writing() as ledger:
        ledger.run(ledger.t.job.update().where(ledger.t.job.c.state == "succeeded").values(started_at=ledger.now))
    monkeypatch.setattr(storage, "refuse_full", lambda jobs: (_ for _ in ()).throw(Unavailable("full", "storage_full")))
    assert one("new").status_code == 507 and same(), "the disk is full"


def test_a_key_of_a_batch_is_the_whole_batch(http):
    send = lambda count, **more: http.post("/v1/batches", json={"specs": [{"prompt": PROMPT, "seed": i} for i in range(count)], **more}, headers={"Idempotency-Key": "b1"})
    made, again = send(3), send(3)
    assert made.status_code == again.status_code == 202 and again.json()["id"] == made.json()["id"] and len(again.json()["jobs"]) == 3
    assert [send(2).status_code, send(4).status_code, send(3, priority=1).status_code] == [409] * 3 and "'b1'" in send(2).json()["detail"]
    for key in ("b1", "b1/0"):
        alone = http.post("/v1/jobs", json={"spec": {"prompt": PROMPT, "seed": 0}}, headers={"Idempotency-Key": key})
        assert alone.status_code == 202 and alone.json()["batch"] is None and not alone.json()["repeated"]
    assert len(http.get(f"/v1/batches/{made.json()['id']}").json()["jobs"]) == 3
    for job in made.json()["jobs"]:
        assert len(send(3).json()["jobs"]) == 3
        http.post(job["links"]["cancel"])
        http.post(f"/v1/jobs/{job['id']}/retry")
    assert send(3).status_code == 409 and "asked for again since" in send(3).json()["detail"]


@pytest.mark.parametrize(("path", "body"), [("/v1/batches", {"specs": [{"prompt": PROMPT}, {"prompt": PROMPT, "num_frames": 3}, {"prompt": PROMPT}]}), ("/api/video/batch_inference", {"prompts": [PROMPT, " ", PROMPT]})])
def test_a_clip_of_a_batch_that_can_not_be_made_is_named(http, service, path, body):
    said = http.post(path, json=body)
    assert said.status_code == 422 and said.json()["detail"].startswith("job 2 of 3 (index 1): ") and said.json()["index"] == 1 and service.jobs.list() == []


def test_cancel_retry_delete(http, service):
    job = ask(http)
    assert http.delete(f"/v1/jobs/{job['id']}").status_code == 409
    assert http.post(job["links"]["cancel"]).json()["state"] == "canceled"
    again = http.post(f"/v1/jobs/{job['id']}/retry")
    assert again.status_code == 202 and again.json()["id"] != job["id"] and again.json()["spec"] == job["spec"]
    assert http.delete(f"/v1/jobs/{job['id']}").status_code == 204 and http.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_a_running_job_is_asked_to_stop_and_says_when_it_has(http, service):
    job = ask(http)
    claim = take(service)
    said = http.post(job["links"]["cancel"]).json()
    assert said["state"] == "running" and said["cancel_requested"]
    claim.canceled()
    assert http.get(job["links"]["self"]).json()["state"] == "canceled"


def test_pages_of_jobs_are_cut_by_id_and_filtered(http, service):
    made = [ask(http, seed=i)["id"] for i in range(5)]
    http.post(f"/v1/jobs/{made[0]}/cancel")
    first = http.get("/v1/jobs", params={"limit": 2}).json()
    rest = http.get("/v1/jobs", params={"limit": 3, "cursor": first["next"]}).json()
    assert [j["id"] for j in first["data"] + rest["data"]] == made[::-1] and rest["next"] is None
    assert [j["id"] for j in http.get("/v1/jobs", params={"state": "canceled"}).json()["data"]] == made[:1]
    assert http.get("/v1/jobs", params={"state": "done"}).status_code == 422


def test_prefer_wait_waits_for_the_end(http, service):
    import threading

    def worked():
        time.sleep(0.3)
        while not service.jobs.list(state="queued"):
            time.sleep(0.05)
        finish(service)

    threading.Thread(target=worked).start()
    start = time.monotonic()
    done = http.post("/v1/jobs", json={"spec": {"prompt": PROMPT}}, headers={"Prefer": "wait=10"}).json()
    assert done["state"] == "succeeded" and 0.2 < time.monotonic() - start
    assert http.post("/v1/jobs", json={"spec": {"prompt": PROMPT}}, headers={"Prefer": "wait=0"}).json()["state"] == "queued"


def test_cancel_after_stops_a_job_and_has_bounds(http, service):
    ask = lambda after: http.post("/v1/jobs", json={"spec": {"prompt": PROMPT}}, headers={"Cancel-After": after})  # noqa: E731
    job = ask("60").json()
    assert job["cancel_at"] == pytest.approx(job["created_at"] + 60) and http.post("/v1/jobs", json={"spec": {"prompt": PROMPT}}).json()["cancel_at"] is None
    for wrong in ("4", "86401", "1m", "-5", "nan", "inf", "1e9", "60.5"):
        refused = ask(wrong)
        assert refused.status_code == 422 and "cancel-after" in refused.json()["detail"].lower(), (wrong, refused.text)
    assert ask("5").status_code == ask("86400").status_code == 202
    with service.jobs.writing() as ledger:
        ledger.run(ledger.t.job.update().where(ledger.t.job.c.id == job["id"]).values(cancel_at=1.0))
    service.jobs.expire()
    now = http.get(job["links"]["self"]).json()
    assert now["state"] == "canceled" and now["error"]["code"] == "cancel_after"


def test_a_batch_is_accepted_whole_or_not_at_all(http, service):
    bad = http.post("/v1/batches", json={"specs": [{"prompt": PROMPT}, {"prompt": PROMPT, "num_frames": 16}]})
    assert bad.status_code == 422 and http.get("/v1/jobs").json()["data"] == []
    assert http.post("/v1/batches", json={"specs": [{"prompt": PROMPT}] * 9}).status_code == 422
    made = http.post("/v1/batches", json={"specs": [{"prompt": PROMPT, "seed": i} for i in range(3)]}).json()
    assert made["states"] == {"queued": 3} and [service.jobs.get(j["id"]).place for j in made["jobs"]] == [0, 1, 2]
    finish(service)
    found = http.get(f"/v1/batches/{made['id']}").json()
    assert found["states"] == {"queued": 2, "succeeded": 1} and [j["id"] for j in found["jobs"]] == [j["id"] for j in made["jobs"]]
    packed = zipfile.ZipFile(io.BytesIO(http.get(f"/v1/batches/{made['id']}/zip").content))
    assert packed.testzip() is None and len(packed.namelist()) == 2 and [r["state"] for r in json.loads(packed.read("manifest.json"))] == ["succeeded", "queued", "queued"]
    assert packed.namelist() == [json.loads(packed.read("manifest.json"))[0]["file"], "manifest.json"] == [named(made["jobs"][0]["id"]), "manifest.json"]


def named(job_id):
    "What the film of a clip of PROMPT is called."
    return f"{PROMPT.replace(' ', '-')}-{job_id[-6:]}.mp4"


def test_every_way_to_a_film_names_it_by_its_prompt(http, service):
    job = ask(http)
    finish(service)
    says = lambda path: http.get(path).headers["content-disposition"]
    assert says(f"/v1/jobs/{job['id']}/artifacts/video.mp4?download=true") == f'attachment; filename="{named(job["id"])}"'
    for path in ("/v1/jobs/{}/artifacts/video.mp4", "/v1/videos/{}/content", "/video/{}", "/artifacts/{}.mp4", "/api/videos/{}", "/static/videos/{}/video.mp4"):
        assert says(path.format(job["id"])) == f'inline; filename="{named(job["id"])}"', path
    assert http.get(http.get(job["links"]["self"]).json()["links"]["download"]).headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "a\r\nSet-Cookie: x=1", 'quoted "; filename=evil.exe', "con", "\u202egpj.exe", "𝒳" * 300, "日本語" * 900, "é" * 60, "?!", "a" * 4000])
def test_no_prompt_makes_a_file_name_unsafe(http, service, prompt):
    import re
    from urllib.parse import unquote

    job = http.post("/v1/jobs", json={"spec": {"prompt": prompt}}).json()
    finish(service)
    said = http.get(f"/v1/jobs/{job['id']}/artifacts/video.mp4?download=true").headers["content-disposition"]
    name = unquote(re.fullmatch(r"attachment; filename(?:\*=utf-8''|=\")([^\";]+)\"?", said)[1])
    assert re.fullmatch(rf"[\w-]+-{job['id'][-6:]}\.mp4", name) and len(name.encode()) <= 255, name


def test_a_batch_that_the_queue_has_no_room_for_leaves_nothing(opened):
    service = opened(serve_queued_per_key=2)
    http = client(service)
    refused = http.post("/v1/batches", json={"specs": [{"prompt": PROMPT, "seed": i} for i in range(3)]})
    assert refused.status_code == 429 and refused.headers["retry-after"]
    assert service.jobs.list() == []


def test_a_refused_batch_is_accepted_under_the_same_key_later(opened):
    service = opened(serve_queued_per_key=2)
    http = client(service)
    first = ask(http)
    send = lambda: http.post("/v1/batches", json={"specs": [{"prompt": PROMPT, "seed": i} for i in range(2)]}, headers={"Idempotency-Key": "mine"})
    assert send().status_code == 429
    http.post(first["links"]["cancel"])
    made, again = send().json(), send().json()
    assert made["states"] == {"queued": 2}
    assert again["id"] == made["id"] and [j["id"] for j in again["jobs"]] == [j["id"] for j in made["jobs"]] and all(j["repeated"] for j in again["jobs"])
    assert len(http.get(f"/v1/batches/{made['id']}").json()["jobs"]) == 2


def test_a_batch_of_which_the_middle_breaks_leaves_nothing(http, service, monkeypatch):
    from vidgen.serve import requests

    whole, seen = requests.submit, []

    def breaks(*args, **how):
        seen.append(1)
        if len(seen) == 3:
            raise SystemExit  # the process is gone
        return whole(*args, **how)

    monkeypatch.setattr(requests, "submit", breaks)
    with pytest.raises(SystemExit):
        service.accept_all(Caller("", ""), [{"prompt": PROMPT, "seed": i} for i in range(4)], key="mine")
    assert len(seen) == 3 and service.jobs.list() == []


def test_what_is_asked_again_takes_its_place_in_the_batch(http, service):
    made = http.post("/v1/batches", json={"specs": [{"prompt": PROMPT, "seed": i} for i in range(8)]}).json()
    http.post(made["jobs"][3]["links"]["cancel"])
    again = http.post(f"/v1/jobs/{made['jobs'][3]['id']}/retry").json()
    found = http.get(f"/v1/batches/{made['id']}").json()
    assert [j["id"] for j in found["jobs"]] == [again["id"] if n == 3 else j["id"] for n, j in enumerate(made["jobs"])] and found["states"] == {"queued": 8}
    twice = http.post(f"/v1/jobs/{made['jobs'][3]['id']}/retry").json()
    assert twice["batch"] is None and again["batch"] == made["id"] and http.get(f"/v1/jobs/{made['jobs'][3]['id']}").json()["batch"] is None
    total = http.get(f"/api/video/batch_status/{made['id']}").json()
    assert (total["total"], total["pending"], total["failed"]) == (8, 8, 0)


def test_an_upload_whose_time_is_over_is_refused_and_not_accepted_to_fail(http, service):
    image = io.BytesIO()
    Image.new("RGB", (64, 64)).save(image, "PNG")
    kept = http.post("/v1/uploads", files={"image": image.getvalue()}).json()
    send = lambda: http.post("/v1/jobs", json={"spec": {"prompt": PROMPT, "model": "shapes-i2v", "image": kept["id"]}})
    assert send().status_code == 202
    service.jobs.clock = lambda: kept["expires_at"] + 1
    service.jobs.sweep()
    assert send().status_code == 422 and send().json()["code"] == "unknown_image"


def test_models_say_what_they_can_do(http):
    found = http.get("/v1/models").json()
    by = {m["id"]: m for m in found["data"]}
    assert found["default"] == "shapes-t2v" and by["shapes-t2v"]["ready"] and 17 in by["shapes-t2v"]["frames"] and by["cogvideox-5b"]["num_frames"] == 49


def test_events_as_a_page(http, service):
    job = ask(http)
    finish(service)
    rows = http.get(job["links"]["events"]).json()["data"]
    assert [r["seq"] for r in rows] == list(range(1, len(rows) + 1)) and rows[0]["type"] == "queued" and rows[-1]["type"] == "succeeded"
    assert [r["seq"] for r in http.get(job["links"]["events"], params={"after": 2}).json()["data"]] == [r["seq"] for r in rows if r["seq"] > 2]


def test_a_number_no_event_will_ever_have_is_merely_the_end(http, service):
    job = ask(http)
    finish(service)
    for far in (2**31 - 1, 2**31, 2**53):
        assert http.get(job["links"]["events"], params={"after": far}).json() == {"data": []}
        for head in ({"Last-Event-ID": str(far)}, {"Last-Event-ID": str(far * 2**40)}):
            assert http.get(job["links"]["events"], headers={"Accept": "text/event-stream"} | head).status_code in (204, 422)


SENT = ("/v1/jobs/{}/artifacts/video.mp4", "/video/{}", "/artifacts/{}.mp4", "/api/videos/{}", "/static/videos/{}/video.mp4", "/v1/videos/{}/content")


@pytest.mark.parametrize("when", ["before it is looked at", "before it is opened"])
def test_a_file_that_is_deleted_after_the_check_is_gone_and_no_error(http, service, monkeypatch, when):
    from pathlib import Path

    from starlette.responses import FileResponse

    act = "__call__" if when == "before it is looked at" else "set_stat_headers"
    whole = getattr(FileResponse, act)

    def late(answer, *args):
        Path(answer.path).unlink(missing_ok=True)
        return whole(answer, *args)
    for path in SENT:
        for head in ({}, {"Range": "bytes=2-4"}, {"Range": "bytes=0-1,4-5"}):
            job = ask(http)["id"]
            finish(service, b"0123456789")
            with monkeypatch.context() as patch:
                patch.setattr(FileResponse, act, late)
                said = http.get(path.format(job), headers=head)
            code = said.json()["error"]["code"] if path.startswith("/v1/videos") else said.json()["code"]
            assert (said.status_code, code) == (410, "gone") and "etag" not in said.headers, (path, head, said.text)


def test_a_clip_whose_film_is_deleted_meanwhile_is_not_continued(http, service, monkeypatch):
    from vidgen.serve import openai

    job, film = ask(http)["id"], openai._film
    finish(service)

    def late(*args):
        found = film(*args)
        found.path.unlink()
        return found
    monkeypatch.setattr(openai, "_film", late)
    said = http.post("/v1/videos/extensions", json={"prompt": PROMPT, "seconds": "1", "video": {"id": job}})
    assert said.status_code == 410 and said.json()["error"]["code"] == "gone"


def test_a_zip_says_which_films_it_holds_though_some_are_deleted_meanwhile(http, service):
    from vidgen.serve import bundle

    made = http.post("/v1/batches", json={"specs": [{"prompt": PROMPT, "seed": i} for i in range(3)]}).json()
    for _ in range(3):
        finish(service)
    jobs = service.jobs.list(batch=made["id"])
    service.jobs.artifacts(jobs[0].id)[0].path.unlink()
    pieces = bundle.zipped(bundle.members(service.jobs, jobs))
    begun = next(pieces)
    for job in jobs[1:]:
        service.jobs.delete(job.id)
    packed = zipfile.ZipFile(io.BytesIO(begun + b"".join(pieces)))
    rows = json.loads(packed.read("manifest.json"))
    assert packed.testzip() is None and [(r["error"] or {}).get("code") for r in rows] == ["gone", None, "not_found"]
    assert packed.namelist() == [rows[1]["file"], "manifest.json"] and rows[2]["file"] is None


# S1

def test_generate_status_video(http, service):
    asked = http.post("/generate", json={"prompt": PROMPT, "num_frames": 9, "seed": 7, "fps": 4, "guidance_scale": 3})
    assert asked.status_code == 200 and set(asked.json()) == {"job_id", "status"} and asked.json()["status"] == "processing"
    job = asked.json()["job_id"]
    assert http.get(f"/status/{job}").json() == {"job_id": job, "status": "pending", "progress": 0.0}
    early = http.get(f"/video/{job}")
    assert early.status_code == 409 and "not finished" in early.json()["detail"]
    claim = take(service)
    claim.event("progress", {"stage": "denoise", "progress": 40})
    assert http.get(f"/status/{job}").json() == {"job_id": job, "status": "processing", "progress": 40.0}
    (claim.staging / "video.mp4").write_bytes(b"0123456789")
    claim.publish([claim.staging / "video.mp4"], {"video": "video.mp4"})
    assert http.get(f"/status/{job}").json()["status"] == "completed"
    film = http.get(f"/video/{job}", headers={"Range": "bytes=0-3"})
    assert film.status_code == 206 and film.content == b"0123" and film.headers["content-type"] == "video/mp4"
    for path in ("/status/job_none", "/video/job_none"):
        assert http.get(path).status_code == 404
    service.jobs.artifacts(job)[0].path.unlink()
    assert http.get(f"/video/{job}").status_code == 410


@pytest.mark.parametrize(("end", "says"), [("canceled", "canceled"), ("expired", "longer"), ("failed", "no memory")])
def test_other_ends_read_as_failed_with_the_reason(http, service, end, says):
    job = http.post("/generate", json={"prompt": PROMPT}).json()["job_id"]
    if end == "canceled":
        service.jobs.cancel(job)
    elif end == "failed":
        take(service).fail({"code": "out_of_memory", "message": "no memory"}, retry=False)
    else:
        with service.jobs.writing() as ledger:
            ledger.run(ledger.t.job.update().values(expires_at=1.0))
        service.jobs.expire()
    said = http.get(f"/status/{job}").json()
    assert said["status"] == "failed" and says in said["error"]
    assert http.get(f"/api/video/status/{job}").json()["status"] == ("expired" if end == "expired" else "failed")
    assert http.get(f"/v1/videos/{job}").json()["status"] == "failed"


def test_health_is_one_flat_object(http, service):
    found = http.get("/health").json()
    assert {"status", "model", "device", "cpu_usage", "memory_usage", "gpu_usage", "active_jobs", "completed_jobs", "failed_jobs", "queue_depth"} <= set(found)
    assert not any(isinstance(v, (dict, list)) for v in found.values())
    ask(http)
    assert http.get("/health").json()["queue_depth"] == 1 and http.get("/health/live").status_code == http.get("/health/ready").status_code == 200


# S2

def while_waiting(service, **result):
    import threading

    def work():
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if service.jobs.counts()["states"]["queued"]:
                return finish(service, **result)
            time.sleep(0.05)
    threading.Thread(target=work).start()


def test_generate_video_waits_and_says_where_it_is(http, service):
    while_waiting(service, frames=16, fps=8, duration=2.0, generated_frames=17)
    said = http.post("/generate-video", json={"prompt": PROMPT})
    job, = service.jobs.list()
    assert said.status_code == 200 and said.json() == {"job_id": job.id, "video_url": f"http://localhost/artifacts/{job.id}.mp4", "frames": 16, "fps": 8, "duration": 2.0, "generated_frames": 17}
    assert job.spec["num_frames"] == 16 and job.spec["trim"] is True and job.spec["fps"] == 8
    assert http.get(said.json()["video_url"]).content == b"frames of a film"


def test_generate_video_does_not_wait_when_told_so(http, service):
    said = http.post("/generate-video", json={"prompt": PROMPT, "num_frames": 17}, headers={"Prefer": "respond-async"})
    assert said.status_code == 202 and said.json()["status"] == "pending" and service.jobs.list()[0].spec["num_frames"] == 17
    assert http.get(said.headers["location"]).json()["job_id"] == said.json()["job_id"]


def picture():
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (96, 64), "red").save(out, "PNG")
    return out.getvalue()


def test_generate_video_as_a_form_with_a_picture(http, service):
    while_waiting(service, temporal_score=0.9)
    fields = {"prompt": PROMPT, "mode": "optimized", "num_frames": "17", "num_inference_steps": "5", "guidance_scale": "3", "seed": "7", "fps": "8", "height": "64", "width": "96"}
    said = http.post("/generate-video", data=fields, files={"image": ("../../etc/passwd", picture(), "image/png")})
    assert said.status_code == 200, said.text
    job, = service.jobs.list()
    assert {"video_path", "artifact_url", "temporal_score", "mode", "latency_seconds", "peak_memory_gib"} <= set(said.json())
    assert said.json()["video_path"] == f"/artifacts/{job.id}.mp4" and said.json()["mode"] == "optimized" and said.json()["temporal_score"] == 0.9
    assert job.model == "shapes-i2v+optimized" and job.spec["num_inference_steps"] == 5 and job.spec["image"].startswith("file_")
    assert "passwd" not in str(service.jobs.kept(job.spec["image"]).path)


def test_a_form_is_answered_when_its_clip_is_scored(http, service):
    from vidgen.serve.score import note

    def work():
        while (claim := take(service)) is None:
            time.sleep(0.02)
        (claim.staging / "video.mp4").write_bytes(b"frames")
        claim.publish([claim.staging / "video.mp4"], {"video": "video.mp4", "frames": 17, "fps": 8}, then=("score",))
        time.sleep(0.5)
        score = take(service)
        note(service.jobs, score.job.spec["of"], temporal_score=0.75)
        score.publish([], {})

    worker = threading.Thread(target=work)
    worker.start()
    said = http.post("/generate-video", data={"prompt": PROMPT})
    worker.join()
    job, = service.jobs.list(kind="generate")
    assert said.status_code == 200 and said.json()["temporal_score"] == 0.75 and said.json()["latency_seconds"] >= 0.5
    assert http.get(f"/v1/jobs/{job.id}").json()["result"]["temporal_score"] == 0.75
    assert [j["kind"] for j in http.get("/v1/jobs").json()["data"]] == ["generate"], "the job that scored is nobody's"


def test_a_score_that_an_answer_waits_for_is_next_whatever_others_ask(opened):
    "Three users in a closed loop: the queue is never empty, and the form is answered with its score nevertheless."
    service = opened(serve_wait=20)
    until, http = time.monotonic() + 20, client(service)
    for user in range(3):
        service.jobs.submit("noop", {}, owner=f"user {user}")

    def work():
        while time.monotonic() < until:
            claim = take(service)
            if claim.job.kind == "generate":
                (claim.staging / "video.mp4").write_bytes(b"frames")
                claim.publish([claim.staging / "video.mp4"], {"video": "video.mp4", "frames": 17, "fps": 8}, then=("score",))
            elif claim.job.kind == "score":
                from vidgen.serve.score import note

                note(service.jobs, claim.job.spec["of"], temporal_score=0.75)
                return claim.publish([], {})
            else:
                claim.publish([], {})
                service.jobs.submit("noop", {}, owner=claim.job.owner)

    worker = threading.Thread(target=work)
    worker.start()
    said = http.post("/generate-video", data={"prompt": PROMPT})
    worker.join()
    assert said.status_code == 200 and said.json()["temporal_score"] == 0.75


def test_an_adapter_is_a_registered_name_and_no_path(http, service):
    (service.jobs.root / "adapters/my-brand").mkdir(parents=True)
    (service.jobs.root / "adapters/my-brand/pytorch_lora_weights.safetensors").write_bytes(b"")
    for wrong in ("/etc/passwd", "../my-brand", "mybrand", "someone/on-a-hub"):
        assert http.post("/generate-video", data={"prompt": PROMPT, "lora": wrong}, headers={"Prefer": "respond-async"}).status_code == 422
    assert http.post("/generate-video", data={"prompt": PROMPT, "lora": "my-brand"}, headers={"Prefer": "respond-async"}).status_code == 202
    assert service.jobs.list()[0].spec["adapter"] == "my-brand"


def test_an_adapter_of_another_model_is_refused_and_not_accepted_to_fail(http, service):
    import numpy as np
    from safetensors.numpy import save_file

    from vidgen.models import registry
    from vidgen.store import fingerprint

    def registered(name, **facts):
        (service.jobs.root / "adapters" / name).mkdir(parents=True)
        save_file({"transformer.x.lora_A.weight": np.zeros((1, 2), np.float32)}, service.jobs.root / "adapters" / name / "a.safetensors", {"vidgen": json.dumps(facts)})

    same = fingerprint(registry.resolve("shapes-t2v")[1] / "transformer")
    registered("mine", base="shapes-i2v", base_hash="0" * 64, family=registry.entries()["shapes-i2v"].family)
    registered("other-family", base="wan-1.3b", base_hash=same, family="wan")
    registered("renamed", base="my-shapes", base_hash=same, family=registry.entries()["shapes-t2v"].family)
    registered("own", base="shapes-t2v", family=registry.entries()["shapes-t2v"].family)
    registered("foreign")
    ask = lambda name: http.post("/v1/jobs", json={"spec": {"prompt": PROMPT, "adapter": name}})
    assert [ask(name).status_code for name in ("mine", "other-family", "renamed", "own", "foreign")] == [422, 422, 202, 202, 202]
    said = ask("mine").json()
    assert said["code"] == "wrong_adapter" and "trained on shapes-i2v" in said["detail"] and "shapes-t2v" in said["detail"] and http.post("/v1/videos", json={"prompt": PROMPT, "lora": "mine"}).json()["error"]["param"] == "lora"


@pytest.mark.parametrize(("text", "scored"), [("true", True), ("on", True), ("1", True), ("false", True), ("0", True), ("maybe", None)])
def test_a_form_may_say_yes_and_no(http, service, text, scored):
    said = http.post("/generate-video", data={"prompt": PROMPT, "score": text}, headers={"Prefer": "respond-async"})
    assert said.status_code == (422 if scored is None else 202) and [j.spec["score"] for j in service.jobs.list()] == [scored] * (scored is not None)


ASKING = {"/v1/jobs": {"spec": {"prompt": PROMPT}}, "/v1/batches": {"specs": [{"prompt": PROMPT}]}, "/generate": {"prompt": PROMPT}, "/generate-video": {"prompt": PROMPT}, "/v1/videos": {"prompt": PROMPT},
          "/api/video/single_inference": {"prompt": PROMPT}, "/api/video/batch_inference": {"prompts": [PROMPT]}, "/v1/videos/{id}/remix": {"prompt": "another"}, "/v1/jobs/{id}/retry": None}


@pytest.mark.parametrize("path", ASKING)
def test_every_way_into_the_queue_takes_a_key(http, service, path):
    document = http.get("/openapi.json").json()["paths"]
    shown = next(about["post"] for route, about in document.items() if route.replace("{video_id}", "{id}").replace("{job_id}", "{id}") == path)
    assert "idempotency-key" in [p["name"].lower() for p in shown["parameters"]]
    old = ask(http)
    http.post(old["links"]["cancel"])
    for _ in range(2):
        said = http.post(path.replace("{id}", old["id"]), json=ASKING[path], headers={"Idempotency-Key": "once", "Prefer": "respond-async"})
        assert said.status_code in (200, 202), said.text
    assert len(service.jobs.list()) == 2


# S3

def test_portal_single(http, service):
    said = http.post("/api/video/single_inference", json={"prompt": PROMPT}).json()
    assert set(said) == {"job_id", "status", "message"} and said["status"] == "pending"
    job = service.jobs.get(said["job_id"])
    assert job.expires_at == pytest.approx(job.created_at + 300)
    assert http.get(f"/api/video/status/{job.id}").json() == {"job_id": job.id, "status": "pending", "message": "waiting for its turn", "progress": 0.0, "video_url": None}
    finish(service)
    done = http.get(f"/api/video/status/{job.id}").json()
    assert (done["status"], done["progress"], done["video_url"]) == ("complete", 100.0, f"/static/videos/{job.id}/video.mp4")
    for path in (done["video_url"], f"/api/videos/{job.id}", f"/api/videos/{job.id}.mp4"):
        assert http.get(path).content == b"frames of a film"
    assert http.get("/api/video/status/job_none").status_code == 404


def test_portal_batch(http, service):
    said = http.post("/api/video/batch_inference", json={"prompts": [PROMPT] * 3, "seed": 7})
    assert said.status_code == 200 and len(said.json()["jobs"]) == 3
    assert [service.jobs.get(j["job_id"]).spec["seed"] for j in said.json()["jobs"]] == [7, 8, 9]
    assert [service.jobs.get(j["job_id"]).place for j in said.json()["jobs"]] == [0, 1, 2]
    batch = said.json()["batch_id"]
    finish(service)
    state = http.get(f"/api/video/batch_status/{batch}").json()
    assert (state["total"], state["complete"], state["pending"]) == (3, 1, 2) and len(state["jobs"]) == 3
    packed = http.get(f"/api/video/batch_download/{batch}")
    assert packed.headers["content-type"] == "application/zip" and len(zipfile.ZipFile(io.BytesIO(packed.content)).namelist()) == 2
    assert http.post("/api/video/batch_inference", json={"prompts": [PROMPT] * 9}).status_code == 422
    assert http.get("/api/video/batch_status/batch_none").status_code == 404


def test_clean_expired_ends_what_waited_too_long(http, service):
    job = http.post("/api/video/single_inference", json={"prompt": PROMPT}).json()["job_id"]
    assert http.post("/api/video/clean_expired").json() == {"removed": 0}
    with service.jobs.writing() as ledger:
        ledger.run(ledger.t.job.update().values(expires_at=1.0))
    assert http.post("/api/video/clean_expired").json() == {"removed": 1} and http.get(f"/api/video/status/{job}").json()["status"] == "expired"
    assert service.jobs.get(http.post("/generate", json={"prompt": PROMPT}).json()["job_id"]).expires_at is None


def test_storage_statistics(http):
    found = http.get("/api/pipeline/storage/stats").json()
    assert {"total_files", "total_size_mb", "tiers", "disk"} <= set(found) and set(found["tiers"]) == {"uploads", "processed", "videos", "temp"} and set(found["disk"]) == {"free_gb", "percent_used"}


# the document and the pages

def test_the_document_names_every_route(http):
    paths = http.get("/openapi.json").json()["paths"]
    wanted = ["/generate", "/status/{job_id}", "/video/{job_id}", "/health", "/generate-video", "/artifacts/{filename}", "/api/video/single_inference", "/api/video/status/{job_id}",
              "/api/video/batch_inference", "/api/video/batch_status/{batch_id}", "/api/video/batch_download/{batch_id}", "/api/video/clean_expired", "/api/videos/{video_id}", "/v1/videos",
              "/v1/videos/{video_id}", "/v1/videos/{video_id}/content", "/v1/jobs", "/v1/jobs/{job_id}/events", "/v1/batches", "/v1/events", "/v1/models", "/metrics", "/health/ready"]
    assert not set(wanted) - set(paths)


def test_the_document_can_be_turned_off(opened):
    service = opened(serve_docs=False)
    http = client(service)
    assert http.get("/docs").status_code == http.get("/openapi.json").status_code == 404


def test_the_docs_are_swagger_where_its_files_are(http, tmp_path, monkeypatch):
    from vidgen.serve import page

    files = tmp_path / "here" / "fastapi_swagger" / "resources"
    files.mkdir(parents=True)
    (files.parent / "__init__.py").touch()
    for name in page.SWAGGER:
        (files / name).write_text(f"/* {name} */")
    monkeypatch.syspath_prepend(tmp_path / "here")
    assert "docs.js" in http.get("/docs").text and "pip install" not in http.get("/docs").text
    assert [http.get(f"/static/{name}").text for name in page.SWAGGER] == [f"/* {name} */" for name in page.SWAGGER]


def test_without_swagger_the_docs_are_a_plain_page_that_asks_for_nothing_that_is_not_there(http, monkeypatch):
    import re

    from vidgen.serve import page

    monkeypatch.setattr(page, "find_spec", lambda name: None)
    plain = http.get("/docs")
    assert plain.status_code == 200 and 'href="/openapi.json"' in plain.text and "pip install fastapi-swagger" in plain.text
    asked = re.findall(r'(?:src|href)="(/[^"]+)"', plain.text)
    assert asked and all(http.get(path).status_code == 200 for path in asked) and not any("swagger" in path for path in asked)
    assert http.get("/static/swagger-ui.css").status_code == 404
