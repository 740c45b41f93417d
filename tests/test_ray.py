"""Ray: workers that are really killed, trials that are really stopped, and what is said where Ray isn't."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vidgen import runs
from vidgen.errors import Canceled
from vidgen.progress import Cancel
from vidgen.space import Range
from vidgen.train import cluster, scaling, trainer, tune
from vidgen.train.config import Recipe

TINY = dict(data="world:12", held="world:4/held", steps=6, batch=2, rank=2, latents="mean", save_every=2, log_every=1, validate_every=3, prompts=0, noise_levels=2, warmup=2, seed=3, device="cpu")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}


# without Ray

@pytest.mark.parametrize("call", [lambda: cluster.train_on(Recipe(data="world:4"))])
def test_without_ray_the_error_names_the_extra(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"vidgen\[ray\]"):
        call()


def test_a_command_without_ray_is_one_sentence(tmp_path, monkeypatch, capsys):
    from vidgen.cli import main

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path / "runs"))
    (tmp_path / "a.yaml").write_text("data: world:4\n")
    assert main(["train", str(tmp_path / "a.yaml"), "--ray-workers", "2"]) == 1
    assert "vidgen[ray]" in capsys.readouterr().err and not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("wrong", [dict(workers=0), dict(restarts=-1)])
def test_numbers_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="at least one worker"):
        cluster.train_on(Recipe(data="world:4"), **wrong)


def test_a_cluster_that_does_not_start_is_tried_twice_and_explained():
    from types import SimpleNamespace

    from vidgen.cli import explain

    calls = []

    def init(**how):
        calls.append("init")
        raise RuntimeError("The current node timed out during startup.")
    with pytest.raises(ConnectionError, match="try again when less is running") as caught:
        cluster._started(SimpleNamespace(init=init, shutdown=lambda: calls.append("shutdown")), 1)
    assert calls == ["init", "shutdown"] * 2 and "not foreseen" not in explain(caught.value)[0]


# what leads the workers, without a cluster

@pytest.fixture
def run(tmp_path):
    return runs.Run.create("demo", {}, root=tmp_path, trackers=[])


def test_a_cancel_becomes_a_file_that_workers_hear(run):
    cancel, worker, over = Cancel(), Cancel(), threading.Event()
    threading.Timer(0.5, cancel.cancel, ["SIGTERM"]).start()
    assert cluster.watched(lambda: cluster.asked_by_file(run, worker, over), run, lambda event: None, cancel) is None
    assert worker.canceled and worker.reason == "SIGTERM"


@pytest.mark.parametrize("kind, error", [("ValueError", ValueError), ("FloatingPointError", FloatingPointError), ("TypeError", TypeError)])
def test_a_workers_error_is_raised_as_itself(run, kind, error):
    (run.path / cluster.BROKEN).write_text(json.dumps({"kind": kind, "text": "lower lr"}))
    with pytest.raises(error, match="lower lr"):
        cluster._ended(run, RuntimeError("ray's own words"), Cancel(), 2, 0)
    assert runs.Run.open(run.path).status == "failed"


def test_workers_lost_too_often(run):
    with pytest.raises(RuntimeError, match="lost 4 times.*vidgen train --resume .* --ray-workers 2"):
        cluster._ended(run, RuntimeError("worker died"), Cancel(), 2, 3)
    assert runs.Run.open(run.path).manifest["restarts"] == 3


def test_a_canceled_run_is_canceled(run):
    cancel = Cancel()
    cancel.cancel("SIGTERM")
    with pytest.raises(Canceled, match="SIGTERM"):
        cluster._ended(run, None, cancel, 2, 0)
    assert runs.Run.open(run.path).status == "canceled"


# a cluster of this machine

def until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition(), "it didn't happen"


def go(tmp_path, facts, *more):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(facts))
    code = "import sys; from vidgen.cli import console; sys.argv[0] = 'vidgen'; console()"
    return subprocess.Popen([sys.executable, "-c", code, "train", str(tmp_path / "r.yaml"), *more], env=ENV | {"VIDGEN_STORAGE_RUNS": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(path):
    return load_file(trainer.Shelf(path / "checkpoints", 2).last)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_goes_on_at_the_last_checkpoint(tmp_path):
    "Two workers, one of them killed with -9 after a checkpoint; then the same two, undisturbed, by torchrun."
    pytest.importorskip("ray")
    facts = TINY | dict(steps=40, validate_every=20, caption_dropout=0.0)
    child = go(tmp_path, facts, "--ray-workers", "2")
    until(lambda: list(tmp_path.glob("train-*/checkpoints/step-*.safetensors")) or child.poll() is not None)
    assert child.poll() is None, child.communicate()[0]
    path = next(tmp_path.glob("train-*"))
    first = [json.loads(line) for line in (path / cluster.WORKERS).read_text().splitlines()]
    os.kill(next(w["pid"] for w in first if w["rank"] == 1), signal.SIGKILL)
    out = child.communicate(timeout=600)[0]
    assert child.returncode == 0, out
    done = runs.Run.open(path)
    assert done.status == "succeeded" and done.manifest["restarts"] == 1 and done.manifest["workers"] == 2 and done.manifest["result"]["steps"] == 40
    steps = [r["step"] for r in done.metrics() if "train/loss" in r]
    again = next(i for i, (a, b) in enumerate(zip(steps, steps[1:], strict=False)) if b <= a) + 1 if len(steps) > 40 else steps.index(max(steps)) + 1
    assert steps.count(1) == 1 and steps[-1] == 40 and sorted(set(steps)) == list(range(1, 41)) and again > 1, steps
    plain = tmp_path / "plain"
    code = tmp_path / "go.py"
    code.write_text("import sys; from vidgen.cli import console; console()")
    calm = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(code), "train", str(tmp_path / "r.yaml")],
                          env=ENV | {"VIDGEN_STORAGE_RUNS": str(plain), "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300)
    assert calm.returncode == 0, calm.stdout + calm.stderr
    a, b = weights(path), weights(next(plain.glob("train-*")))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# searches

SEARCH = dict(recipe="r.yaml", search="asha", trials=2, space={"lr": {"low": 1e-4, "high": 1e-2, "log": True}})


def search_file(tmp_path, recipe=(), **facts):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY | dict(recipe)))
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(SEARCH | facts))
    return tmp_path / "tune.yaml"


@pytest.mark.parametrize("facts, says", [
    (dict(search="ahsa"), "nearest: asha"), (dict(space={"learning_rate": [1e-3]}), "unknown key of a recipe"), (dict(space={"lr": {"low": 1e-2, "high": 1e-4}}), "lr: a range goes from low to high"),
    (dict(search="pbt", space={"rank": [2, 4]}), "rank can't change then"), (dict(search="pbt", trials=1), "two or more"), (dict(space={}), "under `space:`"), (dict(trails=3), "nearest: trials"),
    (dict(space={"rank": [2, 0]}), "rank is at least 1"), (dict(set={"validate_every": 0}), "validate_every 0"), (dict(keep=1), "keep is too small"),
])
def test_searches_that_are_refused(tmp_path, facts, says):
    with pytest.raises((ValueError, TypeError), match=says) as caught:
        tune.read_search(search_file(tmp_path, **facts))
    assert "tune.yaml" in str(caught.value)


def test_a_search_reads_its_file_and_what_wins_over_it(tmp_path):
    found = tune.read_search(search_file(tmp_path, space={"lr": [1e-3, 2e-3], "rank": {"low": 2, "high": 8}}, set={"steps": 8}), {"batch": 3})
    assert found.recipe.steps == 8 and found.recipe.batch == 3 and found.milestone == 3 and found.space["rank"] == Range(2, 8)
    with pytest.raises(FileNotFoundError, match="there is no search .*none.yaml: it is a YAML file of `recipe:`, `space:`"):
        tune.read_search(tmp_path / "none.yaml")


def test_tune_without_ray_is_one_sentence(tmp_path, monkeypatch, capsys):
    from vidgen.cli import main

    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["tune", str(search_file(tmp_path))]) == 1 and "vidgen[ray]" in capsys.readouterr().err
    assert main(["tune"]) == 2 and "--resume" in capsys.readouterr().err


def test_another_trials_weights_are_taken_with_a_note(tmp_path):
    "The learner of lr 0.001 goes on from a donor's second step at lr 0.002; nothing else may differ."
    donor = trainer.train(Recipe(**TINY | dict(steps=2, validate_every=2)), run=runs.Run.create("donor", {}, root=tmp_path, trackers=[])).run
    given = tmp_path / "given"
    given.mkdir()
    (given / tune.CHECKPOINT).write_bytes(trainer.Shelf(donor.path / "checkpoints", 2).last.read_bytes())
    (given / trainer.IDENTITY).write_text(json.dumps(json.loads((donor.path / trainer.IDENTITY).read_text()) | {"recipe": Recipe(**TINY).to_dict()}))
    (given / "from.json").write_text(json.dumps({"step": 2, "trial": "donor"}))
    mine = tune.trial_run(tmp_path, "mine", Recipe(**TINY))
    with pytest.raises(ValueError, match="can't go on with rank 2 -> 4"):
        tune.adopt(mine, Recipe(**TINY | dict(rank=4)), given)
    r = Recipe(**TINY | dict(lr=2e-3, validate_every=2))
    tune.adopt(mine, r, given)
    told = []
    done = trainer.train(r, run=mine, force=True, told=lambda it, losses: told.append((it.state.step, losses["mean"])))
    rows = [row for row in mine.metrics() if "train/loss" in row]
    assert mine.manifest["changes"] == [{"step": 2, "trial": "donor", "changed": ["lr 0.001 -> 0.002"]}]
    assert [row["step"] for row in rows] == [3, 4, 5, 6] and rows[0]["train/lr"] == pytest.approx(2e-3) and done.steps == 6
    assert [step for step, _ in told] == [4, 6] and told[-1][1] == [row["held/loss/mean"] for row in mine.metrics() if "held/loss/mean" in row][-1]


def searched(tmp_path, *args):
    code = "import sys; from vidgen.cli import console; sys.argv[0] = 'vidgen'; console()"
    done = subprocess.run([sys.executable, "-c", code, "tune", *map(str, args), "--json"], env=ENV | {"VIDGEN_STORAGE_RUNS": str(tmp_path / "runs")}, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    path, = (tmp_path / "runs").glob("tune-*")
    return json.loads(done.stdout), runs.Run.open(path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_asha_ends_hopeless_trials_early(tmp_path):
    "One after the other, so that it is the same each time; the table has the best first."
    pytest.importorskip("ray")
    pytest.importorskip("optuna")
    file = search_file(tmp_path, dict(steps=8, validate_every=2, warmup=0), trials=5, together=1, every=2, keep=2, seed=1, space={"lr": {"low": 1e-5, "high": 3e-1, "log": True}, "rank": [2, 4], "batch": {"low": 1, "high": 3}})
    found, run = searched(tmp_path, file)
    rows = found["trials"]
    assert len(rows) == 5 and [r["best"] for r in rows] == sorted(r["best"] for r in rows) and run.manifest["result"]["best"] == rows[0]["setting"]
    ended = [r for r in rows if r["status"] == "canceled"]
    assert ended and all(r["steps"] < 8 for r in ended) and any(r["status"] == "succeeded" and r["steps"] == 8 for r in rows)
    assert run.manifest["result"]["ended_early"] == len(ended) and run.manifest["result"]["steps"] < run.manifest["result"]["steps_of_a_grid"]
    assert {r["setting"]["rank"] for r in rows} <= {2, 4} and {r["setting"]["batch"] for r in rows} <= {1, 2, 3}
    assert (run.path / "artifacts/tune.png").stat().st_size > 5000 and len((run.path / "artifacts/tune.csv").read_text().splitlines()) == 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pbt_goes_on_from_better_weights_at_another_rate(tmp_path):
    pytest.importorskip("ray")
    file = search_file(tmp_path, dict(steps=6, validate_every=2, warmup=0), search="pbt", trials=2, together=1, every=2, seed=1)
    found, run = searched(tmp_path, file)
    changes = [(row["trial"], c) for row in found["trials"] for c in row["changes"]]
    others = [(mine, c) for mine, c in changes if c["trial"] != mine]
    assert others and all(c["changed"][0].startswith("lr ") and c["step"] in (2, 4) for _, c in others), changes
    assert any(row["steps"] == 6 for row in found["trials"])


def test_a_population_that_is_limited_can_still_meet():
    "Never more trials at once than asked, whatever the number of cores, and by cores alone: a limit by number would count those that wait."
    from types import SimpleNamespace

    pbt = tune.Search(Recipe(**TINY), {"lr": Range(1e-4, 1e-2)}, search="pbt", trials=8)
    for count in range(1, 40):
        machine = SimpleNamespace(nodes=lambda: [{"Alive": True}, {"Alive": False}], cluster_resources=lambda count=count: {"CPU": float(count)})
        for together in range(1, 9):
            each = tune.cores(replace(pbt, together=together), machine)
            assert each <= count and 1 <= count // each <= together
        assert tune.cores(pbt, machine) == tune.cores(replace(pbt, search="asha", together=2), machine) == 1
    several = SimpleNamespace(nodes=lambda: [{"Alive": True}] * 2, cluster_resources=lambda: {"CPU": 8.0})
    with pytest.raises(ValueError, match="this cluster has several"):
        tune.cores(replace(pbt, together=2), several)


def test_what_pbt_multiplies_stays_a_recipe():
    back = tune.within({"batch": Range(1, 4), "caption_dropout": Range(0.1, 0.9), "clip": [0.5, 1.0]})
    assert back({"batch": 0, "caption_dropout": 1.08, "clip": 1.2, "lr": 5.0}) == {"batch": 1, "caption_dropout": 0.9, "clip": 1.2, "lr": 5.0}
    assert back({"batch": 9.6, "caption_dropout": 0.5, "clip": 0.5}) == {"batch": 4, "caption_dropout": 0.5, "clip": 0.5} and type(back({"batch": 1.0, "caption_dropout": 0.5})["batch"]) is int


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_search_goes_on(tmp_path):
    "Killed with -9, all of it, once a trial is over and another has begun: the first is not trained again, the second goes on at its checkpoint."
    pytest.importorskip("ray")
    file = search_file(tmp_path, dict(steps=4, validate_every=2, save_every=1, warmup=0), trials=2, together=1, keep=4, seed=1)
    code = "import sys; from vidgen.cli import console; sys.argv[0] = 'vidgen'; console()"
    child = subprocess.Popen([sys.executable, "-c", code, "tune", str(file)], env=ENV | {"VIDGEN_STORAGE_RUNS": str(tmp_path / "runs")}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    begun = lambda: sorted((tmp_path / "runs").glob("tune-*/trials/*/manifest.json"), key=lambda p: p.stat().st_ctime)
    ended = lambda: [p for p in begun() if json.loads(p.read_text())["status"] == "succeeded"]
    until(lambda: child.poll() is not None or ended() and any(p.parent.glob("checkpoints/*") for p in begun() if p not in ended()), 500)
    assert child.poll() is None, child.stderr.read()
    family = psutil.Process(child.pid).children(recursive=True)
    for process in [*family, child]:
        process.kill()
    child.wait()
    first, second = ended()[0].parent, next(p.parent for p in begun() if p not in ended())
    kept = {p: p.read_bytes() for p in (first / "metrics.jsonl", first / "adapter/pytorch_lora_weights.safetensors")}
    found, run = searched(tmp_path, "--resume", next((tmp_path / "runs").glob("tune-*")))
    assert run.status == "succeeded" and run.manifest["resumed"] == 1 and len(found["trials"]) == 2 and all(row["steps"] == 4 for row in found["trials"])
    assert all(p.read_bytes() == data for p, data in kept.items())
    steps = [row["step"] for row in runs.Run.open(second).metrics() if "train/loss" in row]
    assert steps == [1, 2, 3, 4] and runs.Run.open(second).manifest["resumed"] >= 1


# processes of this machine

def test_a_process_that_fails_ends_the_others():
    code = "import os, sys, time; time.sleep(0 if os.environ['RANK'] == '1' else 60); sys.exit('out of luck')"
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="one of 2 processes failed: out of luck"):
        scaling.together(2, code)
    assert time.monotonic() - began < 50
    with pytest.raises(RuntimeError, match="longer than 1 s"):
        scaling.together(1, "import time; time.sleep(60)", timeout=1.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_messages_are_what_the_formula_says_and_slices_are_slices(tmp_path):
    r = Recipe(**TINY | dict(method="full", data="world:4", held="world:1/held", batch=1, steps=3, lr=1e-5, validate_every=0))
    copies, slices = (scaling.measure(r, 2, s, steps=1, root=tmp_path) for s in ("ddp", "fsdp"))
    for row in (copies, slices):
        assert row["sent_mb"] == pytest.approx(row["expected_mb"], abs=1e-4)
    assert set(copies["calls"]) == {"allreduce_"} and {"_allgather_base_", "_reduce_scatter_base_"} <= set(slices["calls"])
    assert slices["held_mib"] == pytest.approx(copies["held_mib"] / 2, rel=0.05)
