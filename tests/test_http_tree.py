"""The tree of processes: API processes that are killed, the command line, load."""
import asyncio
import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from load import Load
from serving import PROMPT, opened, record, served, settings, take
from test_http_streams import sse_client, ws_client

httpx = pytest.importorskip("httpx")
websockets = pytest.importorskip("websockets")
from vidgen.serve import command  # noqa: E402
from vidgen.serve.records import ENDED  # noqa: E402


@contextlib.contextmanager
def tree(folder, count=1, database=None, **values):
    "API processes over the tables in a folder, or in another database; yields (address, Answering, Service)."
    said = dict(storage_root=folder / "artifacts", database_url=database or f"sqlite:///{folder}/vidgen.db", serve_logs=folder / "logs", **values)
    service, environ = opened(folder, **said), dict(os.environ)
    command.spread(settings(folder, **said), {}, environ)
    sock = command.listen("127.0.0.1", 0)
    made = command.Answering(sock, count, env=environ)
    made.start()
    address = command.address(*sock.getsockname())
    assert httpx.get(f"{address}/health/live", timeout=60).status_code == 200
    try:
        yield address, made, service
    finally:
        made.stop()
        sock.close()
        service.jobs.close()


def silent(address, said=b"GET / HTTP/1.1\r\nHost: localh"):
    "A connection on which a client has said half a header."
    host, port = address.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=10)
    made.sendall(said)
    return made


def closed(sock, seconds=10):
    "Does the other side close within so many seconds?"
    sock.settimeout(seconds)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


PROTOCOLS = ["httptools_impl.HttpToolsProtocol", "h11_impl.H11Protocol"]


def protocol(name):
    return getattr(importlib.import_module(f"uvicorn.protocols.http.{name.split('.')[0]}"), name.split(".")[1])


@pytest.mark.parametrize("base", PROTOCOLS)
def test_half_a_header_is_not_waited_for_and_all_else_is(service, base):
    "A first header and a later one have their time; streams, WebSockets and slow bodies take as long as they like."
    job = service.jobs.submit("noop", {})
    with served(service, http=command.patient(protocol(base), 0.6, 1000)) as address:
        host = address.removeprefix("http://")
        stream = silent(address, f"GET /v1/jobs/{job.id}/events HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n\r\n".encode())
        body = json.dumps({"kind": "noop", "spec": {}}).encode()
        slow = silent(address, f"POST /v1/jobs HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        half, nothing = silent(address), silent(address, b"")
        later = silent(address, f"GET /health/live HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert later.recv(4096).startswith(b"HTTP/1.1 200")
        later.sendall(b"GET /health/live HTT")

        async def talk():
            async with websockets.connect(f"ws{address[4:]}/v1/jobs/{job.id}/ws") as one:
                assert json.loads(await one.recv())["type"] == "queued"
                assert all([await asyncio.to_thread(closed, s) for s in (half, nothing, later)])
                await asyncio.sleep(1)
                slow.sendall(body[:5])
                service.jobs.cancel(job.id)
                return [json.loads(m)["type"] async for m in one]
        assert asyncio.run(talk())[-1] == "canceled"
        slow.sendall(body[5:])
        assert slow.recv(4096).startswith(b"HTTP/1.1 202")
        said = b""
        while b"event: canceled" not in said:
            assert (more := stream.recv(65536)), said
            said += more


@pytest.mark.parametrize("base", PROTOCOLS)
def test_silent_connections_make_room(service, base):
    "Of too many connections the one goes that was silent longest, and not one that is being answered."
    job = service.jobs.submit("noop", {})
    with served(service, http=command.patient(protocol(base), 60, 8)) as address:
        stream = silent(address, f"GET /v1/jobs/{job.id}/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode())
        assert stream.recv(4096).startswith(b"HTTP/1.1 200")
        many = [silent(address) for _ in range(30)]
        assert httpx.get(f"{address}/health/live", timeout=10).status_code == 200
        assert all(closed(s) for s in many[:20]) and not closed(many[-1], 0.2) and not closed(stream.dup(), 0.2)


def test_a_full_house_still_tells_how_it_is(database, tmp_path):
    "Requests that are open beyond the most are refused, but for those that ask how the service is."
    service = opened(tmp_path, database_url=database, serve_connections=8)
    job = service.jobs.submit("noop", {})
    with served(service) as address:
        streams = [silent(address, f"GET /v1/jobs/{job.id}/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode()) for _ in range(8)]
        assert all(s.recv(4096).startswith(b"HTTP/1.1 200") for s in streams)
        full = httpx.get(f"{address}/v1/jobs")
        assert (full.status_code, full.json()["code"], full.headers["retry-after"]) == (503, "service_busy", "1") and httpx.get(f"{address}/health/live").status_code == 200
        streams.pop().close()
        for _ in range(100):
            if (status := httpx.get(f"{address}/v1/jobs").status_code) == 200:
                break
            time.sleep(0.05)
        assert status == 200


@pytest.mark.timeout(120)
def test_more_silent_connections_than_files_may_be_open(tmp_path):
    "An API process that may open 200 files, as little as `ulimit -n 200` allows, answers with 300 half requests before it."
    script = (f"import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); sys.path[:0] = {[str(Path(__file__).parent)]!r}\n"
              f"from pathlib import Path; from test_http_tree import tree, silent; import httpx\n"
              f"with tree(Path({str(tmp_path)!r})) as (address, *_):\n    print(address, flush=True); input()\n")
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address = child.stdout.readline().strip()
        many = [silent(address) for _ in range(300)]
        said = [httpx.get(f"{address}/health/live", timeout=20).status_code for _ in range(5)]
        assert said == [200] * 5 and len(many) == 300
    finally:
        child.communicate("\n", timeout=60)


LIMITS = dict(serve_requests_per_minute=10_000_000, serve_queued_per_key=10_000_000, serve_queued=10_000_000)


def killed_under_submits(folder, database, submits, threads, every):
    "R3: clients submit while API processes are killed; returns how many kills there were."
    answered, unanswered, lock, done = {}, [], threading.Lock(), threading.Event()
    with tree(folder, 2, database, **LIMITS) as (address, processes, service):
        def client(numbers):
            with httpx.Client(base_url=address, timeout=30) as http:
                for n in numbers:
                    key = f"key-{n}"
                    try:
                        said = http.post("/v1/jobs", json={"kind": "noop", "spec": {}}, headers={"Idempotency-Key": key})
                        with lock:
                            if said.status_code == 202:
                                answered[key] = said.json()["id"]
                            else:
                                unanswered.append(key)
                    except httpx.HTTPError:
                        with lock:
                            unanswered.append(key)

        kills = 0

        def killer():
            nonlocal kills
            rng, last = random.Random(7), 0
            while not done.wait(0.01):
                if len(answered) >= last + every:  # by what was answered, not by time: a slow machine gets somewhere too
                    last = len(answered)
                    rng.choice(list(processes.processes.values())).kill()
                    kills += 1
        workers = [threading.Thread(target=client, args=(range(i, submits, threads),)) for i in range(threads)]
        assassin = threading.Thread(target=killer)
        for t in (*workers, assassin):
            t.start()
        for t in workers:
            t.join()
        done.set()
        assassin.join()
        rows = {j.id for j in everything(service)}
        assert set(answered.values()) <= rows and len(set(answered.values())) == len(answered)
        for _ in range(200):  # until both answer again
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{address}/health/ready", timeout=5).status_code == 200:
                    break
            time.sleep(0.1)
        with httpx.Client(base_url=address, timeout=30, transport=httpx.HTTPTransport(retries=5)) as http:
            for key in unanswered:
                said = http.post("/v1/jobs", json={"kind": "noop", "spec": {}}, headers={"Idempotency-Key": key})
                assert said.status_code == 202 and said.json()["repeated"] == (said.json()["id"] in rows)
            for key, job in list(answered.items())[:50]:
                assert http.post("/v1/jobs", json={"kind": "noop", "spec": {}}, headers={"Idempotency-Key": key}).json()["id"] == job
        assert len(everything(service)) == submits
    return kills


def everything(service):
    found, after = [], None
    while page := service.jobs.list(after=after, limit=1000):
        found, after = found + page, page[-1].id
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_api_processes_killed_under_a_thousand_submits(database, tmp_path):
    "R3: every 2xx answer has a row; every row without an answer is found again by its key."
    kills = killed_under_submits(tmp_path, database, 1000, 8, 60)
    record("R3", database=database.partition(":")[0], submits=1000, kills=kills, lost=0)
    assert kills >= 10


@pytest.mark.timeout(120)
def test_an_api_process_killed_under_submits(database, tmp_path):
    assert killed_under_submits(tmp_path, database, 40, 3, 12) >= 2


# R13 with an API that is killed

async def stubborn(kind, address, job, seen, rng):
    "A client that comes back whatever happens, and says how far it got."
    while not (seen and seen[-1][1] in ENDED):
        try:
            return await kind(address, job, seen, rng)
        except (httpx.HTTPError, websockets.WebSocketException, OSError, EOFError):
            await asyncio.sleep(0.05)


async def watched(address, service, processes, sse, ws, steps, pause, kills):
    "Clients follow a job while it goes on and API processes are killed; each must have seen every event, in order."
    job, rng, seen, done = service.jobs.submit("noop", {}), random.Random(7), [[] for _ in range(sse + ws)], []
    clients = [asyncio.create_task(stubborn(sse_client if i < sse else ws_client, address, job.id, one, random.Random(i))) for i, one in enumerate(seen)]

    def work():
        claim = take(service)
        for i in range(steps):
            claim.event("progress", {"progress": 100 * i / steps})
            time.sleep(2 * pause * rng.random())
            if len(done) < kills and i >= (len(done) + 1) * steps // (kills + 1):
                done.append(rng.choice(list(processes.processes.values())).kill())
        claim.publish([], {})
    await asyncio.to_thread(work)
    await asyncio.wait_for(asyncio.gather(*clients), 500)
    rows = [(e.seq, e.kind) for e in service.jobs.events(job.id)]
    assert [seq for seq, _ in rows] == list(range(1, steps + 4)) and len(done) == kills
    for one in seen:
        assert [seq for seq, _ in one] == sorted(seq for seq, _ in one), "events come in order, over all connections of a client"
        assert list(dict.fromkeys(one)) == rows


@pytest.mark.timeout(120)
def test_clients_outlive_the_api_and_miss_nothing(tmp_path):
    with tree(tmp_path, 2, **LIMITS) as (address, processes, service):
        asyncio.run(watched(address, service, processes, sse=4, ws=2, steps=16, pause=0.15, kills=2))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_crowd_outlives_the_api_and_misses_nothing(tmp_path):
    "R13: 200 clients by SSE and 50 by WebSocket come and go while the API is killed and started again."
    with tree(tmp_path, 2, **LIMITS) as (address, processes, service):
        asyncio.run(watched(address, service, processes, sse=200, ws=50, steps=70, pause=0.8, kills=6))
    record("R13", sse=200, websockets=50, events=73, kills=6, missed=0)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_quiet_stream_is_heard_from_every_half_minute(tmp_path):
    "R13: no gap between heartbeats is longer than 31 s."
    with tree(tmp_path, 1, **LIMITS) as (address, _, service):
        job, beats = service.jobs.submit("noop", {}), [time.monotonic()]
        with httpx.stream("GET", f"{address}/v1/jobs/{job.id}/events", headers={"Accept": "text/event-stream"}, timeout=40) as said:
            for line in said.iter_lines():
                if line == "event: heartbeat":
                    beats.append(time.monotonic())
                if len(beats) == 4:
                    break
    gaps = [b - a for a, b in zip(beats, beats[1:])]
    record("R13 heartbeat", gaps_seconds=[round(g, 2) for g in gaps])
    assert max(gaps) <= 31


# R17

SECONDS = float(os.environ.get("VIDGEN_TEST_SECONDS", 600))  # how long the long form loads the service: 120 and 600 are the two that are reported


def loaded(folder, seconds, *rates):
    "Load one API process with submits, reads and pages a second; returns what was measured."
    import psutil

    with tree(folder, 1, **LIMITS) as (address, processes, service):
        process = psutil.Process(processes.processes[0].pid)
        Load(address, *rates).run(min(5, seconds))  # what is made once is made
        before, spent = process.memory_info().rss, sum(process.cpu_times()[:2])
        load = Load(address, *rates).run(seconds)
        grown, spent = (process.memory_info().rss - before) / 1e6, sum(process.cpu_times()[:2]) - spent
        assert len(load.ids) == len(set(load.ids)) == load.facts()["submit"]["count"] <= len(everything(service))
    return load.facts() | {"seconds": seconds, "per_second": rates, "grown_mb": round(grown, 1), "cpu_share": round(spent / seconds, 3), "first_errors": load.errors[:3]}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_load_leaves_no_error_and_little_memory(tmp_path):
    "R17: the bars on time are for a quiet machine and are read off the record; those on errors and memory hold everywhere."
    found = loaded(tmp_path, SECONDS, 50, 180, 20)
    record("R17", **found)
    assert not found["errors"] and found["grown_mb"] < 50


def test_a_little_load_leaves_no_error(tmp_path):
    found = loaded(tmp_path, 2, 10, 36, 4)
    assert not found["errors"] and (found["submit"]["count"], found["status"]["count"] + found["list"]["count"]) == (20, 80), found


def test_children_stop_when_the_parent_is_gone(tmp_path):
    code = f"""
import os, sys, time
sys.path.insert(0, {str(os.path.dirname(__file__))!r})
from pathlib import Path
from test_http_tree import tree
with tree(Path({str(tmp_path)!r})) as (address, made, _):
    print(made.processes[0].pid, flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the API process outlived its parent")


# the command line

def run(folder, *words):
    from vidgen.cli import main

    out, err = __import__("io").StringIO(), __import__("io").StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(words))
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def house(tmp_path):
    settings(tmp_path)
    return tmp_path


def test_keys_are_made_listed_and_ended(house):
    status, out, err = run(house, "keys", "create", "ada", "--days", "90", "--scopes", "read")
    text = out.strip()
    assert status == 0 and text.startswith("vg_") and "only time" in err
    rows = json.loads(run(house, "keys", "list", "--json")[1])
    assert [(r["owner"], r["scopes"], r["state"]) for r in rows] == [("ada", "read", "good")] and text.rsplit("_", 1)[0] not in json.dumps(rows)[10:] or rows[0]["key"] == text[3:11]
    assert run(house, "keys", "revoke", rows[0]["key"])[0] == 0 and json.loads(run(house, "keys", "list", "--json")[1])[0]["state"] == "revoked"
    for wrong in (("keys", "create", "ada", "--scopes", "reed"), ("keys", "create", "a b"), ("keys", "revoke", "zzzzzzzz"), ("keys", "create", "ada", "--days", "0")):
        status, _, err = run(house, *wrong)
        assert status == 2 and "Traceback" not in err, wrong


def test_ending_a_key_shows_no_secret_and_says_when_it_has_ended(house):
    text = run(house, "keys", "create", "ada")[1].strip()
    assert run(house, "keys", "revoke", text)[1] == f"{text[3:11]} is revoked\n"
    assert "revoked already" in run(house, "keys", "revoke", text)[2]
    assert "unknown key 'zzzzzzzz'" in (said := run(house, "keys", "revoke", "zzzzzzzz")[2]) and "no key yet" not in said


def test_keys_and_jobs_of_another_database(house):
    other = ("--database", f"sqlite:///{house / 'other.db'}")
    assert run(house, "keys", "create", "ada", *other)[0] == 0
    assert "no keys" in run(house, "keys", "list")[1] and "ada" in run(house, "keys", "list", *other)[1]
    service = opened(house)
    job = service.jobs.submit("noop", {"prompt": PROMPT}, owner="ada")
    service.jobs.close()
    assert job.id in run(house, "jobs", "list")[1] and "no jobs" in run(house, "jobs", "list", *other)[1]
    assert run(house, "jobs", "show", job.id)[0] == 0 and run(house, "jobs", "show", job.id, *other)[0] == 2
    assert run(house, "jobs", "cancel", job.id, *other)[0] == 2 and run(house, "jobs", "cancel", job.id)[0] == 0


def test_jobs_are_listed_shown_canceled_and_asked_again(house):
    service = opened(house)
    job = service.jobs.submit("noop", {"prompt": PROMPT}, owner="ada")
    service.jobs.close()
    assert PROMPT[:20] in run(house, "jobs", "list")[1] and json.loads(run(house, "jobs", "show", job.id)[1])["events"][0]["kind"] == "queued"
    assert run(house, "jobs", "cancel", job.id)[1] == f"{job.id} canceled\n"
    again = run(house, "jobs", "retry", job.id)[1]
    assert again.startswith(f"{job.id} → job_")
    assert "no jobs" in run(house, "jobs", "list", "--state", "failed")[1] and len(json.loads(run(house, "jobs", "list", "--json")[1])) == 2
    for wrong in (("jobs", "show", "job_none"), ("jobs", "cancel", "job_none"), ("jobs", "retry", again.split()[-1]), ("jobs", "list", "--state", "done")):
        status, _, err = run(house, *wrong)
        assert status == 2 and "not foreseen" not in err, (wrong, err)


def test_files_without_a_job_are_listed_and_removed(house):
    stray = house / "artifacts/videos/stray.mp4"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"x")
    assert "stray.mp4" in run(house, "jobs", "orphans")[1] and stray.exists()
    assert run(house, "jobs", "orphans", "--delete")[0] == 0 and not stray.exists()


def test_files_of_another_database_are_not_removed(house):
    folder = house / "artifacts"
    (folder / "videos").mkdir(parents=True)
    (folder / "videos/stray.mp4").write_bytes(b"x")
    (folder / "vidgen-files").write_text("files_of_another_database")
    status, _, err = run(house, "jobs", "orphans", "--delete")
    assert status == 2 and "not where this database keeps its files" in err and (folder / "videos/stray.mp4").exists()
    assert "stray.mp4" in run(house, "jobs", "orphans")[1]


@pytest.mark.parametrize(("host", "keys", "open_", "starts"), [
    ("127.0.0.1", False, False, True), ("::1", False, False, True), ("localhost", False, False, True), ("127.0.0.5", False, False, True), ("0.0.0.0", False, False, False), ("192.168.1.5", False, False, False),
    ("0.0.0.0", True, False, True), ("0.0.0.0", False, True, True), ("example.org", False, False, False)])
def test_no_start_beyond_this_machine_without_a_key(host, keys, open_, starts):
    from dataclasses import replace

    from vidgen.settings import Serve

    serve = replace(Serve(), host=host, open=open_)
    if starts:
        assert bool(command.may_start(serve, keys)) == (not keys)
    else:
        with pytest.raises(ValueError, match="no key"):
            command.may_start(serve, keys)


def test_serve_refuses_before_it_starts_anything(house):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words, says in ((("--host", "0.0.0.0"), "no key"), (("--port", str(taken.getsockname()[1])), "can't listen"), (("--models", "shapes-t2w"), "nearest: shapes-t2v"), (("--config", "no.ini"), "not there")):
            done = subprocess.run([sys.executable, "-c", "import sys; from vidgen.cli import main; sys.exit(main(sys.argv[1:]))", "serve", *words], cwd=house, capture_output=True, text=True, timeout=100)
            assert done.returncode == 2 and says in done.stderr, (words, done.stderr)


VIDGEN = [sys.executable, "-c", "import sys; from vidgen.cli import main; sys.exit(main(sys.argv[1:]))"]
JUNK = b"\x5a" * 4096


def damage(file, first, last=None):
    "Overwrite pages of a database, as a failing disk does."
    with open(file, "r+b") as f:
        count = file.stat().st_size // len(JUNK)
        for n in range(first, count if last is None else last):
            f.seek(n * len(JUNK))
            f.write(JUNK)


@pytest.mark.parametrize("pages", [(0, 1), (2, None), (-1, None)])
def test_a_damaged_database_refuses_to_start_and_says_what_to_do(house, pages):
    service = opened(house)
    for _ in range(30):
        service.jobs.submit("noop", {"echo": "x" * 2000})
    service.jobs.close()
    file = house / "vidgen.db"
    first = pages[0] if pages[0] >= 0 else file.stat().st_size // len(JUNK) - 1  # the last page alone: found by the check and by nothing else
    damage(file, first, pages[1])
    for words in (("serve", "--port", "0"), *([("jobs", "list")] if pages[0] == 0 else [])):
        done = subprocess.run([*VIDGEN, *words], cwd=house, capture_output=True, text=True, timeout=100)
        assert done.returncode in (1, 2) and "damaged" in done.stderr and "backup" in done.stderr and "foreseen" not in done.stderr, done.stderr


@contextlib.contextmanager
def serving(folder):
    "`vidgen serve` with one worker; yields (process, address)."
    process = subprocess.Popen([*VIDGEN, "serve", "--port", "0", "--workers", "1", "--models", ""], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process, process.stdout.readline().split()[3].rstrip(",")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def eventually(find, seconds=60):
    "What `find()` returns once it is something."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError, httpx.HTTPError):
            if found := find():
                return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def test_a_service_logs_dead_workers_and_outlives_its_database(tmp_path):
    settings(tmp_path, serve_logs="logs")
    rows = lambda name, words: [r for line in (tmp_path / "logs" / name).read_text().splitlines() if words in (r := json.loads(line))["message"]]  # noqa: E731
    with serving(tmp_path) as (process, address):
        (born,) = eventually(lambda: rows("serve.service.log", "worker started"))
        assert eventually(lambda: httpx.get(f"{address}/health").json()["workers"]) == 1 and httpx.get(f"{address}/health").json()["device"] in ("cpu", "cuda:0")
        os.kill(int(born["message"].split()[-1]), signal.SIGKILL)
        (died,) = eventually(lambda: rows("serve.errors.log", "worker died"))
        assert died["message"] == "worker died by SIGKILL, holding no job" and died["worker"] == born["worker"]
        for name in ("vidgen.db", "vidgen.db-wal"):
            damage(tmp_path / name, 0)
        eventually(lambda: httpx.get(f"{address}/health/ready").status_code == 503)
        refused = httpx.post(f"{address}/v1/jobs", json={"kind": "noop", "spec": {}})
        assert refused.status_code == 503 and "damaged" in refused.json()["detail"] and httpx.get(f"{address}/health/live").status_code == 200
        assert process.poll() is None


def zips(folder, megabytes, clients):
    "R18: a batch of eight sparse films of so many MB, fetched by clients of whom half give up; returns how much memory the server gained, in MB."
    import zipfile

    import psutil

    with tree(folder, 1, **LIMITS) as (address, processes, service):
        for i in range(8):
            service.jobs.submit("noop", {"prompt": PROMPT, "n": i}, batch="batch_of_eight")
            claim = service.jobs.claim("worker-test")
            with (claim.staging / "video.mp4").open("wb") as film:
                film.truncate(megabytes * 10**6)
            claim.publish([claim.staging / "video.mp4"], {"video": "video.mp4"})
        process = psutil.Process(processes.processes[0].pid)
        httpx.get(f"{address}/health", timeout=60)
        before, most, got = process.memory_info().rss, 0, []

        def fetch(n):
            path = folder / f"{n}.zip"
            with httpx.stream("GET", f"{address}/v1/batches/batch_of_eight/zip", timeout=600) as said, path.open("wb") as out:
                for piece in said.iter_raw(1 << 20):
                    out.seek(len(piece), os.SEEK_CUR) if not any(piece) else out.write(piece)  # holes stay holes: twenty of them fit any disk
                    if n % 2 and out.tell() > megabytes * 3 * 10**6:
                        return
                out.truncate()
            with zipfile.ZipFile(path) as found:
                got.append((found.testzip(), len(found.namelist())))
            path.unlink()
        threads = [threading.Thread(target=fetch, args=(n,)) for n in range(clients)]
        for t in threads:
            t.start()
        while any(t.is_alive() for t in threads):
            most = max(most, process.memory_info().rss)
            time.sleep(0.05)
        assert got == [(None, 9)] * (clients // 2) and httpx.get(f"{address}/health/ready", timeout=30).status_code == 200
        assert not [p for p in (folder / "artifacts").rglob("*.zip")]
    return (most - before) / 1e6


@pytest.mark.timeout(120)
def test_a_zip_is_never_on_the_disk_nor_in_memory(tmp_path):
    assert zips(tmp_path, 8, 4) < 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_large_zips_and_half_of_them_dropped(tmp_path):
    "R18: eight films of 200 MB to twenty clients, half of whom give up."
    grown = zips(tmp_path, 200, 20)
    record("R18", films=8, film_mb=200, clients=20, dropped=10, grown_mb=round(grown, 1))
    assert grown < 100
