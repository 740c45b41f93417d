"""Security, row by row: who may, whose is it, how much, from where, what is in it."""
import io
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from serving import PROMPT, client, finish, served

from vidgen.serve import auth, guard
from vidgen.serve.guard import Problem
from vidgen.serve.records import NotFound


def bearer(service, owner="ada", **how):
    return {"Authorization": f"Bearer {service.keys.create(owner, **how)[0]}"}


def spec(**more):
    return {"spec": {"prompt": PROMPT, **more}}


# whose is it (API1), who is asking (API2), which part (API5)

def routes(service):
    "(method, path) of every route in the OpenAPI document."
    paths = client(service).get("/openapi.json", headers=bearer(service, "doc")).json()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def test_nobody_sees_what_belongs_to_another(service):
    job = service.jobs.submit("generate", {"prompt": PROMPT}, owner="ada", batch="batch_of_ada", model="shapes-t2v")
    finish(service)
    mine, other, http = bearer(service, "ada"), bearer(service, "eve"), client(service)
    ids = {"{job_id}": job.id, "{video_id}": job.id, "{batch_id}": "batch_of_ada", "{filename}": f"{job.id}.mp4", "{name}": "video.mp4"}
    tried = 0
    for method, path in routes(service):
        if "{" not in path:
            continue
        url = path
        for name, value in ids.items():
            url = url.replace(name, value)
        assert "{" not in url, f"{path} has a parameter this test does not know"
        body = {"prompt": PROMPT} if path.endswith("remix") else None
        answer = http.request(method, url, headers=other, json=body)
        assert answer.status_code == 404, (method, path, answer.status_code)
        unknown = http.request(method, url.replace(job.id, "job_none").replace("batch_of_ada", "batch_none"), headers=other, json=body)
        assert {k: v for k, v in unknown.json().items() if k in ("status", "code")} == {k: v for k, v in answer.json().items() if k in ("status", "code")}
        tried += 1
    assert tried >= 18 and http.get(f"/v1/jobs/{job.id}", headers=mine).status_code == 200
    assert http.get("/v1/events", params={"jobs": job.id}, headers=other).status_code == 404
    for path in ("/v1/jobs", "/v1/videos"):
        assert http.get(path, headers=other).json()["data"] == [] != http.get(path, headers=mine).json()["data"]


OPEN = {"/health", "/health/live", "/health/ready", "/metrics"}


def test_every_route_but_health_and_metrics_needs_a_key_once_there_is_one(service):
    http = client(service)
    assert http.get("/v1/jobs").status_code == 200
    found = routes(service)  # makes a key
    for method, path in found:
        status = http.request(method, path.replace("{", "").replace("}", "")).status_code
        assert (status == 401) == (path not in OPEN), (method, path, status)


def test_metrics_may_need_a_key(opened):
    service = opened(serve_metrics_open=False)
    key = bearer(service)
    assert client(service).get("/metrics").status_code == 401 and client(service).get("/metrics", headers=key).status_code == 200


def test_scopes(service):
    http, reader, user, admin = client(service), bearer(service, scopes=["read"]), bearer(service), bearer(service, scopes=["admin"])
    assert http.post("/v1/jobs", json=spec(), headers=reader).status_code == 403
    assert http.get("/v1/jobs", headers=reader).status_code == 200 and http.post("/v1/jobs", json=spec(), headers=user).status_code == 202
    assert [http.get("/v1/storage", headers=h).status_code for h in (reader, user, admin)] == [403, 403, 200]


def test_a_key_ends_by_revoking_and_by_time(service):
    http = client(service)
    text, key = service.keys.create("ada")
    head = {"Authorization": f"Bearer {text}"}
    assert http.get("/v1/jobs", headers=head).status_code == 200 and http.get("/v1/jobs", headers={"X-API-Key": text}).status_code == 200
    service.keys.revoke(key.id)
    assert http.get("/v1/jobs", headers=head).status_code == 401
    short, _ = service.keys.create("ada", expires_in=0.05)
    time.sleep(0.1)
    assert service.keys.check(short) is None and http.get("/v1/jobs").status_code == 401


def rows(service):
    "All rows of all tables, as text."
    import sqlalchemy as sa

    tables = sa.MetaData()
    tables.reflect(service.jobs.db)
    with service.jobs.db.connect() as conn:
        return repr([conn.execute(table.select()).all() for table in tables.tables.values()])


def test_no_secret_is_stored_or_logged(service, tmp_path, space, caplog):
    text, key = service.keys.create("ada")
    http, head = client(service), {"Authorization": f"Bearer {text}"}
    with caplog.at_level(logging.DEBUG):
        job = http.post("/v1/jobs", json=spec(), headers=head).json()
        ticket = auth.ticket(service.keys, key, f"/v1/jobs/{job['id']}")
        assert http.get(f"/v1/jobs/{job['id']}", params={"ticket": ticket}).status_code == 200
    secret = auth.parts(text)[1]
    assert secret not in rows(service) and auth.digest(secret) in rows(service)
    service.jobs.close()
    files = [p for folder in (tmp_path, space) for p in folder.rglob("*") if p.is_file()]
    assert files and not any(secret.encode() in p.read_bytes() for p in files)
    said = "\n".join(f"{r.getMessage()} {r.__dict__}" for r in caplog.records if r.name.startswith("vidgen"))
    assert secret not in said and ticket not in said and PROMPT not in said


def test_guessing_keys_is_stopped(service):
    http, good = client(service), bearer(service)
    said = [http.get("/v1/jobs", headers={"Authorization": f"Bearer vg_{'a' * 8}_{'x' * 43}"}).status_code for _ in range(auth.FAILURES + 1)]
    assert said == [401] * auth.FAILURES + [429]
    blocked = http.get("/v1/jobs", headers=good)
    assert blocked.status_code == 429 and 0 < int(blocked.headers["retry-after"]) <= 60


def test_comparing_does_not_depend_on_the_key(service, monkeypatch):
    "An unknown id and a wrong secret take the same way: one look-up, one constant-time comparison."
    text, _ = service.keys.create("ada")
    calls = []
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: calls.append(len(a) == len(b) == 64) or False)
    for wrong in (f"vg_{'a' * 8}_{'x' * 43}", text[:-1] + "A", "nonsense"):
        assert service.keys.check(wrong) is None
    assert calls == [True] * 3


def test_a_ticket_ends_and_can_not_be_altered(service):
    http, (text, key) = client(service), service.keys.create("ada")
    job = http.post("/v1/jobs", json=spec(), headers={"Authorization": f"Bearer {text}"}).json()["id"]
    path = f"/v1/jobs/{job}"
    good, old = auth.ticket(service.keys, key, path), auth.ticket(service.keys, key, path, seconds=-1)
    name, until, sign = good.split(".")
    longer, other = f"{name}.{int(until) + 3600}.{sign}", f"{name}.{until}.{'0' * 43}"
    assert [http.get(path, params={"ticket": t}).status_code for t in (good, old, longer, other, "x" * 5000)] == [200, 401, 401, 401, 401]
    service.keys.revoke(key.id)
    assert http.get(path, params={"ticket": good}).status_code == 401


def test_names_given_in_a_body_are_ones_own_too(service):
    "A picture of somebody else is not there; an idempotency key means one's own job."
    http, ada, eve = client(service), bearer(service, "ada"), bearer(service, "eve")
    theirs = http.post("/v1/uploads", files={"image": image()}, headers=ada).json()["id"]
    for path, body in (("/v1/jobs", spec(image=theirs)), ("/v1/videos", {"prompt": PROMPT, "input_reference": {"file_id": theirs}})):
        answers = [http.post(path, json=body, headers=who) for who in (ada, eve)]
        assert [a.status_code for a in answers] == [202 if path == "/v1/jobs" else 200, 422] and "unknown_image" in answers[1].text
    made = {http.post("/v1/jobs", json=spec(), headers=who | {"Idempotency-Key": "k"}).json()["id"] for who in (ada, eve, ada)}
    assert len(made) == 2


# what is in the answers (API3)

def test_answers_hold_no_path_of_this_machine_and_no_owner(service):
    http, head = client(service), bearer(service)
    job = http.post("/v1/jobs", json=spec(), headers=head).json()
    finish(service)
    texts = [http.get(p, headers=head).text for p in (f"/v1/jobs/{job['id']}", f"/v1/jobs/{job['id']}/artifacts", f"/v1/jobs/{job['id']}/events", "/v1/models", "/health", "/health/ready",
                                                      f"/status/{job['id']}", f"/api/video/status/{job['id']}", f"/v1/videos/{job['id']}")]
    texts.append(http.post("/v1/jobs", json=spec(model="cogvideox-5b"), headers=head).text)
    for text in texts:
        assert str(service.jobs.root) not in text and str(service.jobs.root.parent) not in text and '"ada"' not in text and str(Path.home()) + "/" not in text and ".cache" not in text


def test_what_nobody_knows_is_refused(service):
    http = client(service)
    for path, body in (("/v1/jobs", {**spec(), "owner": "eve"}), ("/v1/jobs", spec(owner="eve")), ("/generate", {"prompt": PROMPT, "path": "x"}), ("/v1/videos", {"prompt": PROMPT, "owner": "eve"})):
        assert http.post(path, json=body).status_code == 422


def test_what_nobody_foresaw_tells_only_its_id(service, monkeypatch, caplog):
    monkeypatch.setattr(service.jobs, "list", lambda *a, **k: 1 / 0)
    said = client(service).get("/v1/jobs", headers={"X-Request-ID": "req-7"})
    assert said.status_code == 500 and said.json()["request_id"] == "req-7" and "division" not in said.text and said.headers["content-type"] == "application/problem+json"
    assert "division" in caplog.text


# how much (API4, API6)

@pytest.mark.parametrize(("good", "bad"), [
    (dict(prompt="a" * 4000), dict(prompt="a" * 4001)), (dict(prompt="é" * 4000), dict(prompt="語" * 4001)), (dict(num_inference_steps=200), dict(num_inference_steps=201)),
    (dict(seed=2**32 - 1), dict(seed=2**32)), (dict(fps=120), dict(fps=120.5)), (dict(guidance_scale=100), dict(guidance_scale=float("inf"))), (dict(num_frames=49), dict(num_frames=1001)),
    (dict(prompt=" x"), dict(prompt="   ")), (dict(prompt="x"), dict(prompt="\ud800")), (dict(prompt="x"), dict(prompt="a\0b")), (dict(negative_prompt=""), dict(negative_prompt="a" * 4001)),
])
def test_limits_of_a_spec(service, good, bad):
    http = client(service)
    dumps = lambda body: {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}}  # noqa: E731
    assert http.post("/v1/jobs", **dumps({"spec": {"prompt": PROMPT, **good}})).status_code == 202
    assert http.post("/v1/jobs", **dumps({"spec": {"prompt": PROMPT, **bad}})).status_code == 422


def test_a_time_to_live_has_an_upper_bound(service):
    http = client(service)
    for wrong in (2592001, 0, -1, "Infinity", 1e300):
        assert http.post("/v1/jobs", content=json.dumps({**spec(), "expires_in": wrong}).replace('"Infinity"', "Infinity"), headers={"Content-Type": "application/json"}).status_code == 422
    assert http.post("/v1/jobs", json={**spec(), "expires_in": 2592000}).status_code == 202


def test_a_clip_can_be_too_large(opened):
    service = opened(serve_megapixels=0.105)
    http = client(service)
    assert http.post("/v1/jobs", json=spec()).status_code == 202  # 17 x 64 x 96 = 104,448
    assert http.post("/v1/jobs", json=spec(num_frames=25)).json()["code"] == "too_much"


WIDE = {"height": 720, "width": 1280}


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/jobs", {"json": {"spec": {"prompt": PROMPT, **WIDE}}}), ("/v1/batches", {"json": {"specs": [{"prompt": PROMPT}, {"prompt": PROMPT, **WIDE}]}}), ("/generate", {"json": {"prompt": PROMPT, **WIDE}}),
    ("/generate-video", {"json": {"prompt": PROMPT, **WIDE}}), ("/generate-video", {"data": {"prompt": PROMPT, **WIDE}}), ("/api/video/single_inference", {"json": {"prompt": PROMPT, **WIDE}}),
    ("/api/video/batch_inference", {"json": {"prompts": [PROMPT], **WIDE}}), ("/v1/videos", {"json": {"prompt": PROMPT, "size": "1280x720"}}), ("/v1/videos/sync", {"json": {"prompt": PROMPT, **WIDE}})])
def test_no_view_takes_a_clip_far_beyond_what_the_model_is_made_for(service, path, body):
    said = client(service).post(path, **body)
    assert said.status_code == 422 and "too_much" in said.text and "fit with 288 x 160" in said.text and service.jobs.list() == []


def test_the_size_that_is_offered_is_taken_and_the_limit_can_be_raised(opened):
    http = client(opened())
    for wrong, fits in ((WIDE, "288 x 160"), ({"height": 1280, "width": 720}, "160 x 288"), ({"height": 16, "width": 8192, "num_frames": 49}, "1056 x 16"), ({**WIDE, "num_frames": 49}, "160 x 96")):
        said = http.post("/v1/jobs", json=spec(**wrong)).json()
        assert said["code"] == "too_much" and said["detail"].endswith(f"so many frames fit with {fits}"), said
        width, height = map(int, fits.split(" x "))
        assert http.post("/v1/jobs", json=spec(**wrong | {"height": height, "width": width})).status_code == 202
    http.close()
    assert client(opened(serve_enlarge=150)).post("/v1/jobs", json=spec(**WIDE)).status_code == 202


def test_every_model_makes_the_sizes_it_was_published_for():
    from types import SimpleNamespace

    from vidgen.models.registry import entries
    from vidgen.serve.service import _check_most
    from vidgen.settings import Serve

    free = SimpleNamespace(only=None, multiple=16)
    for entry in entries().values():
        longest = {"wan": 121, "ltx": 257, "hunyuan": 129}.get(entry.family, entry.num_frames)
        for height, width in [(entry.height, entry.width), *([(720, 1280)] if entry.height >= 480 else [])]:
            _check_most(entry, free, {"num_frames": longest, "height": height, "width": width}, Serve().megapixels, Serve().enlarge)


def test_a_body_is_capped_before_it_is_parsed(service):
    http = client(service)
    body = lambda size: b'{"prompt": "' + b"a" * (size - 14) + b'"}'  # noqa: E731
    assert http.post("/generate", content=body(10**6), headers={"Content-Type": "application/json"}).status_code == 422  # read, and refused for its prompt
    assert http.post("/generate", content=body(10**6 + 1), headers={"Content-Type": "application/json"}).status_code == 413
    stream = http.post("/generate", content=(b" " * 100_000 for _ in range(11)), headers={"Content-Type": "application/json"})  # without a length
    assert stream.status_code == 413 and stream.json()["code"] == "too_large"
    assert http.post("/generate", content=b"{}", headers={"Content-Type": "application/json", "Content-Length": "1e3"}).status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(service, monkeypatch):
    import socket

    defaults = guard.Rules.__init__.__defaults__
    monkeypatch.setattr(guard.Rules.__init__, "__defaults__", (*defaults[:-2], 0.3, defaults[-1]))  # body_seconds
    with served(service) as address, socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as slow:
        slow.settimeout(10)
        slow.sendall(b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in slow.recv(4096)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 50_000, b"nonsense", b"", b"\xff\xfe", b"[1]", b"null"])
def test_strange_json_is_refused(service, body):
    for path in ("/v1/jobs", "/generate", "/v1/videos", "/generate-video"):
        assert client(service).post(path, content=body, headers={"Content-Type": "application/json"}).status_code in (400, 422)


def test_queues_are_limited_per_key_and_for_all(opened):
    service = opened(serve_queued_per_key=2, serve_queued=3)
    http, ada, eve = client(service), bearer(service, "ada"), bearer(service, "eve")
    assert [http.post("/v1/jobs", json=spec(), headers=ada).status_code for _ in range(3)] == [202, 202, 429]
    assert [http.post("/v1/jobs", json=spec(), headers=eve).status_code for _ in range(2)] == [202, 503]
    assert int(http.post("/v1/jobs", json=spec(), headers=eve).headers["retry-after"]) > 0


def test_asking_again_counts_as_asking(opened):
    service = opened(serve_queued_per_key=1, serve_device_seconds_per_day=100)
    http = client(service)
    ended = http.post("/v1/jobs", json=spec()).json()["id"]
    http.post(f"/v1/jobs/{ended}/cancel")
    again = [http.post(f"/v1/jobs/{ended}/retry") for _ in range(2)]
    assert [a.status_code for a in again] == [202, 429] and again[1].json()["code"] == "queue_full"
    service.jobs.claim("w")
    with service.jobs.writing() as ledger:
        ledger.run(ledger.t.job.update().values(started_at=ledger.now - 200, finished_at=ledger.now))
    assert http.post(f"/v1/jobs/{ended}/retry").json()["code"] == "quota_spent"


def test_a_name_that_is_none_is_refused(service):
    http = client(service)
    for _ in range(2):  # without a key, and with one
        assert http.get("/v1/jobs", headers={"Host": "[::1"}).status_code == 400
        assert http.post("/v1/jobs", json=spec(), headers={"Host": "localhost", "Origin": "http://["}).status_code == 403
        http.headers |= bearer(service, "ada")


def test_text_that_no_database_takes_is_refused(service):
    http = client(service)
    for path, body in (("/v1/videos/extensions", '{"prompt": "x", "seconds": "1", "video": {"id": "%s"}}'), ("/v1/videos", '{"prompt": "x", "input_reference": {"file_id": "%s"}}')):
        for text in (r"\ud800", r"\u0000"):
            assert http.post(path, content=body % text, headers={"Content-Type": "application/json"}).status_code in (400, 404, 422)
    for text in ("\ud800", "\0"):  # as a WebSocket may ask for
        for ask in (service.jobs.get, service.jobs.kept, service.jobs.cancel):
            with pytest.raises(NotFound):
                ask(text)


def test_a_batch_has_eight_at_most(service):
    http = client(service)
    for path, body, good in (("/v1/batches", lambda n: {"specs": [{"prompt": PROMPT}] * n}, 202), ("/api/video/batch_inference", lambda n: {"prompts": [PROMPT] * n}, 200)):
        assert [http.post(path, json=body(n)).status_code for n in (0, 8, 9)] == [422, good, 422]


def test_a_picture_has_twenty_megabytes_at_most(service):
    http = client(service)
    said = [http.post("/v1/uploads", files={"image": image() + bytes(size - len(image()))}) for size in (guard.IMAGE_BYTES, guard.IMAGE_BYTES + 1)]
    assert [s.status_code for s in said] == [201, 413] and "20 MB" in said[1].json()["detail"]


def test_requests_without_a_key_are_limited_by_address(opened):
    http = client(opened(serve_requests_per_minute=2))
    assert [http.get("/v1/jobs").status_code for _ in range(3)] == [200, 200, 429] and http.get("/health").status_code == 200


def test_requests_are_limited_per_key(opened):
    service = opened(serve_requests_per_minute=3)
    http, ada, eve = client(service), bearer(service, "ada"), bearer(service, "eve")
    said = [http.get("/v1/jobs", headers=ada) for _ in range(4)]
    assert [r.status_code for r in said] == [200, 200, 200, 429] and [r.headers.get("ratelimit-remaining") for r in said[:3]] == ["2", "1", "0"]
    assert int(said[3].headers["retry-after"]) > 0 and http.get("/v1/jobs", headers=eve).status_code == 200


def test_a_day_of_computing_is_limited(opened):
    service = opened(serve_device_seconds_per_day=10)
    http, ada, eve = client(service), bearer(service, "ada"), bearer(service, "eve")
    http.post("/v1/jobs", json=spec(), headers=ada)
    finish(service)
    assert http.post("/v1/jobs", json=spec(), headers=ada).status_code == 202
    with service.jobs.writing() as ledger:
        ledger.run(ledger.t.job.update().where(ledger.t.job.c.state == "succeeded").values(started_at=ledger.now - 11, finished_at=ledger.now))
    assert http.post("/v1/jobs", json=spec(), headers=ada).json()["code"] == "quota_spent" and http.post("/v1/jobs", json=spec(), headers=eve).status_code == 202


def test_a_share_that_is_spent_does_not_come_back_by_deleting(opened):
    service = opened(serve_device_seconds_per_day=10)
    http, ada = client(service), bearer(service, "ada")
    job = http.post("/v1/jobs", json=spec(), headers=ada).json()["id"]
    claim, t = service.jobs.claim("w"), service.jobs
    with t.writing() as ledger:
        ledger.run(ledger.t.job.update().values(started_at=ledger.now - 11))
    assert http.post("/v1/jobs", json=spec(), headers=ada).json()["code"] == "quota_spent", "what runs counts"
    claim.publish([], {})
    for state in ("ended", "deleted"):
        assert http.post("/v1/jobs", json=spec(), headers=ada).json()["code"] == "quota_spent", state
        http.delete(f"/v1/jobs/{job}", headers=ada)
    with t.writing() as ledger:
        assert ledger.run(ledger.t.spent.update().values(at=ledger.t.spent.c.at - 86400)).rowcount == 1
    assert http.post("/v1/jobs", json=spec(), headers=ada).status_code == 202, "after a day it does"
    http.post(f"/v1/jobs/{t.list()[0].id}/cancel", headers=ada)
    http.delete(f"/v1/jobs/{t.list()[0].id}", headers=ada)
    with t.reading() as ledger:
        assert ledger.run(ledger.t.spent.select()).all() == [], "and is forgotten"


# from where (API7, API8)

@pytest.mark.parametrize(("head", "status"), [
    ({}, 200), ({"Origin": "http://localhost"}, 200), ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://localhost:9000"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-origin"}, 200), ({"Host": "evil.example"}, 421), ({"Host": "evil.example:8000"}, 421), ({"Host": "127.0.0.1.evil.example"}, 421),
    ({"Host": "127.0.0.1:8000"}, 200), ({"Host": "[::1]:8000"}, 200), ({"Host": ""}, 421), ({"Content-Type": "text/plain", "Origin": "http://evil.example"}, 403)])
def test_foreign_pages_reach_nothing_on_a_keyless_service(service, head, status):
    assert client(service).post("/generate", json={"prompt": PROMPT}, headers=head).status_code == status


def test_names_and_pages_can_be_allowed(opened):
    service = opened(serve_hosts="clips.example.org", serve_origins="https://lab.example.org")
    http = client(service)
    assert http.get("/v1/jobs", headers={"Host": "clips.example.org"}).status_code == 200
    allowed = http.post("/generate", json={"prompt": PROMPT}, headers={"Origin": "https://lab.example.org"})
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://lab.example.org" and "access-control-allow-credentials" not in allowed.headers
    assert http.post("/generate", json={"prompt": PROMPT}, headers={"Origin": "https://evil.example"}).status_code == 403


def test_no_cors_by_default_and_careful_headers(service):
    http = client(service)
    said = http.get("/v1/jobs", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in said.headers
    assert said.headers["x-content-type-options"] == "nosniff" and "default-src 'self'" in said.headers["content-security-policy"] and said.headers["x-frame-options"] == "DENY"
    assert http.options("/v1/jobs", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}).status_code == 405


INSIDE = ["127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "10.1.2.3", "172.16.0.1", "192.168.0.1", "100.64.0.1", "0.0.0.0", "fe80::1", "fd00::1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "224.0.0.1", "::"]


@pytest.mark.parametrize("address", INSIDE)
def test_no_name_leads_inside(address):
    answer = lambda *found: lambda host, port, **kind: [(0, 0, 0, "", (a, port)) for a in found]  # noqa: E731
    for found in ([address], ["93.184.215.14", address]):
        with pytest.raises(Problem) as err:
            guard.public_address("pictures.example", answer(*found))
        assert err.value.status == 422
    assert guard.public_address("pictures.example", answer("93.184.215.14")) == "93.184.215.14"


def test_a_name_is_looked_up_once_and_each_hop_anew():
    import httpx

    looked, called = [], []

    def rebinding(host, port, **kind):
        looked.append(host)
        return [(0, 0, 0, "", ("93.184.215.14" if len(looked) == 1 else "127.0.0.1", port))]

    def web(request):
        called.append(request.url.host)
        return httpx.Response(200 if request.url.path == "/a" else 302, headers={"location": "/a"}, stream=httpx.ByteStream(b"x"))

    fetch = lambda url: guard.fetch(url, ["pictures.example"], resolve=rebinding, transport=httpx.MockTransport(web))  # noqa: E731
    assert fetch("https://pictures.example/a") == b"x" and looked == ["pictures.example"] and called == ["93.184.215.14"]
    looked.clear()
    with pytest.raises(Problem, match="not a public address"):
        fetch("https://pictures.example/moved")
    assert called == ["93.184.215.14"] * 2


def test_what_a_url_gives_has_bounds(monkeypatch):
    "Three hops, so many bytes, so many seconds; and a hop to the cloud's own address is none."
    import httpx

    public = lambda host, port, **kind: [(0, 0, 0, "", ("93.184.215.14", port))]  # noqa: E731

    def web(request):
        kind, _, n = request.url.path[1:].partition("/")
        to = {"hop": f"/hop/{int(n or 0) - 1}" if n != "1" else "/data/5", "inside": "https://169.254.169.254/latest", "plain": "http://pictures.example/data/5", "nowhere": ""}.get(kind)
        return httpx.Response(200 if to is None else 302, headers={} if to is None else {"location": to}, stream=httpx.ByteStream(b"x" * int(n or 0)))

    def said(path, **how):
        try:
            return len(guard.fetch(f"https://pictures.example/{path}", ["pictures.example"], resolve=public, transport=httpx.MockTransport(web), **how))
        except Problem as err:
            return err.status
    assert [said(p) for p in ("data/5", "hop/1", "hop/3", "hop/4", "inside", "plain", "nowhere")] == [5, 5, 5, 422, 422, 422, 422]
    assert said("data/1000", most=1000) == 1000 and said("data/1001", most=1000) == 413
    monkeypatch.setattr(guard, "FETCH_SECONDS", 0)
    assert said("data/5") == 504


@pytest.mark.parametrize("url", ["http://pictures.example/", "https://pictures.example:444/", "https://127.0.0.1/", "https://0x7f000001/", "https://2130706433/", "https://user@pictures.example/",
                                 "https://pictures.example.evil.example/", "ftp://pictures.example/", "file:///etc/passwd", "https://[::1]/", "//pictures.example/", "https://", "https://pictures.example:x/"])
def test_urls_that_are_not_called(url):
    with pytest.raises(Problem):
        guard.permitted(url, ["pictures.example"])


# what is in it

def image(kind="PNG", size=(64, 48), **how):
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, kind, **how)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_drawn_anew(kind):
    from PIL import Image

    exif = Image.Exif()
    exif[0x010F] = "a camera"
    clean = guard.redraw(image(kind, exif=exif) + b"<script>alert(1)</script>")
    with Image.open(io.BytesIO(clean)) as found:
        assert found.format == "PNG" and found.size == (64, 48) and not found.getexif() and not found.info
    assert b"script" not in clean and b"camera" not in clean


@pytest.mark.parametrize("data", [b"", b"GIF89a" + bytes(100), b"%PDF-1.7", b"\x89PNG\r\n\x1a\n" + bytes(50), b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\xff\xd8\xff\xe0" + bytes(1000), image()[:100]])
def test_what_is_no_picture_is_refused(service, data):
    assert client(service).post("/v1/uploads", files={"image": ("a.png", data, "image/png")}).status_code == 422


def test_bombs_are_refused_by_their_header():
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for side in (7000, 20000, 60000):  # 49, 400 and 3,600 million pixels
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        with warnings.catch_warnings(), pytest.raises(Problem) as err:
            warnings.simplefilter("ignore")
            guard.redraw(bomb)
        assert err.value.status == 413


def test_large_pictures_are_kept_at_a_size_that_models_use():
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    for kind in ("PNG", "JPEG", "WEBP"):
        with Image.open(io.BytesIO(guard.redraw(image(kind, (4000, 2500), exif=exif)))) as found:
            assert found.mode == "RGB" and abs(found.height / found.width - 1.6) < 0.01 and 0.95 * guard.KEPT_PIXELS < found.width * found.height <= guard.KEPT_PIXELS
    with pytest.raises(Problem, match="25 million pixels, and this has 6300 x 6300: send a smaller one"):
        guard.redraw(image(size=(6300, 6300)))


MANY_PICTURES = """
import asyncio, io, resource, sys
from pathlib import Path
import httpx
from PIL import Image
from serving import opened
from vidgen.serve.api import app

out = io.BytesIO()
Image.new("P", (5000, 5000)).save(out, "PNG")

async def main(service):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app(service)), base_url="http://localhost", timeout=300) as http:
        async def send(path, name, data={}):
            return await http.post(path, files={name: ("a.png", out.getvalue(), "image/png")}, data=data, headers={"Prefer": "respond-async"})
        await send("/v1/uploads", "image")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        clip = {"prompt": "a red circle", "model": "shapes-t2v"}
        said = await asyncio.gather(*(send("/v1/uploads", "image") for _ in range(4)), *(send("/generate-video", "image", clip) for _ in range(3)), *(send("/v1/videos", "input_reference", clip) for _ in range(3)))
        print([s.status_code for s in said], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

asyncio.run(main(opened(Path(sys.argv[1]))))
"""


def test_small_files_of_many_pixels_take_little_memory(tmp_path):
    "Ten pictures of 25 million pixels at once, by every way in, take no more than one."
    made = subprocess.run([sys.executable, "-c", MANY_PICTURES, str(tmp_path)], capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}"})
    assert made.returncode == 0, made.stderr
    said, more = made.stdout.rsplit(maxsplit=1)
    assert said == str([201] * 4 + [422] * 6) and int(more) < 60_000, made.stdout  # a text-to-video model takes no picture; KiB


def test_pictures_that_wait_are_few_and_hold_nobody_up(service, monkeypatch):
    import threading
    from concurrent.futures import ThreadPoolExecutor

    import httpx

    go, real = threading.Event(), guard.redraw
    monkeypatch.setattr(guard, "redraw", lambda data: go.wait(30) and real(data))
    with served(service) as address, ThreadPoolExecutor(64) as many:
        sent = [many.submit(httpx.post, f"{address}/v1/uploads", files={"image": ("a.png", image(), "image/png")}, timeout=30) for _ in range(50)]
        until = time.monotonic() + 30
        while sum(s.done() for s in sent) < 50 - guard.MOST_WAITING and time.monotonic() < until:
            time.sleep(0.02)
        read = httpx.get(f"{address}/v1/jobs", timeout=10)
        go.set()
        said = sorted(s.result().status_code for s in sent)
    assert read.status_code == 200 and said == [201] * guard.MOST_WAITING + [503] * (50 - guard.MOST_WAITING) and not guard._waiting


def test_errors_do_not_tell_where_files_lie(service):
    from vidgen.serve.records import Unavailable
    from vidgen.serve.service import problem
    from vidgen.serve.worker import verdict

    file = service.jobs.root / "uploads" / "file_1.png"
    lost = FileNotFoundError(f"there is no picture {file}")
    for err in (lost, OSError(28, "No space left on device", str(file)), OSError(5, "Input/output error", str(file)), RuntimeError(f"could not read '{file}', line 3")):
        told = verdict(err)[0]["message"]
        assert "file_1.png" in told and str(service.jobs.root) not in told and "uploads" not in told
    for err in (Unavailable(f"nothing was written: '{file}'", "storage_full"), ValueError(f"{file} is no film")):
        assert "file_1.png" in problem(err).detail and "/" not in problem(err).detail
    for text in ("see https://clips.example/a/b.png and and/or", "GET /v1/models lists them", "the nearest is 8/9 of it", "`/docs` has it"):
        assert verdict(ValueError(text))[0]["message"] == text


def test_a_clients_file_name_is_no_path(service):
    http = client(service)
    for name in ("../../../etc/passwd", "/etc/passwd", "a\\..\\b.png", "x" * 300):
        kept = http.post("/v1/uploads", files={"image": (name, image(), "image/png")})
        assert kept.status_code == 201
        path = service.jobs.kept(kept.json()["id"]).path
        assert path.parent == service.jobs.root / "uploads" and path.name == kept.json()["id"] + ".png"


@pytest.mark.parametrize("name", ["..%2f..%2fvidgen.db", "%2e%2e", "video.mp4%00", "%2fetc%2fpasswd", "settings.ini", "..\\vidgen.db"])
def test_only_files_with_a_row_are_served(service, name):
    http = client(service)
    job = http.post("/v1/jobs", json=spec()).json()["id"]
    finish(service)
    for path in (f"/v1/jobs/{job}/artifacts/{name}", f"/artifacts/{name}", f"/static/{name}", f"/api/videos/{name}", f"/static/videos/{name}/video.mp4"):
        assert http.get(path).status_code in (400, 404), path


@pytest.mark.parametrize("name", ["a%0Ab", "%0D%0AX-Evil:1", "%7F", "%E2%80%AE", "a" * 2000])
def test_strange_names_are_merely_not_there(service, name):
    http = client(service)
    for path in (f"/v1/jobs/{name}", f"/v1/videos/{name}", f"/artifacts/{name}", f"/v1/batches/{name}/zip", f"/{name}"):
        assert http.get(path).status_code == 404, path


def test_a_link_in_place_of_a_file_is_not_followed(service, tmp_path):
    http = client(service)
    job = http.post("/v1/jobs", json=spec()).json()["id"]
    finish(service)
    path = service.jobs.artifacts(job)[0].path
    path.unlink()
    path.symlink_to(tmp_path / "settings.ini")
    assert http.get(f"/video/{job}").status_code == 404


def test_models_are_names_and_no_paths(service):
    http = client(service)
    for model in ("/etc", "../weights", "someone/on-a-hub", str(service.jobs.root), "shapes-t2v/../shapes-t2v"):
        assert http.post("/v1/jobs", json=spec(model=model)).json()["code"] == "unknown_model"


def test_nothing_here_reads_pickles():
    "Weights are safetensors: no module calls torch.load or pickle, which run what a file says; processes that one call started may speak so to each other."
    import ast

    import vidgen

    found = []
    for path in Path(vidgen.__file__).parent.rglob("*.py"):
        bad = ("pickle.load", "joblib.load") if path.name == "launch.py" else ("pickle.load", "pickle.loads", "joblib.load")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                name = f"{node.func.value.id}.{node.func.attr}"
                safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
                found += [f"{path.name}:{node.lineno} {name}"] if name in bad or name == "torch.load" and not safe else []
    assert not found


# what there is (API9)

def described(document):
    "A line for each route: what it takes and what it answers."
    for path, methods in sorted(document["paths"].items()):
        for method, about in sorted(methods.items()):
            takes = [f"{p['in']}:{p['name']}{'' if p.get('required') else '?'}" for p in about.get("parameters", [])]
            for kind, body in about.get("requestBody", {}).get("content", {}).items():
                schema = body["schema"]
                schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
                needed = schema.get("required", [])
                takes.append(f"{kind}({' '.join(name + ('' if name in needed else '?') for name in sorted(schema['properties']))})")
            yield f"{method.upper()} {path} · {' '.join(takes) or 'nothing'} · {' '.join(sorted(about['responses']))}"


def test_the_api_is_what_was_agreed(service):
    "A change of the API shows here as a difference. If it is meant: VIDGEN_TEST_WRITE=1 pytest tests/test_http_guard.py -k agreed"
    agreed, found = Path(__file__).with_name("api.txt"), "\n".join(described(client(service).get("/openapi.json").json())) + "\n"
    if os.environ.get("VIDGEN_TEST_WRITE"):
        agreed.write_text(found)
    assert found == agreed.read_text()
