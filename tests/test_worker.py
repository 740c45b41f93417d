"""Workers that are killed, asleep, deaf or drained, and a supervisor that puts things right. What has `database` holds on SQLite and PostgreSQL."""
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import serve_kinds  # noqa: F401  registers the kinds
from serving import record
from test_jobs import whole

from vidgen.serve import lapse
from vidgen.serve.jobs import Jobs
from vidgen.serve.pool import Pool
from vidgen.serve.records import Unavailable
from vidgen.serve.supervisor import Slot, Supervisor, has_gpu, slots
from vidgen.serve.worker import Settings, Worker


def settings(database, root, **how):
    return Settings(database, str(root), poll=0.02, modules=("serve_kinds",), **how)


def born(database, root, name, lease):
    "A worker in a forked process: no second spent on imports. Returns its process id."
    parent = os.getpid()
    if pid := os.fork():
        return pid
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        jobs = Jobs.open(database, root, least_free_gib=0, lease=lease)
        worker = Worker(jobs, settings(database, root, name=name, parent=parent), Pool(None))
        signal.signal(signal.SIGTERM, worker.drain)
        worker.run()
    finally:
        os._exit(0)


def kill_loop(database, root, count, kills, workers, lease, seed=1, most=120):
    "Kill a random worker again and again until all jobs have ended; returns how many were killed."
    jobs, rng, alive, n, killed = Jobs.open(database, root, least_free_gib=0, lease=lease), random.Random(seed), {}, 0, 0
    made = [jobs.submit("three", {"n": i}, owner=f"o{i % 3}", key=str(i)).id for i in range(count)]
    start = time.monotonic()
    while time.monotonic() - start < most:
        while len(alive) < workers:
            n += 1
            alive[born(database, root, f"w{n}", lease)] = f"w{n}"
        time.sleep(rng.uniform(0.05, 0.3))
        states = jobs.counts()["states"]
        if states["queued"] + states["running"] == 0 and killed >= kills:
            break
        if killed < kills or rng.random() < 0.1:
            pid = rng.choice(list(alive))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed += 1
            name = alive.pop(pid)
            if rng.random() < 0.5:  # else nobody notices before the lease is over
                lapse.gone(jobs, name)
        if states["queued"] + states["running"] == 0:
            made += [jobs.submit("three", {"n": len(made) + i}).id for i in range(5)]  # more work, until enough have been killed
        jobs.reap()
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    check(jobs, made)
    jobs.close()
    return killed, len(made)


def check(jobs, made):
    "R1: none lost, none published twice, events without gaps, every file whole and right. A job may be poison: it was killed three times."
    states = whole(jobs)
    assert sum(states.values()) == len(made) and set(states) <= {"succeeded", "failed"}
    for job_id in made:
        job = jobs.get(job_id)
        kinds = [e.kind for e in jobs.events(job_id)]
        if job.state == "failed":
            assert job.error["code"] == "poison" and job.crash_count == 3
            continue
        file, = jobs.artifacts(job_id)
        i = job.spec["n"]
        assert file.path.read_text() == f"<{i}.0>|<{i}.0><{i}.1><{i}.2>"
        assert kinds.count("succeeded") == 1 and [e.body["stage"] for e in jobs.events(job_id) if e.kind == "stage"] == ["s0", "s1"], "a finished stage is not done again"


@pytest.mark.timeout(300)
def test_workers_killed_at_random_lose_nothing(database, space):
    killed, made = kill_loop(database, space / "files", count=60, kills=12, workers=3, lease=1.0)
    assert killed >= 12 and made >= 60


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_workers_killed_at_random_lose_nothing_at_length(database, tmp_path):
    killed, made = kill_loop(database, tmp_path / "files", count=500, kills=50, workers=4, lease=2.0, most=3000)
    record("R1", database=database.partition(":")[0], jobs=made, stages=3, kills=killed, lost=0, published_twice=0)
    assert killed >= 50


@pytest.fixture
def service(space):
    "A supervisor with real worker processes, running in a thread."
    running = []

    def start(count=1, logs="", **how):
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
        url, root = f"sqlite:///{space / 'vidgen.db'}", space / "files"
        jobs = Jobs.open(url, root, least_free_gib=0)
        supervisor = Supervisor(jobs, settings(url, root, logs=logs), [Slot("cpu", "here/cpu", 8000)] * count, tick=0.02, **how)
        thread = supervisor.thread = threading.Thread(target=supervisor.run)
        thread.start()
        running.append((supervisor, thread, jobs))
        return jobs, supervisor

    yield start
    for supervisor, thread, jobs in running:
        supervisor.stop.set()
        thread.join()
        jobs.close()


def until(ready, seconds=60):
    start = time.monotonic()
    while not ready():
        assert time.monotonic() - start < seconds, "it did not happen"
        time.sleep(0.02)


def test_a_supervisor_with_the_worst_of_jobs(service):
    jobs, supervisor = service(obey=0.5)
    poison, good = jobs.submit("poison", {}, priority=9), jobs.submit("three", {"n": 1})
    until(lambda: jobs.get(poison.id).ended and jobs.get(good.id).ended)
    assert jobs.get(poison.id).error["code"] == "poison" and jobs.get(good.id).state == "succeeded"
    deaf = jobs.submit("deaf", {})
    until(lambda: jobs.get(deaf.id).state == "running")
    assert jobs.cancel(deaf.id).state == "running"
    until(lambda: jobs.get(deaf.id).ended)
    assert jobs.get(deaf.id).state == "canceled" and jobs.get(deaf.id).crash_count == 1, "the worker that did not listen was killed"
    again = jobs.submit("noop", {})
    until(lambda: jobs.get(again.id).ended)
    patient = jobs.submit("patient", {})
    until(lambda: jobs.get(patient.id).state == "running")
    supervisor.stop.set()
    until(lambda: jobs.get(patient.id).state == "queued", 90)
    assert [e.kind for e in jobs.events(patient.id)][-1] == "queued" and jobs.get(patient.id).attempt == 0, "SIGTERM hands the job back"
    assert set(whole(jobs)) == {"failed", "succeeded", "canceled", "queued"}


def test_failed_jobs_and_dead_workers_are_in_the_log(service, space, caplog):
    caplog.set_level("INFO", "vidgen.serve.supervisor")
    jobs, supervisor = service(logs=str(space / "logs"))
    wrong = jobs.submit("three", {})
    until(lambda: jobs.get(wrong.id).ended)
    (row,) = [json.loads(line) for line in (space / "logs/worker-0.errors.log").read_text().splitlines()]
    assert (row["job_id"], row["level"]) == (wrong.id, "error") and row["worker"] == supervisor.posts[0].name and "KeyError: 'n'" in row["message"]
    assert row["error"].startswith("Traceback") and "serve_kinds.py" in row["error"]
    patient = jobs.submit("patient", {})
    until(lambda: jobs.get(patient.id).state == "running")
    name = supervisor.posts[0].name
    supervisor.posts[0].process.kill()
    until(lambda: jobs.get(patient.id).crash_count == 1)
    until(lambda: any("died" in r.getMessage() for r in caplog.records))
    (died,) = [r for r in caplog.records if "died" in r.getMessage()]
    assert died.getMessage() == f"worker died by SIGKILL, holding {patient.id}" and (died.worker, died.job_id, died.levelname) == (name, patient.id, "ERROR")


def test_a_worker_that_can_not_start_says_why_in_its_log(space):
    how = settings(f"sqlite:///{space}/vidgen.db", space / "files", logs=str(space / "logs"))
    how.modules = ("no_such_module",)
    done = subprocess.run([sys.executable, "-c", "from vidgen.serve.worker import main; main()", json.dumps(asdict(how))], capture_output=True, text=True)
    row = json.loads((space / "logs/worker.errors.log").read_text())
    assert done.returncode == 1 and row["level"] == "critical" and "No module named 'no_such_module'" in row["error"] and "no_such_module" in done.stderr


def test_a_supervisor_outlives_a_damaged_database_and_says_so_once_a_minute(service, space, caplog):
    jobs, supervisor = service(count=0)
    until(lambda: "sweep" in supervisor.last)
    sizes = {name: (space / name).stat().st_size for name in ("vidgen.db", "vidgen.db-wal")}
    for name, size in sizes.items():
        (space / name).write_bytes(b"\x5a" * size)
    jobs.db.dispose()
    with pytest.raises(Unavailable, match="damaged.*backup"):
        jobs.list()
    supervisor.last.clear()
    until(lambda: [r for r in caplog.records if r.levelname == "ERROR"])
    supervisor.last.pop("announce", None)
    time.sleep(0.2)
    (said,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert "supervising stands still: the database is damaged" in said.getMessage() and said.exc_info is None
    assert supervisor.thread.is_alive()


def now_at_once(jobs):
    "No pause before the next try."
    with jobs.writing() as ledger:
        ledger.run(ledger.t.job.update().values(not_before=0.0))


def run_all(jobs, worker):
    while True:
        now_at_once(jobs)
        if not worker.once():
            return


def test_an_unknown_kind_fails_with_the_nearest(here):
    jobs, worker = here
    job = jobs.submit("tree", {})
    run_all(jobs, worker)
    assert jobs.get(job.id).error == {"code": "invalid", "message": jobs.get(job.id).error["message"]} and "three" in jobs.get(job.id).error["message"]


def test_what_may_pass_is_tried_three_times(here):
    jobs, worker = here
    job = jobs.submit("flaky", {})
    run_all(jobs, worker)
    assert jobs.get(job.id).result == {"attempt": 3} and [e.kind for e in jobs.events(job.id)].count("retry") == 2


@pytest.fixture
def upstream():
    "A server on loopback that answers as it is told: (status, headers) one after the other, the last one for ever; seconds in a header become a date."
    script, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers = script[min(len(asked), len(script) - 1)]
            asked.append(self.path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": "4"}).items():
                self.send_header(name, formatdate(time.time() + value, usegmt=True) if isinstance(value, float) else value)
            self.end_headers()
            self.wfile.write(b"done")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", script, asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("answers", "asked_times", "state", "windows"), [
    ([(500, {}), (500, {}), (200, {})], 3, "succeeded", [(0, 2), (0, 4)]),
    ([(429, {"Retry-After": "7"}), (200, {})], 2, "succeeded", [(7, 7)]),
    ([(503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), (200, {})], 2, "succeeded", [(0, 0)]),
    ([(503, {"Retry-After": 500.0}), (200, {})], 2, "succeeded", [(490, 500)]),
    ([(503, {"Retry-After": "soon"}), (200, {})], 2, "succeeded", [(0, 2)]),
    ([(500, {})], 3, "failed", [(0, 2), (0, 4)]),
    ([(404, {})], 1, "failed", []),
])
def test_a_server_that_fails_is_asked_three_times(here, space, upstream, answers, asked_times, state, windows):
    (jobs, worker), (url, script, asked) = here, upstream
    script += answers
    job = jobs.submit("asks", {"n": 1, "url": url, "undone": str(space / "undone.txt")})
    run_all(jobs, worker)
    now, told = jobs.get(job.id), jobs.events(job.id)
    again = [e.body for e in told if e.kind == "retry"]
    assert now.state == state and len(asked) == asked_times
    assert [b["attempt"] for b in again] == list(range(1, asked_times)) and {b["error"]["code"] for b in again} <= {"upstream"}
    assert all(low <= b["after"] <= high for b, (low, high) in zip(again, windows, strict=True))
    undone = [e.body["stage"] for e in told if e.kind == "rolled_back"]
    assert undone == (["s1", "s0"] if state == "failed" else []) and [e.body["stage"] for e in told if e.kind == "stage"][:2] == ["s0", "s1"]
    assert now.error is None if state == "succeeded" else now.error["code"] == "upstream"
    whole(jobs)


def test_stages_are_undone_in_reverse(here, space):
    jobs, worker = here
    job = jobs.submit("undoes", {"n": 5, "undone": str(space / "undone.txt")})
    run_all(jobs, worker)
    assert (space / "undone.txt").read_text().split() == ["1", "0"] and jobs.get(job.id).error["code"] == "internal"
    assert [e.body["stage"] for e in jobs.events(job.id) if e.kind == "rolled_back"] == ["s1", "s0"]


def test_a_cancel_is_heard_within_a_step(here):
    jobs, worker = here
    job = jobs.submit("patient", {})
    threading.Timer(0.6, lambda: jobs.cancel(job.id)).start()
    worker.once()
    now = jobs.get(job.id)
    assert now.state == "canceled" and now.finished_at - now.started_at < 20


def test_a_full_disk_fails_the_job_and_not_the_worker(here, monkeypatch):
    import errno

    jobs, worker = here
    bad, good = jobs.submit("three", {"n": 1}), jobs.submit("three", {"n": 2})
    real, full = os.fsync, [True]
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")) if full[0] else real(fd))
    worker.once()
    full[0] = False
    worker.once()
    assert jobs.get(bad.id).error["code"] == "storage_full" and jobs.get(good.id).state == "succeeded" and whole(jobs) == {"failed": 1, "succeeded": 1}


def test_memory_that_ran_out_is_asked_for_again_once(here):
    from vidgen.errors import DoesNotFit
    from vidgen.serve.kinds import KINDS, Kind, Stage, register

    jobs, worker = here

    def greedy(work):
        raise DoesNotFit("memory ran out twice")
    register(Kind("greedy", (Stage("make", greedy),)))
    job = jobs.submit("greedy", {}, memory_mib=100)
    run_all(jobs, worker)
    del KINDS["greedy"]
    assert jobs.get(job.id).error["code"] == "out_of_memory" and jobs.get(job.id).memory_mib == 120 and jobs.get(job.id).attempt == 2


def test_slots_are_spread_over_devices():
    assert len(slots(3)) == 3 and len(slots("auto")) >= 1
    with pytest.raises(ValueError, match="auto or a whole number"):
        slots("many")


def one_sleeper(jobs, database, space, n):
    job = jobs.submit("three", {"n": n, "seconds": 0.3})
    pid = born(database, space / "files", f"sleeper{n}", 0.5)
    until(lambda: jobs.get(job.id).state == "running")
    with jobs.writing():  # so that on SQLite it doesn't fall asleep with the lock; PostgreSQL takes the lock away
        os.kill(pid, signal.SIGSTOP)
    time.sleep(0.7)
    assert jobs.reap() == 1
    now_at_once(jobs)
    other = Worker(jobs, settings(database, space, name=f"awake{n}"), Pool(None))
    awake = threading.Thread(target=other.once)
    awake.start()
    os.kill(pid, signal.SIGCONT)
    awake.join()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    lapse.gone(jobs, f"sleeper{n}")
    while not jobs.get(job.id).ended:
        now_at_once(jobs)
        other.once()
    assert [e.kind for e in jobs.events(job.id)].count("succeeded") == 1 and len(jobs.artifacts(job.id)) == 1


def asleep(database, space, count):
    jobs = Jobs.open(database, space / "files", least_free_gib=0, lease=0.5)
    for n in range(count):
        one_sleeper(jobs, database, space, n)
    assert whole(jobs) == {"succeeded": count}
    jobs.close()


@pytest.mark.timeout(120)
def test_an_asleep_process_publishes_nothing(database, space):
    "R2 with real processes: SIGSTOP longer than the lease, then SIGCONT."
    asleep(database, space, 3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_asleep_processes_publish_nothing(database, space):
    asleep(database, space, 24)
    record("R2", database=database.partition(":")[0], zombies=24, published_by_them=0)


# real clips

def test_a_clip_is_made_trimmed_scored_and_previewed(here):
    from vidgen.clip import Clip
    from vidgen.serve.generate import admission, loader

    jobs, worker = here
    worker.pool = Pool(loader("cpu"))
    spec = {"prompt": "a red circle moving right on a white background", "num_frames": 6, "trim": True, "score": True, "num_inference_steps": 4, "seed": 5}
    job = jobs.submit("generate", spec, owner="ada", **admission(jobs, spec))
    assert worker.once()
    done = jobs.get(job.id)
    assert done.state == "succeeded", done.error
    assert (done.result["frames"], done.result["generated_frames"], done.result["seed"]) == (6, 9, 5) and "temporal_score" not in done.result
    assert worker.once() and 0 < jobs.get(job.id).result["temporal_score"] <= 1, "measured when the clip was there"
    files = {a.name: a for a in jobs.artifacts(job.id)}
    assert len(Clip.open(files["clip.mp4"].path).frames) == 6 and files["preview-1.png"].tier == "temp" and files["clip.mp4"].owner == "ada"
    marks = [e.body["progress"] for e in jobs.events(job.id) if e.kind == "progress"]
    assert marks == sorted(marks) and worker.pool.warm == ("shapes-t2v",)
    assert admission(jobs, spec)["memory_mib"] > 100, "what was measured is what the next one reserves"
    again = jobs.submit("generate", spec | {"seed": 5, "score": False})
    worker.once()
    same, = [a for a in jobs.artifacts(again.id) if a.name == "clip.mp4"]
    assert (Clip.open(same.path).frames == Clip.open(files["clip.mp4"].path).frames).all(), "the same seed gives the same clip"
    asked = jobs.submit("generate", spec | {"num_inference_steps": 200})
    threading.Timer(0.5, lambda: jobs.cancel(asked.id)).start()
    worker.once()
    assert jobs.get(asked.id).state == "canceled" and not jobs.artifacts(asked.id)


@pytest.mark.parametrize(("wrong", "says"), [({"prompt": " "}, "empty"), ({"num_frames": 6}, "nearest: 1 or 9"), ({"prompts": "x"}, "nearest: prompt"), ({"model": "shapes-i2v"}, "give image"),
                                             ({"image": "file_1"}, "can't use an image"), ({"mode": "fast"}, "mode"), ({"adapter": "../x"}, "adapter")])
def test_what_the_model_cannot_do_is_told_before_it_is_queued(wrong, says):
    from vidgen.serve.generate import plan

    with pytest.raises(ValueError, match=says):
        plan({"prompt": "a red circle"} | wrong)


# adapters by name

def shelved(folder, monkeypatch, name="press-v1", seed=1, scale=0.3):
    "Register an adapter with random matrices for shapes-t2v, in a shelf under a folder."
    import torch

    import vidgen
    from vidgen.train import adapters, lora

    monkeypatch.setenv("VIDGEN_STORAGE_ROOT", str(folder))
    gen = vidgen.load("shapes-t2v", device="cpu")
    g = torch.Generator().manual_seed(seed)
    for p in lora.add(gen.parts, rank=2, alpha=2.0, name="mine"):
        p.data = scale * torch.randn(p.shape, generator=g)
    return adapters.register(name, adapters.save_adapter(gen, folder / f"trained-{seed}", name="mine").path, overwrite=True)


@pytest.mark.timeout(200)
def test_a_job_wears_the_adapter_it_names_and_the_next_does_not(here, space, monkeypatch):
    from vidgen.clip import Clip
    from vidgen.serve.generate import loader

    jobs, worker = here
    worker.pool = Pool(loader("cpu"))
    found = shelved(jobs.root, monkeypatch)
    spec = {"prompt": "a red circle moving right on a white background", "num_frames": 9, "num_inference_steps": 3, "seed": 5}

    def made(**more):
        job = jobs.submit("generate", spec | more)
        assert worker.once()
        done = jobs.get(job.id)
        return done, [Clip.open(a.path) for a in jobs.artifacts(job.id) if a.name == "clip.mp4"]
    _, (plain,) = made()
    worn, (brand,) = made(adapter="press-v1")
    _, (half,) = made(adapter="press-v1", adapter_scale=0.5)
    _, (bare,) = made()
    assert worn.state == "succeeded" and brand.made["adapters"]["press-v1"]["hash"] == found.hash and "adapters" not in worn.result
    assert (brand.frames != plain.frames).any() and (half.frames != brand.frames).any() and (bare.frames == plain.frames).all()
    made(adapter="press-v1")
    again = shelved(jobs.root, monkeypatch, seed=2)  # while the old one is worn
    _, (other,) = made(adapter="press-v1")
    assert other.made["adapters"]["press-v1"]["hash"] == again.hash != found.hash, "new weights under an old name are worn, not the old ones"
    again.path.write_bytes(b"\x80\x04K\x01.")  # somebody put a pickle in its place
    broken, none = made(adapter="press-v1")
    assert broken.state == "failed" and broken.error["code"] == "invalid" and not none
    _, (last,) = made()
    assert (last.frames == plain.frames).all()


BAD = {
    "pickle": (lambda good, path: __import__("torch").save(good, path), "no safetensors file"),
    "header too long": (lambda good, path: path.write_bytes((200 * 10**6).to_bytes(8, "little") + b"{}"), "no safetensors file"),
    "no JSON": (lambda good, path: path.write_bytes((4).to_bytes(8, "little") + b"[1,2"), "no JSON object"),
    "nested": (lambda good, path: path.write_bytes((40000).to_bytes(8, "little") + b"[" * 40000), "no JSON object"),
    "cut short": (lambda good, path: path.write_bytes(path.read_bytes()[:-8]), "can't be read"),
    "empty": (lambda good, path: saved({}, path), "holds 0 tensors"),
    "too many": (lambda good, path: saved({f"transformer.{i}.lora_A.weight": torch_of(1, 1)[0, :0].reshape(0, 1) for i in range(20_001)}, path), "holds 20001 tensors"),
    "another part": (lambda good, path: saved(good | {"text_encoder.q.lora_A.weight": torch_of(2, 8)}, path), "no lora_A or lora_B of a transformer"),
    "another kind": (lambda good, path: saved(good | {"transformer.q.diff": torch_of(2, 8)}, path), "no lora_A or lora_B of a transformer"),
    "whole numbers": (lambda good, path: saved({k: v.long() for k, v in good.items()}, path), "of the type I64"),
    "one half": (lambda good, path: saved(good | {"transformer.q.lora_A.weight": torch_of(2, 8)}, path), "for both its matrices"),
    "rank too high": (lambda good, path: saved({"transformer.q.lora_A.weight": torch_of(513, 8), "transformer.q.lora_B.weight": torch_of(8, 513)}, path), "512 for both"),
    "a vector": (lambda good, path: saved(good | {"transformer.q.lora_A.weight": torch_of(2, 8)[0]}, path), "is no matrix"),
    "NaN": (lambda good, path: saved({k: v * float("nan") for k, v in good.items()}, path), "NaN"),
    "infinite": (lambda good, path: saved({k: v + float("inf") for k, v in good.items()}, path), "infinite"),
}


def torch_of(*shape):
    import torch

    return torch.ones(shape)


def saved(tensors, path):
    from safetensors.torch import save_file

    save_file(tensors, path)


@pytest.mark.parametrize("how", BAD)
def test_an_adapter_that_can_not_be_one_is_never_registered(tmp_path, monkeypatch, how):
    from vidgen.errors import CorruptWeights
    from vidgen.train import adapters, header

    monkeypatch.setenv("VIDGEN_STORAGE_ROOT", str(tmp_path / "root"))
    good = {"transformer.blocks.0.to_q.lora_A.weight": torch_of(2, 8), "transformer.blocks.0.to_q.lora_B.weight": torch_of(8, 2)}
    path, (spoil, says) = tmp_path / "a.safetensors", BAD[how]
    saved(good, path)
    assert header.checked(path) == path
    spoil(good, path)
    with pytest.raises(CorruptWeights, match=says):
        adapters.register("bad", path)
    assert not (tmp_path / "root").exists()


class Toy:
    "Something a pool can hold."

    def __init__(self, mib):
        import torch

        self.parts = type("Parts", (), {"device": "cpu", "modules": lambda s: {"m": torch.nn.Linear(1, mib * 2**18, bias=False)}})()


def test_the_pool_lets_go_of_what_was_used_longest_ago():
    pool = Pool(lambda name: Toy(int(name[1:])), most_mib=10, pinned=["p3"])
    for name in ("p3", "a4", "b2", "a4", "c4"):
        pool.get(name)
    assert pool.warm == ("p3", "c4") and pool.held_mib == 7  # b2, then a4 had to go
    pool.clear()
    assert pool.warm == ("p3",)
    with pytest.raises(ValueError, match="loaded model"):
        pool.drop("x1")


def test_an_idle_worker_lets_go_of_its_models_for_a_job_that_needs_the_memory(here):
    jobs, idle = here
    idle.own.slot, idle.pool = "d", Pool(lambda name: Toy(60))
    idle.pool.get("warm")
    with jobs.writing() as ledger:
        ledger.run(ledger.t.device.insert().values(name="d", total_mib=100, seen=ledger.now + 1e6))
    idle.beat("idle")
    other = Worker(jobs, Settings("", "", name="other", slot="d"), Pool(None))
    large = jobs.submit("noop", {}, memory_mib=80)
    with jobs.writing() as ledger:
        ledger.run(ledger.t.job.update().values(skipped=5))  # it has let enough others pass
    assert not other.once() and jobs.get(large.id).state == "queued", "60 of 100 MiB are held by a worker that does nothing"
    idle.make_room()
    assert idle.pool.warm == () and other.once() and jobs.get(large.id).state == "succeeded"


def test_a_worker_that_says_nothing_is_killed(database, space):
    jobs = Jobs.open(database, space / "files", least_free_gib=0)
    supervisor = Supervisor(jobs, settings(database, space), [])
    killed = []
    for n, state in enumerate(("busy", "starting", "idle")):
        with jobs.writing() as ledger:
            ledger.run(ledger.t.worker.insert().values(id=f"w{n}", host="h", pid=1, device="d", heartbeat=ledger.now - (0 if state == "idle" else 200), resident_mib=0, warm=[], state=state))
        process = type("Process", (), {"kill": lambda self, n=n: killed.append(n)})()
        supervisor.posts.append(type("Post", (), {"process": process, "name": f"w{n}"})())
    supervisor.kill_disobedient()
    assert killed == [0]
    jobs.close()


def fresh(code):
    "Run code in a process of its own; returns what it printed."
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(has_gpu(), reason="torch is asked where a GPU may be")
def test_the_supervisor_and_the_check_of_a_request_import_nothing_heavy():
    heavy = "import sys; from vidgen.serve.supervisor import slots; from vidgen.serve.generate import plan; slots(); plan({'prompt': 'a red circle'}); print({'torch', 'diffusers'} & {*sys.modules})"
    assert fresh(heavy) == "set()"


def test_a_worker_loads_the_models_it_keeps_while_nobody_waits(database, space):
    jobs, loaded = Jobs.open(database, space / "files", least_free_gib=0), []
    worker = Worker(jobs, settings(database, space, name="w", pinned=("a", "b", "c")), Pool(lambda name: loaded.append(name) or Toy(1), pinned=("a", "b", "c")))
    worker.once()
    assert loaded == ["a"]
    job = jobs.submit("noop", {})
    worker.once()
    assert jobs.get(job.id).state == "succeeded" and loaded == ["a"], "the job goes before the next model"
    for _ in range(5):
        worker.once()
    assert loaded == ["a", "b", "c"]
    jobs.close()


def test_a_clip_is_published_beside_the_next_one(database, space):
    from vidgen.serve.kinds import KINDS, Kind, Stage, register

    told, free = [], threading.Event()

    def make(work):
        told.append(f"make {work.spec['n']}")
        if work.spec["n"] == 1:
            free.set()

        def write():
            free.wait(20)  # the first is not written before the second is begun
            told.append(f"write {work.spec['n']}")
            (work.folder / "x.txt").write_text("x")
            work.files[:] = [work.folder / "x.txt"]
            return {"n": work.spec["n"]}

        return write

    register(Kind("late", (Stage("make", make),)))
    jobs = Jobs.open(database, space / "files", least_free_gib=0)
    made = [jobs.submit("late", {"n": n}).id for n in range(3)]
    worker = Worker(jobs, settings(database, space, name="w"), Pool(None))
    thread = threading.Thread(target=worker.run)
    thread.start()
    until(lambda: all(jobs.get(j).ended for j in made))
    worker.drain()
    thread.join()
    del KINDS["late"]
    assert told.index("write 0") > told.index("make 1") and [jobs.get(j).result for j in made] == [{"n": n} for n in range(3)]
    assert whole(jobs) == {"succeeded": 3} and all(len(jobs.artifacts(j)) == 1 for j in made) and jobs.orphans() == []
    jobs.close()


def test_a_canceled_job_is_not_published_though_it_was_made(database, space):
    from vidgen.serve.kinds import KINDS, Kind, Stage, register

    register(Kind("called", (Stage("make", lambda work: lambda: jobs.cancel(work.claim.job.id) and {"n": 1}),)))
    jobs = Jobs.open(database, space / "files", least_free_gib=0)
    job = jobs.submit("called", {})
    Worker(jobs, settings(database, space, name="w"), Pool(None)).once()
    del KINDS["called"]
    assert jobs.get(job.id).state == "canceled" and jobs.get(job.id).result is None
    jobs.close()


def test_progress_is_told_twice_a_second_at_most_and_its_last_word_is_the_newest(database, space):
    from vidgen.serve.kinds import KINDS, Kind, Stage, register

    def steps(work):
        for step in range(120):
            work.report("step", step + 1, 120)
            time.sleep(0.01)

    register(Kind("steps", (Stage("walk", steps),)))
    jobs = Jobs.open(database, space / "files", least_free_gib=0)
    job = jobs.submit("steps", {})
    Worker(jobs, settings(database, space, name="w"), Pool(None)).once()
    del KINDS["steps"]
    told = [e for e in jobs.events(job.id) if e.kind == "progress"]
    spent = jobs.get(job.id).finished_at - jobs.get(job.id).started_at
    assert 2 <= len(told) <= 2 * spent + 2
    assert [e.body["progress"] for e in told] == sorted(e.body["progress"] for e in told)
    jobs.close()
