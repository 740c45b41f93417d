"""A clip is published first and scored afterwards, by workers that are killed, wanted elsewhere, or give up. What has `database` holds on SQLite and PostgreSQL."""
import asyncio
import os
import signal
import threading
import time

import pytest
import serve_kinds  # noqa: F401  registers the kinds
from test_jobs import whole
from test_worker import born, now_at_once, run_all, settings, until

from vidgen.clip import Clip
from vidgen.evaluate.flow import flow_uniformity
from vidgen.serve import lapse, requests, storage
from vidgen.serve.jobs import Jobs
from vidgen.serve.pool import Pool
from vidgen.serve.records import Lost
from vidgen.serve.score import pending, scored
from vidgen.serve.worker import Worker


def follower(jobs, kind="score"):
    found, = jobs.list(kind=kind)
    return found


def kinds(jobs, job_id):
    return [e.kind for e in jobs.events(job_id)]


def test_a_clip_is_published_before_it_is_scored(here):
    jobs, worker = here
    job = jobs.submit("film", {}, owner="ada")
    worker.once()
    done = jobs.get(job.id)
    assert done.state == "succeeded" and "temporal_score" not in done.result and pending(jobs, job.id)
    film, = jobs.artifacts(job.id)
    worker.once()
    assert jobs.get(job.id).result == done.result | {"temporal_score": flow_uniformity(Clip.open(film.path).frames, engine="tvl1")}
    assert kinds(jobs, job.id)[-1] == "succeeded" and jobs.get(job.id).finished_at == done.finished_at and jobs.artifacts(job.id) == [film], "what had ended was not touched"
    assert not pending(jobs, job.id) and follower(jobs).started_at >= done.finished_at and whole(jobs) == {"succeeded": 2}


def test_a_worker_killed_while_it_scores_harms_nothing(database, space):
    jobs = Jobs.open(database, space / "files", least_free_gib=0, lease=60)
    job, n, killed = jobs.submit("film", {"frames": 60}), 0, 0
    for n in range(2):
        pid = born(database, space / "files", f"w{n}", 60)
        until(lambda: jobs.list(kind="score", state="running"))
        time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += lapse.gone(jobs, f"w{n}")
        assert jobs.get(job.id).state == "succeeded" and jobs.artifacts(job.id)[0].path.is_file() and "temporal_score" not in jobs.get(job.id).result
        now_at_once(jobs)
    run_all(jobs, Worker(jobs, settings(database, space, name="last"), Pool(None)))
    assert killed == 2 and follower(jobs).crash_count == 2 and follower(jobs).state == "succeeded" and jobs.get(job.id).result["temporal_score"] > 0
    assert kinds(jobs, job.id).count("succeeded") == 1 and kinds(jobs, job.id)[-1] == "succeeded" and len(jobs.list(kind="score")) == 1
    jobs.close()


def test_a_worker_killed_between_the_file_and_the_commit_leaves_clip_and_score(database, space):
    jobs = Jobs.open(database, space / "files", least_free_gib=0, lease=60)
    job = jobs.submit("film", {})
    if not (pid := os.fork()):
        mine = Jobs.open(database, space / "files", least_free_gib=0)
        storage.move = lambda *given: os.kill(os.getpid(), signal.SIGKILL)  # dies with the note written and no file in its place
        Worker(mine, settings(database, space, name="dies"), Pool(None)).once()
        os._exit(0)
    os.waitpid(pid, 0)
    assert jobs.get(job.id).state == "running" and lapse.gone(jobs, "dies") == 1
    assert jobs.get(job.id).state == "succeeded" and pending(jobs, job.id), "the score is owed although the worker never said so to the table"
    run_all(jobs, Worker(jobs, settings(database, space, name="next"), Pool(None)))
    assert "temporal_score" in jobs.get(job.id).result and whole(jobs) == {"succeeded": 2}
    jobs.close()


def test_a_score_that_cannot_be_had_is_given_up_and_the_clip_stays(here):
    jobs, worker = here
    job = jobs.submit("film", {"then": ["score", "poison"]})
    worker.once()
    for n in range(3):
        pid = born(str(jobs.db.url.render_as_string(hide_password=False)), jobs.root, f"w{n}", 60)
        os.waitpid(pid, 0)
        lapse.gone(jobs, f"w{n}")
        now_at_once(jobs)
    assert not worker.once() and follower(jobs, "poison").error["code"] == "poison" and follower(jobs, "poison").crash_count == 3
    assert jobs.get(job.id).state == "succeeded" and jobs.get(job.id).error is None and len(jobs.artifacts(job.id)) == 1


def test_a_score_leaves_the_slot_when_a_clip_waits(here):
    jobs, worker = here
    job = jobs.submit("film", {"frames": 160})
    worker.once()
    late = []
    asked = threading.Timer(0.3, lambda: late.append(jobs.submit("three", {"n": 1}, priority=-100)))
    asked.start()
    worker.once()
    asked.join()
    score = follower(jobs)
    assert score.state == "queued" and score.attempt == 0 and jobs.events(score.id)[-1].body["message"] == "something else comes first"
    worker.once()
    assert jobs.get(late[0].id).state == "succeeded" and "temporal_score" not in jobs.get(job.id).result
    worker.once()
    assert follower(jobs).state == "succeeded" and jobs.get(job.id).result["temporal_score"] > 0 and whole(jobs) == {"succeeded": 3}


def test_a_score_that_is_overdue_does_not_leave_the_slot(here):
    jobs, worker = here
    job = jobs.submit("film", {"frames": 160})
    worker.once()
    with jobs.writing() as ledger:
        ledger.run(ledger.t.job.update().where(ledger.t.job.c.kind == "score").values(created_at=ledger.now - 61))
    asked = threading.Timer(0.3, lambda: jobs.submit("three", {"n": 1}, priority=100))
    asked.start()
    worker.once()
    asked.join()
    assert follower(jobs).state == "succeeded" and jobs.get(job.id).result["temporal_score"] > 0 and follower(jobs).attempt == 1


def test_a_clip_goes_before_a_score_whoever_asked_first(here):
    jobs, worker = here
    jobs.submit("film", {}, owner="ada")
    worker.once()
    clip = jobs.submit("three", {"n": 1}, owner="ada", priority=-100)
    worker.once()
    assert jobs.get(clip.id).state == "succeeded" and follower(jobs).state == "queued"


def test_a_score_is_nobodys_and_fills_no_queue(here):
    jobs, worker = here
    for _ in range(3):
        jobs.submit("film", {}, owner="ada")
        worker.once()
        worker.once() if jobs.list(kind="film", state="queued") else None
    with jobs.writing() as ledger:
        again = requests.follow(ledger, jobs.list(kind="film", limit=1)[0].id, "score")
    assert again.repeated, "one score for a clip"
    jobs.submit("three", {"n": 0}, owner="ada", most_queued=1)
    counts = jobs.counts()
    assert counts["queued"] == {0: 1} and jobs.list("ada", kind="score") == [] and jobs.list("", kind="score") == []


def test_a_clip_that_is_deleted_needs_no_score(here):
    jobs, worker = here
    job = jobs.submit("film", {})
    worker.once()
    jobs.delete(job.id)
    worker.once()
    assert follower(jobs).result["message"] == "the clip is gone" and whole(jobs) == {"succeeded": 1}


def test_who_waits_for_the_score_waits_no_longer_than_for_what_may_come(here):
    jobs, worker = here
    job = jobs.submit("film", {"frames": 3})
    worker.once()
    ask = lambda seconds: asyncio.run(scored(jobs, jobs.get(job.id), seconds))
    assert "temporal_score" not in ask(0.0).result
    score = threading.Timer(0.3, worker.once)
    score.start()
    assert "temporal_score" in ask(60.0).result
    score.join()
    lost = jobs.submit("film", {})
    worker.once()
    jobs.cancel(next(j.id for j in jobs.list(kind="score") if j.spec["of"] == lost.id))
    assert "temporal_score" not in asyncio.run(scored(jobs, jobs.get(lost.id), 60.0)).result, "a score that was called off is not waited for"


def test_a_follower_is_accepted_with_the_clip_or_not_at_all(here):
    jobs, _ = here
    job = jobs.submit("film", {})
    claim = jobs.claim("w")
    claim.fence += 1  # as if another worker had the job
    with pytest.raises(Lost):
        claim.publish([], {}, then=("score",))
    assert jobs.list(kind="score") == [] and jobs.get(job.id).state == "running"
