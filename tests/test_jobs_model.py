"""R5: jobs, workers, crashes, clocks and zombies in any order, beside a model of a dictionary that says what must come out."""
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from serving import record

from vidgen.errors import Canceled
from vidgen.serve import storage
from vidgen.serve.jobs import Jobs
from vidgen.serve.ledger import CRASHES, TRIES
from vidgen.serve.records import ENDED, Conflict, Lost, NotFound

TOTAL = {"cpu": 10, "gpu": 40}  # MiB of two devices
SPACE = "/dev/shm" if os.path.isdir("/dev/shm") else None  # 12,000 commits, and what a disk does with them is tested elsewhere


class Model(dict):
    "What is known of one job: its row as it must be."

    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__

    def end(self, state, now):
        if self.undo and self.ending is None:
            self.update(state="queued", ending=state, not_before=now, expires=None)
        else:
            self.update(state=self.ending or state, ended=self.ended + 1, finished=now)


class Machine(RuleBasedStateMachine):
    url = None  # set below

    def __init__(self):
        super().__init__()
        self.now, self.model, self.fences, self.keys, self.claims = 1000.0, {}, {}, {}, []
        self.root = Path(tempfile.mkdtemp(dir=SPACE))
        self.jobs = Jobs.open(self.url, self.root, least_free_gib=0, clock=lambda: self.now)

    def teardown(self):
        with self.jobs.writing() as ledger:
            for table in reversed(ledger.t.meta.sorted_tables):
                ledger.run(table.delete())
        self.jobs.close()
        self.seen["orders"] += 1
        self.seen["most_jobs"] = max(self.seen["most_jobs"], len(self.model))
        shutil.rmtree(self.root)

    @initialize()
    def devices(self):
        with self.jobs.writing() as ledger:
            for name, mib in TOTAL.items():
                ledger.run(ledger.t.device.insert().values(name=name, total_mib=mib, seen=self.now))

    def held(self, claim):
        job = self.model.get(claim.job.id)
        return job is not None and job.state == "running" and job.fence == claim.fence

    def under_fence(self, claim, act):
        "Do something as a worker would; it must count if and only if the model says that the worker has the job."
        if self.held(claim):
            return act()
        with pytest.raises(Lost):
            act()
        return None

    # clients

    ask = dict(owner=st.sampled_from("ab"), priority=st.integers(-1, 1), key=st.sampled_from([None, None, "k1", "k2"]), seed=st.integers(0, 1),
          expires=st.sampled_from([None, None, 5.0]), mib=st.sampled_from([0, 0, 5, 9, 30]), name=st.sampled_from(["", "m1", "m2"]))

    @precondition(lambda self: len(self.model) < 3)
    @rule(**ask)
    def submit_too(self, **how):
        self.submit(**how)

    @precondition(lambda self: len(self.model) < 8)
    @rule(**ask)
    def submit(self, owner, priority, key, seed, expires, mib, name):
        spec, known = {"seed": seed}, self.keys.get((owner, key)) if key else None
        ask = lambda: self.jobs.submit("noop", spec, owner=owner, priority=priority, key=key, expires_in=expires, memory_mib=mib, model=name)
        if known and known[1] != (seed, name, priority, expires):
            with pytest.raises(Conflict):
                ask()
            return
        job = ask()
        assert job.repeated == bool(known) and (not known or job.id == known[0])
        if not known:
            self.model[job.id] = Model(state="queued", fence=0, attempt=0, crashes=0, cancel=False, undo=set(), ending=None, not_before=self.now, created=self.now, lease=None, mib=mib,
                                       expires=None if expires is None else self.now + expires, ended=0, ready=False, finished=None, key=(owner, key))
            if key:
                self.keys[owner, key] = (job.id, (seed, name, priority, expires))

    @precondition(lambda self: self.model)
    @rule(act=st.sampled_from(["cancel", "cancel", "delete"]), which=st.integers(0, 9))
    def client(self, act, which):
        getattr(self, act)([*self.model, "job_none"][-1 - which % (len(self.model) + 1)])

    def cancel(self, job_id):
        job = self.model.get(job_id)
        if job is None:
            with pytest.raises(NotFound):
                self.jobs.cancel(job_id)
        elif job.state in ENDED and job.state != "canceled":
            with pytest.raises(Conflict):
                self.jobs.cancel(job_id)
        else:
            self.jobs.cancel(job_id)
            if job.state == "queued" and job.ending is None:
                job.cancel = True
                job.end("canceled", self.now)
            elif job.state == "running" and job.ending is None:
                job.cancel = True

    def delete(self, job_id):
        job = self.model.get(job_id)
        if job is not None and job.state in ENDED:
            self.jobs.delete(job_id)
            del self.model[job_id], self.fences[job_id]
            self.keys = {k: v for k, v in self.keys.items() if v[0] != job_id}
        else:
            with pytest.raises((Conflict, NotFound)):
                self.jobs.delete(job_id)

    # workers

    who = dict(worker=st.sampled_from(["w1", "w2"]), device=st.sampled_from(["cpu", "gpu"]), warm=st.sampled_from([(), ("m1",)]))

    @precondition(lambda self: any(j.state == "queued" for j in self.model.values()))
    @rule(**who)
    def claim_too(self, **how):
        self.claim(**how)

    @rule(**who)
    def claim(self, worker, device, warm):
        ready = {i: j for i, j in self.model.items() if j.state == "queued" and j.not_before <= self.now and (j.expires is None or j.expires > self.now)}
        claim = self.jobs.claim(worker, slot=device, warm=warm)
        if claim is None:
            assert not ready or any(j.mib for j in ready.values()), "something could have been done"
            return
        job = self.model[claim.job.id]
        assert claim.job.id in ready and claim.fence == job.fence + 1 and claim.ending == ({"state": job.ending, "error": claim.ending["error"]} if job.ending else None)
        assert set(claim.done) >= job.undo
        job.update(state="running", fence=claim.fence, lease=self.now + 60, attempt=job.attempt + (job.ending is None), device=device, expires=None)
        self.claims.append(claim)

    def chosen(self, which, zombie):
        "A claim that counts if there is one, or any there ever was."
        good = [c for c in self.claims if self.held(c)]
        among = self.claims if zombie or not good else good
        return among[which % len(among)]

    @precondition(lambda self: self.claims)
    @rule(act=st.sampled_from(["renew", "progress", "stage", "publish", "die", "fail", "retry", "stopped", "release"]), which=st.integers(0, 9), zombie=st.booleans(), more=st.booleans())
    def worker(self, act, which, zombie, more):
        claim = self.chosen(which, zombie)
        if act == "stage":
            self.stage(claim, undo=more, name=f"s{which % 2}")
        elif act in ("publish", "die"):
            self.publish(claim, lag=act == "die")
        elif act in ("fail", "retry"):
            self.fail(claim, retry=act == "retry")
        else:
            getattr(self, act)(claim)

    @precondition(lambda self: any(self.held(c) for c in self.claims))
    @rule(which=st.integers(0, 9))
    def finish(self, which):
        claim = self.chosen(which, zombie=False)
        (self.roll_back if claim.ending else self.publish)(claim)

    def renew(self, claim):
        job = self.model.get(claim.job.id)
        if (asked := self.under_fence(claim, claim.renew)) is not None:
            assert asked == job.cancel
            job.lease = self.now + 60

    def progress(self, claim):
        self.under_fence(claim, lambda: claim.event("progress", {"stage": "work", "progress": 50}))

    def stage(self, claim, undo, name):
        def act():
            (claim.staging / f"{name}.bin").write_bytes(name.encode())
            claim.stage(name, [claim.staging / f"{name}.bin"], output={"of": name}, undo=undo)
            self.model[claim.job.id].undo ^= {name} & self.model[claim.job.id].undo
            self.model[claim.job.id].undo |= {name} if undo else set()

        if not self.held(claim) or self.model[claim.job.id].ending is None:
            self.under_fence(claim, act)

    def publish(self, claim, lag=False):
        job = self.model.get(claim.job.id)
        if self.held(claim) and job.ending:
            return  # a worker that undoes does not publish
        (claim.staging / "clip.mp4").write_bytes(f"{claim.job.id} {claim.fence}".encode())
        if lag:  # the worker dies when its files have their names and the commit is missing
            storage.place_all(self.jobs, claim, [claim.staging / "clip.mp4"], {"fence": claim.fence})
            if self.held(claim):
                job.ready = True
        elif self.held(claim) and job.cancel:
            with pytest.raises(Canceled):
                claim.publish([claim.staging / "clip.mp4"], {"fence": claim.fence})
            job.ready = True
        elif job is not None and job.state == "succeeded" and job.fence == claim.fence and not claim.published:
            assert claim.publish([claim.staging / "clip.mp4"], {"fence": claim.fence}).state == "succeeded"  # adopted after its death: only the answer had been lost
        else:
            if self.under_fence(claim, lambda: claim.publish([claim.staging / "clip.mp4"], {"fence": claim.fence})):
                job.update(state="succeeded", ended=job.ended + 1, finished=self.now)

    def fail(self, claim, retry):
        job = self.model.get(claim.job.id)
        if self.held(claim) and job.ending:
            return
        if found := self.under_fence(claim, lambda: claim.fail({"code": "x", "message": "y"}, retry=retry)):
            if retry and job.attempt < TRIES and not job.cancel:
                job.update(state="queued", not_before=found.not_before, ready=False)
                assert self.now <= found.not_before <= self.now + 2 * 2**TRIES
            else:
                job.end("failed", self.now)

    def stopped(self, claim):
        job = self.model.get(claim.job.id)
        if not (self.held(claim) and job.ending) and self.under_fence(claim, claim.canceled):
            job.end("canceled", self.now)

    def release(self, claim):
        if self.held(claim):
            claim.release("drained")
            job = self.model[claim.job.id]
            if job.cancel and not job.ending:
                job.end("canceled", self.now)
            else:
                job.update(state="queued", attempt=max(0, claim.job.attempt - 1), not_before=self.now, ready=False)

    def roll_back(self, claim):
        job = self.model.get(claim.job.id)
        if self.held(claim) and job.ending:
            for name in reversed(list(claim.done)):
                claim.undone(name)
            job.undo = set()
            assert claim.rolled_back().state == job.ending
            job.end(job.ending, self.now)

    # time and the house

    @rule(seconds=st.sampled_from([0.0, 3.0, 30.0, 61.0, 61.0, 4000.0]), acts=st.lists(st.sampled_from(["reap", "expire", "sweep"]), max_size=3))
    def time(self, seconds, acts):
        self.now += seconds
        for act in acts:
            getattr(self, act)()

    def reap(self):
        lapsed = {i: j for i, j in self.model.items() if j.state == "running" and j.lease < self.now}
        assert self.jobs.reap() == len(lapsed)
        for job_id, job in lapsed.items():
            if job.ready and not job.cancel and not job.ending:
                job.update(state="succeeded", ended=job.ended + 1, finished=self.now)
                continue
            job.update(state="queued", crashes=job.crashes + 1, attempt=max(0, job.attempt - (job.ending is None)), ready=False)
            if job.ending:
                if job.crashes >= 2 * CRASHES:
                    job.end(job.ending, self.now)
            elif job.cancel:
                job.end("canceled", self.now)
            elif job.crashes >= CRASHES:
                job.end("failed", self.now)
            job.not_before = self.jobs.get(job_id).not_before

    def expire(self):
        late = [j for j in self.model.values() if j.state == "queued" and j.ending is None and j.expires is not None and j.expires <= self.now]
        assert self.jobs.expire() == len(late)
        for job in late:
            job.end("expired", self.now)

    def sweep(self):
        self.jobs.sweep()

    # what must hold at every moment

    @invariant()
    def the_rows_are_as_the_model_says(self):
        self.seen["looks"] += 1
        with self.jobs.reading() as ledger:
            rows = {r.id: r for r in ledger.run(ledger.t.job.select())}
            events = {}
            for e in ledger.run(ledger.t.event.select().order_by(ledger.t.event.c.job, ledger.t.event.c.seq)):
                events.setdefault(e.job, []).append(e)
            reserved = ledger.run(ledger.t.reservation.select()).all()
            files = ledger.run(ledger.t.artifact.select()).all()
        assert rows.keys() == self.model.keys() == events.keys()
        for job_id, row in rows.items():
            job, told = self.model[job_id], events[job_id]
            assert (row.state, row.fence, row.crash_count) == (job.state, job.fence, job.crashes)
            assert row.fence >= self.fences.get(job_id, 0)
            self.fences[job_id] = row.fence
            assert [e.seq for e in told] == list(range(row.seq - len(told) + 1, row.seq + 1)), "events have a gap"
            assert len(told) == row.seq or job.finished is not None
            assert sum(e.kind in ENDED for e in told) == job.ended == (job.state in ENDED)
            assert job.state not in ENDED or told[-1].kind == job.state
        assert {r.job for r in reserved} == {i for i, j in self.model.items() if j.state == "running"}
        assert all(sum(r.mib for r in reserved if r.device == name) <= mib for name, mib in TOTAL.items())
        for file in files:
            job = self.model[file.job]
            if file.published and file.stage == "publish":
                assert job.state == "succeeded"
                assert file.removed_at or (self.root / file.path).read_text() == f"{file.job} {rows[file.job].result['fence']}"
        for job_id, job in self.model.items():
            assert sum(f.job == job_id and f.stage == "publish" for f in files) == (job.state == "succeeded")


def machine(url, examples, steps=60, phases=(Phase.generate,)):
    "Returns what was seen: orders of events, events, the jobs of the fullest order."
    quiet = settings(phases=phases, max_examples=examples, stateful_step_count=steps, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    seen = Counter()
    run_state_machine_as_test(type("Machine", (Machine,), {"url": url, "seen": seen}), settings=quiet)
    return seen


@pytest.mark.timeout(900)
def test_any_order_of_events_keeps_the_promise(database):
    machine(database, int(os.environ.get("VIDGEN_TEST_EXAMPLES", 200 if database.startswith("sqlite") else 50)))  # × 60 steps; 2,000 × 60 in `make soak`


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_any_order_of_events_keeps_the_promise_at_length(database):
    seen = machine(database, 2000)
    record("R5", database=database.partition(":")[0], **seen, broken=0)


