"""Servers that go away while the service runs: PostgreSQL restarted, Redis flushed and killed (`make test-services`)."""
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time

import pytest
import serve_kinds  # noqa: F401  registers the kinds
from services import program
from serving import client, opened, record
from test_jobs import whole
from test_worker import check, settings, until

from vidgen.serve.doorbell import Doorbell
from vidgen.serve.jobs import Jobs
from vidgen.serve.pool import Pool
from vidgen.serve.records import Unavailable
from vidgen.serve.worker import Worker

pytestmark = pytest.mark.services


def born(url, root, name, **how):
    "A worker in a forked process."
    parent = os.getpid()
    if pid := os.fork():
        return pid
    try:
        jobs = Jobs.open(url, root, least_free_gib=0, lease=20)
        own = settings(url, root, name=name, parent=parent, **how)
        bell = Doorbell(own.redis) if own.redis else None
        jobs.bell = bell and bell.ring
        own.poll = 1.0 if bell else own.poll
        Worker(jobs, own, Pool(None), bell).run()
    finally:
        os._exit(0)


def bury(pids):
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def patiently(act, seconds=60):
    start = time.monotonic()
    while True:
        try:
            return act()
        except Unavailable:
            assert time.monotonic() - start < seconds
            time.sleep(0.1)


def restarted(postgres, root, count, pause, between):
    "R7: submit so many jobs, one each `pause` seconds, while the server crashes after as long as `between()` says; returns how often it did, and how many submissions were refused meanwhile."
    url = postgres.database(f"r7{secrets.token_hex(4)}")
    jobs = Jobs.open(url, root, least_free_gib=0, lease=20)
    pids = [born(url, root, f"w{n}") for n in range(2)]
    refused, crashes, over = [0], [0], threading.Event()

    def crash():
        while not over.wait(between()):
            postgres.restart()
            crashes[0] += 1

    crashing = threading.Thread(target=crash)
    crashing.start()
    made = []
    for i in range(count):
        def ask(i=i):
            try:
                return jobs.submit("three", {"n": i}, key=str(i)).id
            except Unavailable:
                refused[0] += 1
                raise
        made.append(patiently(ask))
        time.sleep(pause)
    over.set()
    crashing.join()

    def all_ended():
        jobs.reap()
        states = jobs.counts()["states"]
        return states["queued"] + states["running"] == 0

    until(lambda: patiently(all_ended), 180)
    bury(pids)
    assert len(set(made)) == count and sum(whole(jobs).values()) == count
    check(jobs, made)
    jobs.close()
    return crashes[0], refused[0]


@pytest.mark.timeout(600)
def test_postgresql_is_restarted_and_nothing_is_lost(postgres, space):
    "R7: every accepted job ends once, though the server crashes again and again."
    crashes, _ = restarted(postgres, space / "files", 60, 0.1, lambda: 2.0)
    assert crashes >= 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_postgresql_is_restarted_for_ten_minutes(postgres, space):
    rng = random.Random(7)
    crashes, refused = restarted(postgres, space / "files", 600, 1.0, lambda: rng.uniform(5, 40))
    record("R7", jobs=600, crashes=crashes, refused_meanwhile=refused, lost=0)
    assert crashes >= 10


def test_readiness_tells_when_postgresql_is_gone_and_back(postgres, tmp_path):
    service = opened(tmp_path, database_url=postgres.database(f"r7{secrets.token_hex(4)}"))
    http, ready = client(service), lambda: http.get("/health/ready").status_code
    assert ready() == 200 and http.post("/v1/jobs", json={"kind": "noop", "spec": {}}).status_code == 202
    postgres.crash()
    try:
        until(lambda: ready() == 503)
        refused = http.post("/v1/jobs", json={"kind": "noop", "spec": {}})
        assert refused.status_code == 503 and refused.headers["retry-after"] and http.get("/health/live").status_code == 200
    finally:
        postgres.start()
    until(lambda: ready() == 200)
    assert http.post("/v1/jobs", json={"kind": "noop", "spec": {}}).status_code == 202 and len(service.jobs.list()) == 2
    service.jobs.close()


@pytest.mark.timeout(300)
def test_redis_is_flushed_and_killed_and_nothing_is_lost(database, redis_server, space):
    "R8: Redis only rings; without it a worker looks by itself."
    root = space / "files"
    jobs = Jobs.open(database, root, least_free_gib=0, lease=20)
    pids = [born(database, root, f"w{n}", redis=redis_server.url) for n in range(2)]
    jobs.bell = Doorbell(redis_server.url).ring
    made = []
    for i in range(30):
        made.append(jobs.submit("three", {"n": i}).id)
        if i % 10 == 1:
            redis_server.flush()
        if i % 10 == 4:
            redis_server.kill()
        if i % 10 == 8:
            redis_server.start()
        time.sleep(0.1)
    until(lambda: jobs.counts()["states"]["succeeded"] == 30)
    redis_server.kill()
    last = jobs.submit("three", {"n": 99})
    until(lambda: jobs.get(last.id).ended)
    bury(pids)
    check(jobs, [*made, last.id])
    jobs.close()


def waits(jobs, count):
    "Seconds from the submission to the start of jobs that come one at a time."
    found = []
    for i in range(count):
        job = jobs.submit("three", {"n": i})
        until(lambda job=job: jobs.get(job.id).ended)
        done = jobs.get(job.id)
        found.append(done.started_at - done.created_at)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_redis_gone_for_good_costs_no_more_than_two_seconds(database, redis_server, space):
    "R8 at length: flushed and killed in a loop under load, then its death measured."
    root, stop = space / "files", threading.Event()
    jobs = Jobs.open(database, root, least_free_gib=0, lease=20)
    pids = [born(database, root, f"w{n}", redis=redis_server.url) for n in range(2)]
    jobs.bell = Doorbell(redis_server.url).ring
    with_it, kills = waits(jobs, 20), [0]

    def torment():
        while not stop.wait(1.0):
            redis_server.flush()
            redis_server.kill()
            kills[0] += 1
            time.sleep(0.5)
            redis_server.start()

    tormenting = threading.Thread(target=torment)
    tormenting.start()
    made = []
    for i in range(300):
        made.append(jobs.submit("three", {"n": i}).id)
        time.sleep(0.2)
    until(lambda: all(jobs.get(i).ended for i in made[-20:]), 120)
    stop.set()
    tormenting.join()
    redis_server.kill()
    without = waits(jobs, 20)
    bury(pids)
    check(jobs, [j.id for j in jobs.list(limit=1000)])
    jobs.close()
    record("R8", database=database.partition(":")[0], jobs=340, kills=kills[0], lost=0, wait_with_redis=round(max(with_it), 3), wait_without=round(max(without), 3))
    assert max(without) < 2 + max(with_it)


def test_a_ring_is_heard(redis_server):
    ringer, hearer = Doorbell(redis_server.url), Doorbell(redis_server.url)
    hearer.wait(0.01)  # makes the group
    news = hearer.news()
    assert next(news) is None
    ringer.ring([("job_1", 1, "queued"), ("job_1", 2, "started")])
    assert hearer.wait(5) and [next(news), next(news)] == [("job_1", 1), ("job_1", 2)]
    redis_server.flush()
    assert not hearer.wait(0.05)
    ringer.ring([("job_2", 1, "queued")])
    assert hearer.wait(5), "the group is made again after a flush"


def test_a_missing_server_fails_and_says_what_to_install():
    with pytest.raises(pytest.fail.Exception, match="make services"):
        program("no-such-server", "no-such-package")


def test_postgresql_that_is_not_there_says_so(tmp_path):
    with pytest.raises(Unavailable, match="can't answer now"):
        Jobs.open("postgresql://nobody@127.0.0.1:1/none", tmp_path)
    assert subprocess.run([sys.executable, "-c", "import vidgen.serve.jobs"]).returncode == 0
