"""The table of jobs under faults: crashes at every commit, races, poison, memory, full disks. What has `database` holds on SQLite and PostgreSQL."""
import errno
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from serving import record

from vidgen.errors import Canceled
from vidgen.serve import lapse, requests, storage
from vidgen.serve.claims import Claim
from vidgen.serve.jobs import Jobs
from vidgen.serve.records import ENDED, Conflict, Lost, NotFound, QueueFull, Unavailable
from vidgen.serve.tables import engine, refuse_network


@pytest.fixture
def clock():
    return [1000.0]


@pytest.fixture
def jobs(database, tmp_path, clock):
    made = Jobs.open(database, tmp_path / "files", least_free_gib=0, clock=lambda: clock[0])
    yield made
    made.close()


def write(claim, name="clip.mp4", data=b"frames"):
    (claim.staging / name).write_bytes(data)
    return claim.staging / name


def whole(jobs):
    "What must hold whenever the dust has settled; returns how many jobs are in each state."
    with jobs.reading() as ledger:
        rows = ledger.run(ledger.t.job.select()).all()
        reserved = {r.job for r in ledger.run(ledger.t.reservation.select())}
    for row in rows:
        told = jobs.events(row.id)
        swept = told[0].seq - 1 if row.state in ENDED else 0  # an hour after the end only the last event is kept
        assert [e.seq for e in told] == list(range(1 + swept, row.seq + 1)), f"{row.id}: events have a gap"
        assert sum(e.kind in ENDED for e in told) == (row.state in ENDED), f"{row.id}: {[e.kind for e in told]}"
        files = [a for a in jobs.artifacts(row.id) if a.stage == "publish"]
        assert not files or row.state == "succeeded"
        assert all(storage.sha256(a.path) == a.sha256 for a in files if not a.gone)
    assert reserved == {r.id for r in rows if r.state == "running"}
    return Counter(r.state for r in rows)


# what clients see

def test_a_key_is_one_job_however_many_ask_at_once(jobs):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: jobs.submit("noop", {"a": 1, "b": 2}, owner="ada", key="k"), range(16)))
    assert len({j.id for j in made}) == 1 and sum(not j.repeated for j in made) == 1
    assert jobs.submit("noop", {"b": 2, "a": 1}, owner="ada", key="k").repeated
    assert jobs.submit("noop", {}, owner="bob", key="k").id != made[0].id
    for other in (dict(spec={"a": 2}), dict(priority=1), dict(expires_in=5), dict(cancel_after=5), dict(model="m")):
        with pytest.raises(Conflict, match="another request"):
            jobs.submit("noop", **dict(spec={"a": 1, "b": 2}, owner="ada", key="k") | other)


def test_a_key_of_a_batch_is_the_whole_batch_however_many_ask_at_once(jobs):
    asked = [{"kind": "noop", "spec": {"n": n}} for n in range(3)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: jobs.submit_all(asked, owner="ada", key="b"), range(8)))
    assert len({tuple(j.id for j in one) for one in made}) == 1 and len(jobs.list()) == 3 and len({j.batch for j in made[0]}) == 1
    for other, how in ((asked[:2], {}), ([*asked, asked[0]], {}), (asked[::-1], {}), (asked, dict(priority=1))):
        with pytest.raises(Conflict, match="'b' stands for another request"):
            jobs.submit_all(other, owner="ada", key="b", **how)
    assert not jobs.submit("noop", {"n": 0}, owner="ada", key="b").repeated and not jobs.submit("noop", {"n": 0}, owner="ada", key="b/0").repeated
    jobs.cancel(made[0][0].id)
    jobs.delete(made[0][0].id)
    assert [j.id for j in jobs.submit_all(asked, owner="ada", key="b")] == [j.id for j in made[0][1:]], "what is left of it, and nothing new"


@pytest.mark.parametrize("how", [dict(priority=101), dict(expires_in=0), dict(expires_in=float("nan")), dict(expires_in=1e9), dict(key=""), dict(memory_mib=-1)])
def test_what_no_job_can_be_is_refused_before_it_is_written(jobs, how):
    with pytest.raises(ValueError):
        jobs.submit("noop", {}, **how)
    assert jobs.list() == []


def test_a_foreign_job_is_not_there(jobs):
    job = jobs.submit("noop", {}, owner="ada")
    for ask in (jobs.get, jobs.cancel, jobs.retry, jobs.delete):
        with pytest.raises(NotFound):
            ask(job.id, "eve")
    assert jobs.list("eve") == [] and jobs.get(job.id).state == "queued"


def test_so_many_may_wait_and_no_more(jobs):
    for _ in range(2):
        jobs.submit("noop", {}, owner="ada", most_queued=2)
    with pytest.raises(QueueFull):
        jobs.submit("noop", {}, owner="ada", most_queued=2)
    jobs.submit("noop", {}, owner="bob", most_queued=2)


def test_pages_of_jobs_have_no_gap_and_no_repeat(jobs):
    made = [jobs.submit("noop", {"n": n}, batch="b" if n % 2 else None).id for n in range(7)]
    seen, after = [], None
    while page := jobs.list(after=after, limit=3):
        seen += [j.id for j in page]
        after = page[-1].id
    assert seen == made[::-1] and [j.id for j in jobs.list(batch="b", newest_first=False)] == made[1::2]
    with pytest.raises(ValueError, match="nearest: queued"):
        jobs.list(state="queud")


def test_a_repeated_job_is_a_new_one_and_the_old_keeps_its_end(jobs):
    job = jobs.submit("noop", {"x": 1}, owner="ada", priority=3)
    with pytest.raises(Conflict):
        jobs.retry(job.id)
    jobs.cancel(job.id)
    again = jobs.retry(job.id, "ada")
    assert (again.spec, again.priority, again.state) == ({"x": 1}, 3, "queued") and again.id != job.id
    assert jobs.get(job.id).state == "canceled" and jobs.events(again.id)[0].body["retry_of"] == job.id


# R2, R10: zombies and poison

def one_zombie(jobs, clock, n):
    job = jobs.submit("noop", {"n": n})
    zombie = jobs.claim("asleep")
    clock[0] += 61
    assert jobs.reap() == 1
    clock[0] += 5
    awake = jobs.claim("awake")
    acts = [lambda: zombie.publish([write(zombie, data=b"late")], {}), zombie.renew, zombie.cancel_requested, zombie.canceled, lambda: zombie.fail({"code": "x", "message": ""}),
            lambda: zombie.event("progress", {}), lambda: zombie.stage("s"), lambda: zombie.preview(write(zombie, "p.png")), lambda: zombie.release("x")]
    for act in acts[: 9 if n == 0 else 1]:
        with pytest.raises(Lost):
            act()
    awake.publish([write(awake, data=b"in time")], {"n": n})
    with pytest.raises(Lost):
        zombie.publish([write(zombie, data=b"later")], {})
    assert [a.path.read_bytes() for a in jobs.artifacts(job.id)] == [b"in time"]


def test_a_zombie_publishes_nothing(jobs, clock):
    for n in range(20):
        one_zombie(jobs, clock, n)
    assert whole(jobs) == {"succeeded": 20}


def test_a_poisonous_job_ends_and_others_go_on(jobs, clock):
    poison = jobs.submit("noop", {}, priority=9)
    good = jobs.submit("noop", {})
    for _ in range(3):
        assert jobs.claim("victim").job.id == poison.id
        clock[0] += 61
        jobs.reap()
        clock[0] += 10
    jobs.claim("w").publish([], {})
    assert jobs.get(poison.id).error["code"] == "poison" and jobs.get(good.id).state == "succeeded"
    assert whole(jobs) == {"failed": 1, "succeeded": 1}


def test_stages_are_undone_last_one_first_and_only_then_the_job_has_failed(jobs, clock):
    job = jobs.submit("noop", {})
    claim = jobs.claim("w")
    for name, undo in (("upload", True), ("think", False), ("remote", True)):
        claim.stage(name, output={"of": name}, undo=undo)
    assert claim.fail({"code": "bad", "message": "no"}).state == "queued"
    second = jobs.claim("w")
    assert second.ending["state"] == "failed" and list(second.done) == ["upload", "think", "remote"]
    second.undone("remote")
    clock[0] += 61
    jobs.reap()  # the worker dies while it undoes
    clock[0] += 5
    third = jobs.claim("w")
    assert list(third.done) == ["upload", "think"]
    third.undone("upload")
    assert third.rolled_back().state == "failed"
    assert [e.body["stage"] for e in jobs.events(job.id) if e.kind == "rolled_back"] == ["remote", "upload"] and jobs.get(job.id).error["code"] == "bad"
    assert whole(jobs) == {"failed": 1}


def test_three_tries_with_growing_pauses_and_no_more(jobs, clock):
    job = jobs.submit("noop", {})
    for n in range(3):
        claim = jobs.claim("w")
        assert claim.job.attempt == n + 1
        claim.fail({"code": "network", "message": "hung up"}, retry=True, after=100.0 if n == 1 else None)
        clock[0] += 101
    assert jobs.get(job.id).state == "failed" and jobs.claim("w") is None
    waits = [e.body["after"] for e in jobs.events(job.id) if e.kind == "retry"]
    assert waits[0] <= 2 and waits[1] == 100.0


# R11: memory

def test_memory_is_never_promised_twice_and_the_largest_gets_its_turn(jobs, clock):
    totals, rng, running, waited = {"a/0": 24, "a/1": 48}, random.Random(7), [], {}
    with jobs.writing() as ledger:
        for name, mib in totals.items():
            ledger.run(ledger.t.device.insert().values(name=name, total_mib=mib, seen=ledger.now))
    for step in range(150):
        clock[0] += 5
        with jobs.writing() as ledger:
            ledger.run(ledger.t.device.update().values(seen=ledger.now))
        if len(jobs.list(state="queued")) < 6:
            job = jobs.submit("noop", {}, memory_mib=rng.choice([8, 8, 8, 16, 24, 40]))
            waited[job.id] = clock[0]
        if claim := jobs.claim(f"w{step % 9}", slot=rng.choice(list(totals))):
            running.append((claim, clock[0] + rng.choice([10, 30, 50])))
            waited[claim.job.id] = clock[0] - waited[claim.job.id]
        for claim, until in [r for r in running if r[1] < clock[0]]:
            running.remove((claim, until))
            claim.publish([], {})
        with jobs.reading() as ledger:
            held = ledger.run(ledger.t.job.select().where(ledger.t.job.c.state == "running")).all()
        assert all(sum(r.memory_mib for r in held if r.device == name) <= mib for name, mib in totals.items())
    done = [j for j in jobs.list(limit=1000) if j.state == "succeeded"]
    assert len([j for j in done if j.memory_mib == 40]) > 1 and max(waited[j.id] for j in done) < 300


def test_what_no_device_can_hold_fails_instead_of_waiting_for_ever(jobs, clock):
    with jobs.writing() as ledger:
        ledger.run(ledger.t.device.insert().values(name="d", total_mib=10, seen=ledger.now + 700))
    job = jobs.submit("noop", {}, memory_mib=11)
    jobs.expire()
    assert jobs.get(job.id).state == "queued"
    clock[0] += 601
    jobs.expire()
    assert jobs.get(job.id).error["code"] == "does_not_fit" and "10" in jobs.get(job.id).error["message"]


def test_what_the_device_of_its_place_can_not_hold_fails_instead_of_waiting_for_ever(jobs, clock):
    def seen(**devices):
        with jobs.writing() as ledger:
            t = ledger.t.device
            for name, mib in devices.items():
                if not ledger.run(t.update().where(t.c.name == name).values(seen=ledger.now)).rowcount:
                    ledger.run(t.insert().values(name=name, total_mib=mib, seen=ledger.now))
    seen(large=48, small=10)
    fits, wrong, free = jobs.submit("noop", {}, memory_mib=20, place=0), jobs.submit("noop", {}, memory_mib=20, place=3), jobs.submit("noop", {}, memory_mib=20)
    assert jobs.claim("w", slot="small") is None
    jobs.expire()
    clock[0] += 541
    seen(large=48, small=10)
    clock[0] += 100
    seen(large=48)  # the other one is restarted: no place is certain
    jobs.expire()
    assert {jobs.get(j.id).state for j in (fits, wrong, free)} == {"queued"}
    seen(small=10)
    jobs.expire()
    assert [jobs.get(j.id).state for j in (fits, wrong, free)] == ["queued", "failed", "queued"]
    error = jobs.get(wrong.id).error
    assert error["code"] == "does_not_fit" and all(word in error["message"] for word in ("20 MiB", "small", "10", "fewer frames"))
    assert {jobs.claim("w", slot="large").job.id for _ in range(2)} == {fits.id, free.id}


def test_owners_take_turns(jobs, clock):
    for owner in "aaaaaabbb":
        jobs.submit("noop", {}, owner=owner)
    order = []
    while claim := jobs.claim("w"):
        clock[0] += 1
        order.append(claim.job.owner)
        claim.publish([], {})
    assert "".join(order) == "ababab" + "aaa"


def test_what_nobody_waits_for_takes_its_turn_after_a_minute(jobs, clock):
    "A service that is never idle still does it: a minute later it goes between two jobs of the others, however urgent, and no more than that."
    def score():
        with jobs.writing() as ledger:
            requests.follow(ledger, str(clock[0]), "score")

    def turn():
        jobs.submit("noop", {}, owner="ada", priority=9)
        claim, clock[0] = jobs.claim("w"), clock[0] + 1
        claim.publish([], {})
        return claim.job.kind

    for _ in range(3):
        score()
        turn()
    assert {turn() for _ in range(54)} == {"noop"}
    clock[0] += 10
    score()
    assert [turn() for _ in range(10)] == ["score", "noop"] * 3 + ["noop"] * 4, "the youngest has yet to wait"


def test_what_an_answer_waits_for_goes_next(jobs):
    clips = [jobs.submit("noop", {}, owner="ada", view=view, priority=5) for view in (requests.AWAITED, "", "generate-video")]
    for claim in [jobs.claim("w") for _ in clips]:
        claim.publish([], {}, then=("score",))
    assert [j.priority for j in jobs.list(kind="score", newest_first=False)] == [6, requests.LAST, requests.LAST]
    jobs.submit("noop", {}, owner="bob", priority=5)
    assert jobs.claim("w").job.spec == {"of": clips[0].id}


def test_prompt_i_goes_to_device_i_modulo_n(jobs):
    with jobs.writing() as ledger:
        for name in ("d0", "d1"):
            ledger.run(ledger.t.device.insert().values(name=name, total_mib=10, seen=ledger.now))
    made = {jobs.submit("noop", {}, place=i).id: i for i in range(4)}
    for n in (1, 1, 0, 0):
        assert made[jobs.claim("w", slot=f"d{n}").job.id] % 2 == n
    assert jobs.claim("w", slot="d0") is None


# R15, R16: races

def test_a_thousand_late_jobs_expire_once(jobs, clock):
    with jobs.writing() as ledger:
        from vidgen.serve.requests import submit

        for _ in range(1000):
            submit(ledger, "noop", {}, expires_in=1)
    clock[0] += 2
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: jobs.expire(), range(3)))
    assert sum(found) == 1000 and jobs.counts()["states"]["expired"] == 1000 and jobs.claim("w") is None
    with jobs.reading() as ledger:
        assert Counter(e.kind for e in ledger.run(ledger.t.event.select())) == {"queued": 1000, "expired": 1000}


def racing(*acts):
    "Run all at the same moment; returns what each gave or raised."
    line, found = threading.Barrier(len(acts)), [None] * len(acts)

    def run(i):
        line.wait()
        try:
            found[i] = acts[i]()
        except Exception as err:
            found[i] = err
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(acts))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return found


def late(act, pause):
    time.sleep(pause)
    return act()


def expiry_races(jobs, clock, count):
    "The clock passes a job's time while it is claimed and expired: it runs or has expired, never both."
    ends, rng = Counter(), random.Random(5)
    for _ in range(count):
        job, pauses = jobs.submit("noop", {}, expires_in=1), [rng.uniform(0, 0.006) for _ in range(3)]

        def tick(pause=pauses[0]):
            time.sleep(pause)
            clock[0] += 1
        claim, expired, _ = racing(partial(late, partial(jobs.claim, "w"), pauses[1]), partial(late, jobs.expire, pauses[2]), tick)
        assert expired + jobs.expire() + (claim is not None) == 1
        if claim:
            claim.publish([], {})
        ends[jobs.get(job.id).state] += 1
    assert whole(jobs) == ends and set(ends) <= {"expired", "succeeded"}
    return ends


def test_expiry_races_with_claim(jobs, clock):
    expiry_races(jobs, clock, 25)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_expiry_races_with_claim_a_thousand_times(jobs, clock):
    ends = expiry_races(jobs, clock, 1000)
    record("R15", database=jobs.db.dialect.name, races=1000, ends=dict(ends))
    assert len(ends) == 2, "both sides must have won now and then"


def brought_to(jobs, clock, rng):
    "A job in one of the states it may be canceled in: (job, its claim or None, what its worker does next or None)."
    where = rng.choice(["queued", "claimed", "staged", "undoable", "waits", "publishes", "fails", "rolls back", "crashed"])
    job = jobs.submit("noop", {})
    if where == "queued":
        return where, job, None, lambda: jobs.claim("w")
    claim = jobs.claim("w")
    if where == "claimed":
        return where, job, claim, lambda: claim.event("progress", {"progress": 50})
    if where == "staged":
        return where, job, claim, lambda: claim.stage("one", [write(claim, "one.bin")])
    if where in ("undoable", "rolls back"):
        claim.stage("one", undo=True)
    if where == "publishes":
        path = write(claim)
        return where, job, claim, lambda: claim.publish([path], {})
    if where in ("waits", "rolls back"):
        claim.fail({"code": "x", "message": "y"}, retry=where == "waits")
        return where, job, None, lambda: jobs.claim("w")
    if where == "crashed":
        clock[0] += 61
        return where, job, claim, jobs.reap
    return where, job, claim, lambda: claim.fail({"code": "x", "message": "y"})


def on(claim, result):
    "What a worker does with a claim: undo, stop, or publish."
    if claim.ending:
        for name in reversed(list(claim.done)):
            claim.undone(name)
        claim.rolled_back()
    elif claim.cancel_requested():
        claim.canceled()
    else:
        claim.publish([write(claim)], result)


def brought_to_an_end(jobs, clock, job, claim):
    "What its worker, or the next one, does with a job until it has ended."
    for _ in range(9):
        if jobs.get(job.id).ended:
            return
        try:
            if claim is None or claim.job.id != job.id:
                clock[0] += 61
                jobs.reap()
                claim = jobs.claim("w2")
            else:
                on(claim, {})
        except Lost:
            claim = None


def cancel_races(jobs, clock, count):
    "R16: cancel a job in any state while its worker goes on."
    rng, seen, ends = random.Random(3), Counter(), Counter()
    for _ in range(count):
        where, job, claim, act = brought_to(jobs, clock, rng)
        canceled, done = racing(partial(late, partial(jobs.cancel, job.id), rng.uniform(0, 0.01)), act)
        assert not isinstance(canceled, Exception) or isinstance(canceled, Conflict), canceled
        assert not isinstance(done, Exception) or isinstance(done, (Canceled, Lost)), done
        taken = done if isinstance(done, Claim) else claim
        brought_to_an_end(jobs, clock, job, taken)
        now = jobs.get(job.id)
        assert now.ended and (now.state == "succeeded") == any(a.stage == "publish" for a in jobs.artifacts(job.id)), where
        if not isinstance(canceled, Conflict):
            assert now.state == "canceled" or now.state == "failed" and where in ("fails", "rolls back", "undoable"), (where, now.state)
        seen[where] += 1
        ends[now.state] += 1
    assert whole(jobs) == ends
    return seen, ends


def test_cancel_races_with_everything(jobs, clock):
    seen, ends = cancel_races(jobs, clock, 45)
    assert ends["canceled"] > 20 and len(seen) >= 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cancel_races_with_everything_a_thousand_times(jobs, clock):
    seen, ends = cancel_races(jobs, clock, 1000)
    record("R16", database=jobs.db.dialect.name, races=1000, canceled_while=dict(seen), ends=dict(ends))
    assert {"canceled", "succeeded"} <= set(ends) and len(seen) == 9


def test_after_a_cancel_was_accepted_a_job_never_succeeds(jobs, clock):
    job = jobs.submit("noop", {})
    claim = jobs.claim("w")
    assert jobs.cancel(job.id).cancel_requested and claim.renew() and claim.cancel_requested()
    with pytest.raises(Canceled):
        claim.publish([write(claim)], {})
    clock[0] += 61
    jobs.reap()  # the worker died with everything ready; the files stay unpublished
    assert jobs.get(job.id).state == "canceled" and jobs.artifacts(job.id) == []


def test_what_takes_too_long_is_stopped_wherever_it_is(jobs, clock):
    "Cancel-After: a queued job is canceled, a running one asked to stop and never succeeds, one that must be undone is undone."
    running, undoing, waiting = (jobs.submit("noop", {}, cancel_after=10, priority=p) for p in (9, 8, 1))
    for_ever = jobs.submit("noop", {}, priority=-1)
    claims = [jobs.claim("w") for _ in range(2)]
    claims[1].stage("one", undo=True)
    claims[1].fail({"code": "x", "message": "y"})
    assert jobs.expire() == 0
    clock[0] += 11
    assert jobs.expire() == 1 and jobs.get(waiting.id).state == "canceled" and jobs.get(waiting.id).error["code"] == "cancel_after"
    assert claims[0].cancel_requested() and jobs.events(running.id)[-1].body["message"].endswith("(Cancel-After)")
    with pytest.raises(Canceled):
        claims[0].publish([write(claims[0])], {})
    claims[0].canceled()
    again = jobs.claim("w")
    assert again.job.id == undoing.id, "however late, what was done is undone"
    again.undone("one")
    again.rolled_back()
    assert jobs.expire() == 0 and jobs.claim("w").job.id == for_ever.id and whole(jobs) == {"canceled": 2, "failed": 1, "running": 1}


def test_nothing_is_taken_up_whose_time_is_over(jobs, clock):
    job = jobs.submit("noop", {}, cancel_after=10)
    clock[0] += 10
    assert jobs.claim("w") is None
    jobs.expire()
    again = jobs.retry(job.id)
    assert again.cancel_at is None, "the time was the first request's"
    with pytest.raises(ValueError, match="30 days"):
        jobs.submit("noop", {}, cancel_after=float("inf"))


def test_a_job_that_was_begun_in_time_does_not_expire(jobs, clock):
    "Drained, crashed or tried again, it goes on; only what was never taken up is too late."
    for again in (lambda c: c.release("the worker was stopped"), lambda c: c.fail({"code": "x", "message": "y"}, retry=True, after=0), lambda c: lapse.gone(jobs, "w")):
        job = jobs.submit("noop", {}, expires_in=3)
        again(jobs.claim("w"))
        clock[0] += 10
        assert jobs.expire() == 0 and jobs.get(job.id).state == "queued"
        jobs.claim("w").publish([], {})
        assert jobs.get(job.id).state == "succeeded"
    late = jobs.submit("noop", {}, expires_in=3)
    clock[0] += 3
    assert jobs.claim("w") is None and jobs.expire() == 1
    assert jobs.get(late.id).state == "expired" and jobs.get(jobs.retry(late.id).id).expires_at == clock[0] + 3, "asked again is a new job"


def test_a_clock_that_is_set_shortens_no_time(jobs, clock):
    job = jobs.submit("noop", {}, cancel_after=10)
    clock[0] += 3601
    lapse.settle(jobs, 3600)
    jobs.expire()
    assert jobs.get(job.id).state == "queued" and jobs.get(job.id).cancel_at == job.cancel_at + 3600


def test_many_may_wait_and_their_number_is_not_counted_each_time(jobs, monkeypatch):
    from vidgen.serve import requests

    asked, real = [], requests.waiting
    monkeypatch.setattr(requests, "waiting", lambda *a: asked.append(1) or real(*a))
    for _ in range(20):
        jobs.submit("noop", {}, owner="ada", most_queued=1000)
    assert len(asked) <= 5  # once a second
    for _ in range(4):
        jobs.submit("noop", {}, owner="bob", most_queued=4)
    with pytest.raises(QueueFull):
        jobs.submit("noop", {}, owner="bob", most_queued=4)


def test_a_worker_that_hands_back_what_was_canceled_meanwhile_ends_it(jobs, clock):
    job = jobs.submit("noop", {})
    claim = jobs.claim("w")
    jobs.cancel(job.id)
    claim.release("drained")
    assert jobs.get(job.id).state == "canceled" and [e.kind for e in jobs.events(job.id)][-1] == "canceled" and whole(jobs)


def test_a_preview_that_comes_after_the_end_leaves_no_file(jobs, clock):
    jobs.submit("noop", {})
    claim = jobs.claim("w")
    late = claim.staging.parent / "late.png"
    late.write_bytes(b"a picture")
    claim.publish([], {})
    with pytest.raises(Lost):
        claim.preview(late)
    assert jobs.orphans() == []


def test_a_picture_of_the_next_try_takes_the_place_of_the_one_before(jobs, clock):
    jobs.submit("noop", {})
    for n in range(2):
        claim = jobs.claim(f"w{n}")
        (claim.staging / "preview-1.png").write_bytes(b"a picture")
        claim.preview(claim.staging / "preview-1.png")
        (claim.staging / "part.bin").write_bytes(b"half")
        claim.stage("make", [claim.staging / "part.bin"])
        claim.release("stopped")
    assert jobs.orphans() == [] and len(jobs.artifacts(claim.job.id)) >= 1


def test_many_workers_take_each_job_once(jobs):
    made = {jobs.submit("noop", {}).id for _ in range(40)}

    def work(n):
        found = []
        while claim := jobs.claim(f"w{n}"):
            found.append(claim.job.id)
            claim.publish([], {})
        return found
    with ThreadPoolExecutor(4) as pool:
        found = [i for taken in pool.map(work, range(4)) for i in taken]
    rest = work(9)  # on PostgreSQL a worker may have found all of them locked
    assert sorted(found + rest) == sorted(made) and whole(jobs) == {"succeeded": 40}


# R4: a process that dies before or after any commit, fsync, rename or delete

def dies_at(jobs, n):
    "From now on this process counts what reaches the disk, and dies at the n-th point (twice as many as there are acts: before and after each)."
    import shutil

    seen = [0]

    def counted(act):
        def counting(*args, **more):
            seen[0] += 1
            if seen[0] == n:
                os._exit(9)
            found = act(*args, **more)
            seen[0] += 1
            if seen[0] == n:
                os._exit(9)
            return found
        return counting
    for module, name in ((os, "replace"), (os, "fsync"), (os, "link"), (Path, "unlink"), (shutil, "rmtree")):
        setattr(module, name, counted(getattr(module, name)))
    jobs.db.dialect.do_commit = counted(jobs.db.dialect.do_commit)


def a_life(url, root, now, n):
    "What a service does with two jobs, until it dies; runs in a child."
    jobs = Jobs.open(url, root, least_free_gib=0, clock=lambda: now[0])
    dies_at(jobs, n)
    done, canceled = jobs.submit("noop", {"n": 1}, owner="a", key="1"), jobs.submit("noop", {"n": 2}, owner="a", key="2")
    print(done.id, canceled.id, flush=True)
    claim = jobs.claim("w")
    claim.event("progress", {"progress": 10})
    claim.preview(write(claim, "preview.png"))
    claim.stage("one", [write(claim, "one.bin")], output={"x": 1}, undo=True)
    claim.publish([write(claim), write(claim, "poster.png")], {"n": 1})
    claim = jobs.claim("w")
    claim.stage("one", [write(claim, "one.bin")], undo=True)
    jobs.cancel(claim.job.id)
    claim.canceled()
    claim = jobs.claim("w")
    claim.undone("one")
    claim.rolled_back()
    now[0] += 4 * 86400
    jobs.sweep()
    jobs.delete(canceled.id)


def another_life(url, root, now, n):
    "What time and troubles do to jobs, until the process dies."
    jobs = Jobs.open(url, root, least_free_gib=0, clock=lambda: now[0])
    dies_at(jobs, n)
    kept = jobs.submit("noop", {"n": 1}, owner="a", key="1")
    print(kept.id, flush=True)
    jobs.submit("noop", {"n": 2}, expires_in=1, priority=-1)
    jobs.submit("noop", {"n": 3}, cancel_after=1, priority=-1)
    jobs.keep(b"picture", "a.png")
    now[0] += 2
    jobs.expire()
    claim = jobs.claim("w")
    claim.fail({"code": "x", "message": "y"}, retry=True, after=0.0)
    claim = jobs.claim("w")
    claim.release("drained")
    claim = jobs.claim("w")
    storage.place_all(jobs, claim, [write(claim)], {"n": 1})
    now[0] += 61
    jobs.reap()
    other = jobs.submit("noop", {"n": 4})
    jobs.claim("v")
    lapse.gone(jobs, "v")
    jobs.cancel(other.id)
    jobs.retry(other.id)
    lapse.settle(jobs, 5.0)


def in_child(act):
    "Run in a forked process; returns its exit status."
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish_all(jobs, clock):
    "A new service takes over: everything accepted is brought to its end."
    for _ in range(20):
        clock[0] += 100
        jobs.reap()
        jobs.expire()
        while claim := jobs.claim("new"):
            on(claim, {"again": True})
        if not jobs.list(state="queued") and not jobs.list(state="running"):
            return


def fresh(database, space, n):
    "(address, folder) of nothing: SQLite gets a new file, PostgreSQL's tables are emptied, also of the name of the folder they knew."
    if database.startswith("sqlite"):
        return database.replace("vidgen.db", f"{n}.db"), space / str(n)
    jobs = Jobs.open(database, space)
    with jobs.writing() as ledger:
        for table in reversed(ledger.t.meta.sorted_tables):
            ledger.run(table.delete())
    jobs.close()
    return database, space / str(n)


def one_death(life, url, root, n, capfd):
    "Die at the n-th point, then check what a new service makes of it; returns the exit status of the one that died."
    clock = [1000.0]
    status = in_child(lambda: life(url, root, [1000.0], n))
    accepted = capfd.readouterr().out.split()
    jobs = Jobs.open(url, root, least_free_gib=0, clock=lambda: clock[0])
    finish_all(jobs, clock)
    assert set(whole(jobs)) <= set(ENDED), n
    for job_id in accepted[:1]:
        files = jobs.artifacts(job_id)
        assert jobs.get(job_id).state == "succeeded" and sum(f.name == "clip.mp4" for f in files) == 1, n
    again = jobs.submit("noop", {"n": 1}, owner="a", key="1")
    assert not accepted or again.id == accepted[0], "an accepted job is found by its key"
    jobs.sweep()
    assert not list((root / "staging").glob("*")), n
    jobs.close()
    return status


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("life", "least"), [(a_life, 60), (another_life, 40)], ids=["work", "troubles"])
def test_dying_at_any_point_loses_nothing_and_publishes_nothing_twice(database, space, capfd, life, least):
    n, status = 0, 9
    while status == 9:
        n += 1
        status = one_death(life, *fresh(database, space, n), n, capfd)
    with capfd.disabled():
        record("R4", database=database.partition(":")[0], life=life.__name__, points=n - 1, lost=0, published_twice=0)
    assert status == 0 and n > least, f"{n} points, then exit status {status}"


# R6, R7: disks and databases that can't

def test_a_disk_that_is_nearly_full_takes_nothing_new(database, tmp_path):
    jobs = Jobs.open(database, tmp_path, least_free_gib=2**30)
    with pytest.raises(Unavailable, match="free some space") as err:
        jobs.submit("noop", {})
    assert err.value.code == "storage_full" and jobs.list() == []
    with pytest.raises(Unavailable):
        jobs.keep(b"x", "a.png")
    jobs.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_file_the_disk_does_not_take_is_not_published(jobs, monkeypatch, error):
    job = jobs.submit("noop", {})
    claim = jobs.claim("w")
    path = write(claim)
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(error, os.strerror(error))))
    with pytest.raises(OSError):
        claim.publish([path], {})
    assert jobs.artifacts(job.id) == [] and jobs.get(job.id).state == "running"
    monkeypatch.setattr(os, "fsync", real)
    claim.publish([path], {})
    assert whole(jobs) == {"succeeded": 1}


@pytest.fixture
def sqlite(tmp_path):
    made = Jobs.open(f"sqlite:///{tmp_path}/db/vidgen.db", tmp_path / "files", least_free_gib=0)
    yield made
    made.close()


def test_a_full_database_says_so_and_recovers(sqlite):
    sqlite.submit("noop", {})
    with sqlite.db.connect() as conn:
        pages = conn.exec_driver_sql("PRAGMA page_count").scalar()
    from sqlalchemy import event

    limit = [pages]
    event.listen(sqlite.db, "checkout", lambda raw, *_: raw.execute(f"PRAGMA max_page_count={limit[0]}"))
    with pytest.raises(Unavailable) as err:
        for _ in range(50):
            sqlite.submit("noop", {"prompt": "x" * 4000})
    assert err.value.code == "storage_full"
    limit[0] = 10**6
    assert sqlite.submit("noop", {}).state == "queued"
    whole(sqlite)


def test_a_read_only_database_says_so_and_recovers(sqlite):
    from sqlalchemy import event

    readonly = [1]
    event.listen(sqlite.db, "checkout", lambda raw, *_: raw.execute(f"PRAGMA query_only={readonly[0]}"))
    with pytest.raises(Unavailable, match="can't be written"):
        sqlite.submit("noop", {})
    readonly[0] = 0
    assert sqlite.submit("noop", {}).state == "queued"


def test_a_lock_that_is_held_is_waited_for(sqlite):
    other = engine(str(sqlite.db.url))
    with other.begin() as conn:
        conn.exec_driver_sql("UPDATE about SET value = value")
        waiting = threading.Thread(target=lambda: sqlite.submit("noop", {}))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and sqlite.list() == [], "reading never waits"
    waiting.join(20)
    other.dispose()
    assert len(sqlite.list()) == 1


def test_who_finds_no_free_connection_is_told_so(database, tmp_path):
    "R7: the pool is exhausted; whoever asks is refused in time, and when a connection is free all is well."
    jobs = Jobs.open(database, tmp_path / "files", least_free_gib=0)
    pool = jobs.db.pool
    pool._timeout = 0.3  # 10 s would be waited
    held = []
    with pytest.raises(Exception, match="limit"):
        while True:
            held.append(jobs.db.connect())
    for act in (lambda: jobs.submit("noop", {}), lambda: jobs.list(), jobs.probe):
        with pytest.raises(Unavailable, match="try again"):
            act()
    for conn in held:
        conn.close()
    assert jobs.submit("noop", {}).state == "queued"
    jobs.probe()
    jobs.close()


def test_a_network_file_system_is_refused(tmp_path, monkeypatch):
    import psutil

    there = [type("Part", (), {"mountpoint": str(tmp_path), "fstype": "nfs4"})]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: there)
    with pytest.raises(ValueError, match="network file system"):
        refuse_network(tmp_path / "a" / "vidgen.db")


def test_a_damaged_database_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/vidgen.db"
    jobs = Jobs.open(url, tmp_path)
    for n in range(50):
        with jobs.writing() as ledger:
            ledger.run(ledger.t.turn.insert().values(owner="x" * 3000 + str(n), served_at=0.0))
    jobs.close()
    data = bytearray((tmp_path / "vidgen.db").read_bytes())
    data[-8000:-4000] = b"\x5a" * 4000
    (tmp_path / "vidgen.db").write_bytes(data)
    with pytest.raises((ValueError, Exception), match="damaged|malformed"):
        Jobs.open(url, tmp_path, check=True)


# R19: files

def test_a_sweep_spares_what_an_unfinished_job_was_given(tmp_path):
    "Also for a job that waits longer than its picture is kept; when it has ended, the picture goes."
    clock = [1000.0]
    jobs = Jobs.open(f"sqlite:///{tmp_path}/vidgen.db", tmp_path / "artifacts", least_free_gib=0, clock=lambda: clock[0])
    picture, film, other = (jobs.keep(bytes([i]), f"{i}.png") for i in range(3))
    job = jobs.submit("generate", {"image": picture.id, "extends": {"film": film.id}}, expires_in=30 * 86400)
    clock[0] += 8 * 86400
    assert jobs.sweep() == 1 and other.path.exists() is False
    claim = jobs.claim("w")
    assert jobs.sweep() == 0 and picture.path.exists() and film.path.exists() and not jobs.kept(picture.id).gone
    assert claim.job.id == job.id
    claim.publish([], {})
    assert jobs.sweep() == 2 and not picture.path.exists() and jobs.kept(film.id).gone
    jobs.close()


def test_a_sweep_spares_what_another_database_or_another_folder_knows(tmp_path):
    made = {}
    for name in ("one", "two"):
        jobs = made[name] = Jobs.open(f"sqlite:///{tmp_path}/{name}.db", tmp_path / "files", least_free_gib=0)
        job = jobs.submit("noop", {})
        claim = jobs.claim("w")
        (claim.staging / "x.mp4").write_bytes(name.encode())
        path = claim.publish([claim.staging / "x.mp4"], {}) and jobs.artifacts(job.id)[0].path
        os.utime(path, (1e9, 1e9))  # old enough to be cleared
        jobs.submit("noop", {})
        staged = jobs.claim("w").staging
        assert jobs.sweep() == 0 and staged.exists()
    made["two"].sweep()  # in a folder that the first one marked
    assert all(a.path.exists() and not a.gone for jobs in made.values() for j in jobs.list(state="succeeded") for a in jobs.artifacts(j.id))
    storage.refuse_foreign(made["one"])
    with pytest.raises(ValueError, match="give each database its own folder"):
        storage.refuse_foreign(made["two"])
    elsewhere = Jobs.open(f"sqlite:///{tmp_path}/one.db", tmp_path / "elsewhere", least_free_gib=0)
    elsewhere.sweep()  # as when the disk is not mounted
    assert not made["one"].artifacts(made["one"].list(state="succeeded")[0].id)[0].gone
    for jobs in (*made.values(), elsewhere):
        jobs.close()


def one_sweep(url, root, n):
    "Die at the n-th point of a sweep; files and rows agree then, and all is gone after the next one."
    def sweep():
        jobs = Jobs.open(url, root, least_free_gib=0, clock=lambda: 1e9)
        dies_at(jobs, n)
        jobs.sweep()

    jobs = Jobs.open(url, root, least_free_gib=0, clock=lambda: 1000.0)
    job = jobs.submit("noop", {})
    claim = jobs.claim("w")
    claim.publish([write(claim), write(claim, "b.png")], {})
    sent = jobs.keep(b"picture", "a.png")
    (root / "staging" / f"{job.id}.7").mkdir()
    jobs.close()
    status = in_child(sweep)
    jobs = Jobs.open(url, root, least_free_gib=0, clock=lambda: 1e9)
    for file in jobs.artifacts(job.id):
        assert file.expires_at and (file.gone or file.path.exists()), "a row promises a file that is gone"
    for path in jobs.orphans():
        os.utime(path, (0, 0))
    jobs.sweep()
    assert jobs.orphans() == [] and all(f.gone and not f.path.exists() for f in (*jobs.artifacts(job.id), jobs.kept(sent.id)))
    jobs.close()
    return status


def test_the_sweeper_may_die_anywhere(database, space):
    n, status = 0, 9
    while status == 9:
        n += 1
        status = one_sweep(*fresh(database, space, n), n)
    assert status == 0 and n > 5


def test_a_file_whose_job_still_runs_is_no_orphan_and_a_foreign_one_is_kept(jobs):
    job = jobs.submit("noop", {})
    claim = jobs.claim("w")
    rows = storage.place_all(jobs, claim, [write(claim)], {})
    (jobs.root / "videos" / "holiday.mp4").write_bytes(b"mine")
    assert [p.name for p in jobs.orphans()] == ["holiday.mp4"]
    claim.fail({"code": "x", "message": "y"})
    assert {p.name for p in jobs.orphans()} == {"holiday.mp4", Path(rows[0]["path"]).name}
    for path in jobs.orphans():
        os.utime(path, (0, 0))
    jobs.sweep()
    assert [p.name for p in jobs.orphans()] == ["holiday.mp4"] and jobs.get(job.id).state == "failed"


def test_files_are_kept_as_long_as_the_settings_say(database, tmp_path):
    from vidgen.settings import Storage

    kept = storage.tiers(Storage(uploads_days=2, processed_days=0.5, videos_days=10, temp_hours=3))
    now = [1000.0]
    jobs = Jobs.open(database, tmp_path / "files", least_free_gib=0, tiers=kept, clock=lambda: now[0])
    sent = jobs.keep(b"x", "a.png")
    jobs.submit("noop", {})
    claim = jobs.claim("w")
    claim.preview(write(claim, "p.png"))
    claim.stage("one", [write(claim, "one.bin")])
    claim.publish([write(claim)], {})
    with jobs.reading() as ledger:
        rows = {r.tier: r.expires_at - 1000 for r in ledger.run(ledger.t.artifact.select())}
    assert rows == {"uploads": 2 * 86400, "processed": 0.5 * 86400, "videos": 10 * 86400, "temp": 3 * 3600} == kept
    for hours, gone in ((4, {"temp"}), (13, {"temp", "processed"}), (49, {"temp", "processed", "uploads"}), (241, set(kept))):
        now[0] = 1000 + 3600 * hours
        jobs.sweep()
        with jobs.reading() as ledger:
            assert {r.tier for r in ledger.run(ledger.t.artifact.select()) if r.removed_at} == gone
    assert not sent.path.exists()
    jobs.close()


def test_a_row_whose_file_somebody_took_away_says_so(jobs):
    job = jobs.submit("noop", {})
    claim = jobs.claim("w")
    claim.publish([write(claim)], {})
    jobs.artifacts(job.id)[0].path.unlink()
    jobs.sweep()
    assert jobs.artifacts(job.id)[0].gone
