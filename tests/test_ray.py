"""Ray: workers that are really killed, trials that are really stopped, and what is said where Ray isn't."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vidgen import runs
from vidgen.errors import Canceled
from vidgen.progress import Cancel
from vidgen.train import cluster, trainer
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
