"""Events by SSE and WebSocket: nothing lost, nothing twice, whatever the connections do."""
import asyncio
import json
import random
import time

import pytest
from serving import PROMPT, client, finish, served, take

from vidgen.serve import progress
from vidgen.serve.progress import Hub

httpx = pytest.importorskip("httpx")
websockets = pytest.importorskip("websockets")


@pytest.fixture
def service(opened):
    made = opened(serve_requests_per_minute=1_000_000, serve_queued_per_key=10_000, serve_queued=10_000)
    made.hub = Hub(made.jobs, every=0.05)
    return made


def parse(text):
    "(id, event, data) of the complete messages in a stream."
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if "data" in fields:
            yield fields.get("id"), fields["event"], json.loads(fields["data"])


def test_a_stream_replays_follows_and_ends(service):
    job = service.jobs.submit("noop", {})
    claim = take(service)
    for i in range(5):
        claim.event("progress", {"progress": i})
    (claim.staging / "video.mp4").write_bytes(b"x")
    claim.publish([claim.staging / "video.mp4"], {"video": "video.mp4"})
    http = client(service)
    stream = http.get(f"/v1/jobs/{job.id}/events", headers={"Accept": "text/event-stream"})
    told = list(parse(stream.text))
    assert [int(i) for i, _, _ in told] == list(range(1, 9)) and told[-1][1] == "succeeded" and stream.text.startswith("retry: 3000")
    assert stream.headers["cache-control"] == "no-store" and stream.headers["x-accel-buffering"] == "no" and "content-encoding" not in stream.headers
    rest = http.get(f"/v1/jobs/{job.id}/events", headers={"Accept": "text/event-stream", "Last-Event-ID": "6"})
    assert [int(i) for i, _, _ in parse(rest.text)] == [7, 8]
    assert http.get(f"/v1/jobs/{job.id}/events", headers={"Accept": "text/event-stream", "Last-Event-ID": "8"}).status_code == 204
    assert http.get("/v1/jobs/job_none/events", headers={"Accept": "text/event-stream"}).status_code == 404


def test_one_stream_carries_several_jobs(service):
    made = [service.jobs.submit("noop", {"n": i}) for i in range(3)]
    for _ in made:
        finish(service)
    http = client(service)
    told = list(parse(http.get("/v1/events", params={"jobs": ",".join(j.id for j in made)}).text))
    for job in made:
        seqs = [d["seq"] for _, _, d in told if d["job"] == job.id]
        assert seqs == list(range(1, len(seqs) + 1))
    half = told[len(told) // 2][0]
    rest = list(parse(http.get("/v1/events", params={"jobs": ",".join(j.id for j in made)}, headers={"Last-Event-ID": half}).text))
    assert [d for _, _, d in rest] == [d for _, _, d in told[len(told) // 2 + 1:]] or sorted((d["job"], d["seq"]) for _, _, d in rest) == sorted((d["job"], d["seq"]) for _, _, d in told[len(told) // 2 + 1:])
    assert http.get("/v1/events", params={"jobs": made[0].id, "after": "x"}).status_code == 422


def test_a_stream_of_a_job_that_is_deleted_ends(service):
    job = service.jobs.submit("noop", {})

    async def listen():
        parts = []
        async for part in progress.sse(service.hub, [job.id], [0]):
            parts.append(part)
            if len(parts) == 2:
                await asyncio.to_thread(service.jobs.cancel, job.id)
                await asyncio.to_thread(service.jobs.delete, job.id)
        return parts
    assert asyncio.run(asyncio.wait_for(listen(), 10))


def test_a_stream_says_that_its_job_was_deleted(service):
    gone, other = service.jobs.submit("noop", {}), service.jobs.submit("noop", {})

    async def listen():
        parts, first = [], True
        async for part in progress.sse(service.hub, [gone.id, other.id], [0, 0]):
            parts.append(part.decode())
            if "queued" in parts[-1] and first:
                first = False
                await asyncio.to_thread(service.jobs.cancel, gone.id)
                await asyncio.to_thread(service.jobs.delete, gone.id)
            if "deleted" in parts[-1]:
                await asyncio.to_thread(service.jobs.cancel, other.id)
        return parts, [p async for p in progress.sse(service.hub, [gone.id], [0])]
    parts, again = asyncio.run(asyncio.wait_for(listen(), 20))
    told = list(parse("".join(parts)))
    assert [(i, d["job"]) for i, kind, d in told if kind == "deleted"] == [(None, gone.id)] and told[-1][1:] == ("canceled", told[-1][2]) and told[-1][2]["job"] == other.id
    assert [kind for _, kind, _ in parse(b"".join(again).decode())] == ["deleted"]  # it was there when it was looked for, and gone when it was joined


def quick(monkeypatch, heartbeat=0.2):
    "Heartbeats of a fraction of a second."
    for act in (progress.sse, progress.Talk.__init__):
        monkeypatch.setitem(act.__kwdefaults__, "heartbeat", heartbeat)


async def heard(socket, seconds=20):
    "The messages of a WebSocket until it is closed, and the code and reason."
    found = []
    try:
        async with asyncio.timeout(seconds):
            while True:
                found.append(json.loads(await socket.recv()))
    except websockets.ConnectionClosed as err:
        return found, err.rcvd.code, err.rcvd.reason


def test_a_websocket_on_a_deleted_job_ends(service, monkeypatch):
    quick(monkeypatch)
    job = service.jobs.submit("noop", {})

    async def listen(path, *said):
        async with websockets.connect(f"ws{address[4:]}{path}") as socket:
            for one in said:
                await socket.send(json.dumps(one))
            assert json.loads(await socket.recv())["type"] == "queued"
            service.jobs.cancel(job.id)
            service.jobs.delete(job.id)
            return await heard(socket)
    with served(service) as address:
        found, code, reason = asyncio.run(listen(f"/v1/jobs/{job.id}/ws"))
        assert (found[-1]["type"], found[-1]["job"], code) == ("deleted", job.id, 4404) and job.id in reason
        gone, job = job, service.jobs.submit("noop", {})
        monkeypatch.setitem(progress.Talk.__init__.__kwdefaults__, "silent", 2.0)
        found, code, _ = asyncio.run(listen("/v1/ws", {"subscribe": [{"job": job.id}]}))  # it may yet ask for other jobs, until it says nothing any more
        assert code == 1000 and [m["job"] for m in found if m["type"] == "deleted"] == [job.id]
        with pytest.raises(websockets.ConnectionClosed) as err:
            asyncio.run(listen(f"/v1/jobs/{gone.id}/ws"))
        assert err.value.rcvd.code == 4404


def test_a_websocket_on_a_job_of_which_all_is_told_ends(service):
    job = service.jobs.submit("noop", {})
    finish(service)
    last = service.jobs.events(job.id)[-1].seq

    async def listen():
        async with websockets.connect(f"ws{address[4:]}/v1/jobs/{job.id}/ws?after={last}") as socket:
            return await heard(socket)
    with served(service) as address:
        assert asyncio.run(listen()) == ([], 1000, "the job has ended")


def test_a_number_no_event_has_yet_is_the_last_one_there_is(service):
    "Who comes back with a number of another life hears all that is new, and the end."
    job, other = (service.jobs.submit("noop", {}) for _ in range(2))

    async def listen(address):
        async with websockets.connect(f"ws{address[4:]}/v1/jobs/{job.id}/ws?after=500") as socket, httpx.AsyncClient(timeout=20) as http:
            headers = {"accept": "text/event-stream"}
            async with (http.stream("GET", f"{address}/v1/jobs/{job.id}/events", headers=headers | {"Last-Event-ID": "500"}) as one,
                        http.stream("GET", f"{address}/v1/events?jobs={job.id},{other.id}", headers=headers | {"Last-Event-ID": "500,500"}) as both):
                words = both.aiter_lines()
                assert await anext(words) == "retry: 3000"
                await asyncio.to_thread(finish, service)
                found, code, reason = await heard(socket)
                ids = [line[4:] async for line in one.aiter_lines() if line.startswith("id: ")]
                async for line in words:
                    if line.startswith("id: "):
                        return [m["type"] for m in found], code, reason, ids, line[4:]
    with served(service) as address:
        types, code, reason, ids, first = asyncio.run(asyncio.wait_for(listen(address), 30))
    seqs = [e.seq for e in service.jobs.events(job.id)]
    assert (types[-1], code, reason) == ("succeeded", 1000, "the job has ended") and ids == [str(n) for n in seqs[1:]] and first == "2,1"


@pytest.mark.parametrize("name", ["\ud800", "\U0001f600" * 40, "job_" + "x" * 200, "\0", "'; --"])
def test_a_name_that_is_none_is_not_told_back(service, name):
    async def talk(address):
        async with websockets.connect(f"ws{address[4:]}/v1/ws") as socket:
            await socket.send(json.dumps({"subscribe": [{"job": name}]}))
            return await heard(socket)
    with served(service) as address:
        assert asyncio.run(talk(address)) == ([], 4404, "there is no such job")


def test_a_reason_fits_into_a_close_frame():
    said = str(progress.Closing(1000, "…" * 100 + "\ud800"))
    assert said == "…" * 41 and len(said.encode()) == 123


def test_who_joins_while_the_table_is_read_is_not_told_of_a_deleted_job(service, monkeypatch):
    one, two = (service.jobs.submit("noop", {}) for _ in range(2))
    latest, asked = service.jobs.latest, []

    def slow(ids):
        found = latest(ids)
        if ids == [one.id] and asked:
            time.sleep(0.5)
        asked.append(ids)
        return found
    monkeypatch.setattr(service.jobs, "latest", slow)

    async def listen():
        first, second = service.hub.reader(), service.hub.reader()
        await first.add(one.id)
        await asyncio.sleep(0.2)
        await second.add(two.id)
        await second.next(1)
        await second.next(1)
        gone = second.gone
        for reader in (first, second):
            reader.close()
        return gone
    assert asyncio.run(listen()) == []


@pytest.mark.parametrize("way", ["revoked", "expired", "first key"])
def test_who_may_not_listen_any_more_is_cut_at_the_next_heartbeat(service, monkeypatch, way):
    quick(monkeypatch)
    text, key = ("", None) if way == "first key" else service.keys.create("ada", expires_in=1.5 if way == "expired" else None)
    job = service.jobs.submit("noop", {}, owner="ada" if key else "")
    head = {"Authorization": f"Bearer {text}"} if key else {}

    async def by_websocket(path):
        async with websockets.connect(f"ws{address[4:]}{path}", additional_headers=head) as socket:
            await socket.send(json.dumps({"subscribe": [{"job": job.id}]}))
            assert json.loads(await socket.recv())["type"] == "queued"
            return await heard(socket)

    async def by_sse():
        async with httpx.AsyncClient(timeout=30) as http, http.stream("GET", f"{address}/v1/jobs/{job.id}/events", headers={"Accept": "text/event-stream", **head}) as answer:
            return "".join([piece async for piece in answer.aiter_text()])

    async def all_of_them():
        tasks = [asyncio.create_task(one) for one in (by_websocket("/v1/ws"), by_websocket(f"/v1/jobs/{job.id}/ws"), by_sse())]
        await asyncio.sleep(1)
        assert not any(t.done() for t in tasks)
        if way != "expired":
            service.keys.revoke(key.id) if key else service.keys.create("eve")
        return await asyncio.wait_for(asyncio.gather(*tasks), 30)
    with served(service) as address:
        *sockets, stream = asyncio.run(all_of_them())
        assert [(code, reason) for _, code, reason in sockets] == [(1008, progress.REVOKED)] * 2
        told = list(parse(stream))
        assert told[-1][1] == "closed" and told[-1][2]["reason"] == progress.REVOKED and told[-1][0] is None
        assert httpx.get(f"{address}/v1/jobs/{job.id}/events", headers=head).status_code == 401
    assert service.hub.readers == 0


def test_a_database_that_is_away_cuts_nobody(service, monkeypatch):
    from vidgen.serve.auth import Caller
    from vidgen.serve.records import Unavailable

    def away(*_):
        raise Unavailable("restarting")
    monkeypatch.setattr(service.keys, "_row", away)
    assert service.still(Caller("ada", "abcdefgh"))


def test_a_reader_that_is_told_to_stop_at_the_moment_of_news_stops(service):
    "Else the close of a WebSocket would wait for a task that goes on for ever."
    job = service.jobs.submit("noop", {})

    async def stopped(ticks):
        reader = service.hub.reader()
        await reader.add(job.id, after=1)
        task = asyncio.create_task(reader.next(2))
        await asyncio.sleep(0.1)
        reader.wake.set()
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=1)
        reader.close()
        return task.cancelled()

    async def all_of_them():
        return [await stopped(ticks) for ticks in range(4)]
    assert all(asyncio.run(all_of_them()))


def test_heartbeats_have_no_id_and_pings_are_comments(service, monkeypatch):
    job = service.jobs.submit("noop", {})

    async def listen():
        parts, stream = [], progress.sse(service.hub, [job.id], [0], heartbeat=0.3, ping=0.1)
        async for part in stream:
            parts.append(part.decode())
            if sum("heartbeat" in p for p in parts) == 2:
                await stream.aclose()
                return parts
    parts = asyncio.run(listen())
    beats = [p for p in parts if "heartbeat" in p]
    assert not any(p.startswith("id:") for p in beats) and any(p == ": ping\n\n" for p in parts) and service.hub.readers == 0
    assert progress.HEARTBEAT == 30 and progress.PING == 15 and progress.SILENT == 90


async def sse_client(address, job, seen, rng):
    "Read a job's events to the end, dropping the connection at random; `seen` gets (seq, type)."
    last, stop = seen[-1][0] if seen else 0, False
    async with httpx.AsyncClient(timeout=30) as http:
        while not stop:
            drop = rng.randint(1, 6)
            async with http.stream("GET", f"{address}/v1/jobs/{job}/events", headers={"Accept": "text/event-stream", "Last-Event-ID": str(last)}) as answer:
                if answer.status_code == 204:
                    return
                text = ""
                async for piece in answer.aiter_text():
                    text += piece
                    found = [(int(i), e) for i, e, _ in parse(text) if i]
                    if len(found) >= drop:
                        break
            found = found[:drop]
            seen += found
            last = found[-1][0] if found else last
            stop = bool(found) and found[-1][1] in progress.ENDED


async def ws_client(address, job, seen, rng):
    last, stop = seen[-1][0] if seen else 0, False
    while not stop:
        drop = rng.randint(1, 6)
        async with websockets.connect(f"ws{address[4:]}/v1/ws") as socket:
            await socket.send(json.dumps({"subscribe": [{"job": job, "after": last}]}))
            for _ in range(drop):
                said = json.loads(await socket.recv())
                if said["type"] != "heartbeat":
                    seen.append((said["seq"], said["type"]))
                    last = said["seq"]
                    stop = said["type"] in progress.ENDED
                    if stop:
                        break


async def crowd(service, addresses, sse, ws, steps, pause):
    "Many clients that come and go, over one or several servers, while a job goes on."
    job = service.jobs.submit("noop", {})
    rng, seen = random.Random(7), [[] for _ in range(sse + ws)]
    kinds = [sse_client] * sse + [ws_client] * ws
    tasks = [asyncio.create_task(kind(addresses[i % len(addresses)], job.id, seen[i], random.Random(i))) for i, kind in enumerate(kinds)]

    def work():
        claim = take(service)
        for i in range(steps):
            claim.event("progress", {"progress": 100 * i / steps})
            time.sleep(pause * rng.random())
        (claim.staging / "video.mp4").write_bytes(b"x")
        claim.publish([claim.staging / "video.mp4"], {"video": "video.mp4"})
    await asyncio.to_thread(work)
    await asyncio.wait_for(asyncio.gather(*tasks), 500)
    rows = [(e.seq, e.kind) for e in service.jobs.events(job.id)]
    assert [r[0] for r in rows] == list(range(1, steps + 4))
    for one in seen:
        assert list(dict.fromkeys(one)) == rows


def test_clients_that_come_and_go_see_every_event_in_order(service, caplog):
    "R13, short; and somebody who leaves is no error."
    with served(service) as address:
        asyncio.run(crowd(service, [address], sse=8, ws=4, steps=12, pause=0.1))
    assert not [r for r in caplog.records if r.name.startswith("vidgen") and r.levelname == "ERROR"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_crowd_over_two_servers_sees_every_event_in_order(service, opened):
    "R13: 200 and 50 clients; the API is two servers over one table."
    other = opened(serve_requests_per_minute=1_000_000)
    with served(service) as one, served(other) as two:
        asyncio.run(crowd(service, [one, two], sse=200, ws=50, steps=60, pause=0.5))


def test_a_slow_reader_is_cut_and_costs_no_memory(service, monkeypatch):
    "R14: it takes nothing; the server lets go of it while others read on."
    import socket

    from vidgen.serve import guard

    monkeypatch.setattr(guard.Rules.__init__, "__defaults__", (*guard.Rules.__init__.__defaults__[:-1], 0.5))  # send_seconds
    job = service.jobs.submit("noop", {})
    claim = take(service)
    with served(service) as address:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", int(address.rsplit(":", 1)[1])))
        slow.sendall(f"GET /v1/jobs/{job.id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n".encode())
        until = time.monotonic() + 30
        while service.hub.readers == 0 and time.monotonic() < until:
            time.sleep(0.05)
        assert service.hub.readers == 1
        while service.hub.readers and time.monotonic() < until:
            claim.event("progress", {"message": "x" * 500_000})
        assert service.hub.readers == 0
        slow.close()
        assert httpx.get(f"{address}/v1/jobs/{job.id}").json()["state"] == "running"


def test_a_websocket_that_takes_nothing_is_closed_with_1013(service):
    job = service.jobs.submit("noop", {})

    async def stuck():
        async def receive():
            await asyncio.sleep(60)

        async def send(message):
            await asyncio.sleep(60)
        return await progress.Talk(service.hub, receive, send, lambda name: True, slow=0.2).run([{"job": job.id, "after": 0}])
    assert asyncio.run(stuck())[0] == 1013


def test_websocket_codes(service):
    mine = service.jobs.submit("noop", {}, owner="ada")
    theirs = service.jobs.submit("noop", {}, owner="eve")
    key, _ = service.keys.create("ada")

    async def talk(*said, path="/v1/ws", **headers):
        async with websockets.connect(f"ws{address[4:]}{path}", additional_headers=headers) as socket:
            for one in said:
                await socket.send(json.dumps(one) if not isinstance(one, str) else one)
            try:
                heard = json.loads(await asyncio.wait_for(socket.recv(), 5))
                return heard["type"], heard.get("seq")
            except websockets.ConnectionClosed as err:
                return err.rcvd.code
    with served(service) as address:
        run = lambda *a, **k: asyncio.run(talk(*a, **k))  # noqa: E731
        login = {"key": key}
        assert run(login, {"subscribe": [{"job": mine.id}]}) == ("queued", 1)
        assert run({"subscribe": [{"job": mine.id}]}, Authorization=f"Bearer {key}") == ("queued", 1)
        assert run(path=f"/v1/jobs/{mine.id}/ws", Authorization=f"Bearer {key}") == ("queued", 1)
        assert run(login, {"subscribe": [{"job": theirs.id}]}) == 4404
        assert run({"subscribe": [{"job": mine.id}]}) == 4401 and run({"key": "vg_wrong"}) == 4401
        assert run(login, "nonsense") == 4400 and run(login, {"subscribe": [{"job": mine.id, "after": -1}]}) == 4400
        with pytest.raises(websockets.InvalidStatus):
            run(login, Origin="http://evil.example")


def test_streams_take_a_ticket_instead_of_a_key(service):
    from vidgen.serve import auth

    job = service.jobs.submit("noop", {}, owner="ada")
    finish(service)
    text, key = service.keys.create("ada")
    http, path = client(service), f"/v1/jobs/{job.id}/events"
    url = http.post("/v1/tickets", params={"path": path}, headers={"Authorization": f"Bearer {text}"}).json()["url"]
    assert http.get(url, headers={"Accept": "text/event-stream"}).status_code == 200
    assert http.get(f"/v1/jobs/{job.id}?{url.split('?')[1]}").status_code == 401
    assert http.post(f"/v1/jobs/{job.id}/cancel", params={"ticket": auth.ticket(service.keys, key, f"/v1/jobs/{job.id}/cancel")}).status_code == 403


def test_the_prompt_is_in_no_event(service):
    http = client(service)
    job = http.post("/v1/jobs", json={"spec": {"prompt": PROMPT}}).json()
    finish(service)
    assert PROMPT not in http.get(job["links"]["events"]).text


@pytest.mark.services
def test_redis_brings_news_at_once_and_its_death_is_survived(opened, redis_server):
    service = opened(database_redis=redis_server.url)
    service.hub = Hub(service.jobs, every=20, news=service.bell.news)
    job = service.jobs.submit("noop", {})
    claim = take(service)

    async def listen():
        reader = service.hub.reader()
        await reader.add(job.id)
        await reader.next(5)
        await asyncio.sleep(1)  # until the listener has subscribed
        start = time.monotonic()
        await asyncio.to_thread(claim.event, "progress", {"progress": 10})
        found = await reader.next(15)
        soon = time.monotonic() - start
        redis_server.kill()
        service.hub.every = 0.1
        service.hub.ring()
        await asyncio.to_thread(claim.event, "progress", {"progress": 20})
        later = await reader.next(15)
        reader.close()
        return [e.body for e in found], soon, [e.body for e in later]
    found, soon, later = asyncio.run(listen())
    assert found == [{"progress": 10}] and later == [{"progress": 20}] and soon < 10  # and not the 20 s of the next look
    http = client(service)
    assert http.post("/v1/jobs", json={"spec": {"prompt": PROMPT}}).status_code == 202
