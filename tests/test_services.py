"""Servers that go away while the service runs: PostgreSQL restarted, Redis flushed and killed (`make test-services`)."""
import os
import secrets
import signal
import subprocess
import sys
import threading
import time

import pytest
import serve_kinds  # noqa: F401  registers the kinds
from services import program
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


@pytest.mark.timeout(600)
def test_postgresql_is_restarted_and_nothing_is_lost(postgres, space):
    "R7: every accepted job ends once, though the server crashes again and again."
    url, root = postgres.database(f"r7{secrets.token_hex(4)}"), space / "files"
    jobs = Jobs.open(url, root, least_free_gib=0, lease=20)
    pids = [born(url, root, f"w{n}") for n in range(2)]
    refused, over = [0], threading.Event()

    def crash():
        while not over.wait(2.0):
            postgres.restart()

    crashing = threading.Thread(target=crash)
    crashing.start()
    made = []
    for i in range(60):
        def ask(i=i):
            try:
                return jobs.submit("three", {"n": i}, key=str(i)).id
            except Unavailable:
                refused[0] += 1
                raise
        made.append(patiently(ask))
        time.sleep(0.1)
    over.set()
    crashing.join()

    def all_ended():
        jobs.reap()
        states = jobs.counts()["states"]
        return states["queued"] + states["running"] == 0

    until(lambda: patiently(all_ended), 120)
    bury(pids)
    assert len(set(made)) == 60 and sum(whole(jobs).values()) == 60
    check(jobs, made)
    jobs.close()


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
