"""Runs under bad weather: crashes, races, full disks, broken trackers."""
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

import vidgen
from vidgen import runs
from vidgen.errors import Canceled
from vidgen.runs import Run, Tracker, environment, find, params_hash, peak_memory, root

MANIFEST = {"name", "status", "started", "ended", "seconds", "params", "params_hash", "seeds", "device", "precision", "model", "model_hash", "data_hash",
            "stages", "peak_memory", "result", "error", "environment", "process"}


def python(code, *args, **env):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env={**os.environ, **env}, timeout=60)


def test_smoke_manifest_holds_everything(tmp_path):
    with Run.create("all", {"seed": 3, "steps": 25, "run_dir": "x"}, root=tmp_path) as run:
        with run.stage("denoise"):
            pass
        run.record(model="shapes-t2v", model_hash="ab", data_hash="cd", precision="fp16", device="cpu")
        run.finish(score=np.float32(0.5))
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert MANIFEST <= set(manifest) and "run_dir" not in manifest["params"]
    assert {"commit", "clean", "python", "platform", "packages", "gpus", "threads"} <= set(manifest["environment"])
    assert manifest["seeds"] == [3] and manifest["result"] == {"score": 0.5} and manifest["status"] == "succeeded"
    assert manifest["peak_memory"]["host_gib"] > 0 and manifest["ended"] > manifest["started"]
    assert re.fullmatch(r"all-\d{8}-\d{6}-[0-9a-f]{8}", run.path.name) and run.path.name.endswith(params_hash({"steps": 25, "seed": 3}))


def test_commit_and_cleanness_are_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[storage]\nruns = elsewhere\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    assert environment()["clean"] is True and re.fullmatch("[0-9a-f]{40}", environment()["commit"])
    (tmp_path / "settings.ini").write_text("[storage]\nruns = elsewhere \n")
    assert environment()["clean"] is False
    assert root() == tmp_path / "elsewhere"


def test_runs_of_one_second_never_share_a_folder(tmp_path):
    made, threads = [], []
    for _ in range(8):
        threads.append(threading.Thread(target=lambda: made.append(Run.create("race", {}, root=tmp_path).path)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8


def test_a_reader_never_sees_half_a_manifest(tmp_path):
    run = Run.create("torn", {"text": "x" * 20000}, root=tmp_path)
    stop, bad = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                json.loads((run.path / "manifest.json").read_text())
            except ValueError as err:
                bad.append(err)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        run.record(note="y" * (i * 100))
    stop.set()
    reader.join()
    assert not bad and not list(run.path.glob(".*"))


def test_kill_9_leaves_a_run_that_died_with_its_metrics(tmp_path):
    done = python("import os, signal, sys\nfrom vidgen.runs import Run\nrun = Run.create('killed', {}, root=sys.argv[1])\n"
                  "run.log(step=1, loss=0.5)\nos.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    assert done.returncode == -signal.SIGKILL
    run, = find("killed", root=tmp_path)
    assert run.status == "died" and run.manifest["status"] == "running"
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in run.metrics()] == [1]
    run.log(step=3, loss=0.25)
    assert [row["step"] for row in run.metrics()] == [1, 3]


def test_long_torn_line_is_cut_whole(tmp_path):
    run = Run.create("torn", {}, root=tmp_path)
    (run.path / "metrics.jsonl").write_text('{"step": 1, "seconds": 0}\n{"step": 2, "x": "' + "y" * 200_000)
    run.log(step=3)
    assert [row["step"] for row in Run.open(run.path).metrics()] == [1, 3]


@pytest.mark.parametrize(("error", "status"), [(ValueError("no"), "failed"), (KeyboardInterrupt(), "canceled"), (Canceled("stop"), "canceled")])
def test_the_end_tells_what_happened(tmp_path, error, status):
    with pytest.raises(type(error)), Run.create("ends", {}, root=tmp_path) as run:
        raise error
    assert Run.open(run.path).status == status and type(error).__name__ in Run.open(run.path).manifest["error"]


def test_a_success_can_turn_into_a_failure_but_not_into_nonsense(tmp_path):
    run = Run.create("turn", {}, root=tmp_path)
    run.finish(score=1)
    run.finish("failed", error="later")
    assert run.status == "failed" and run.manifest["result"] == {"score": 1}
    with pytest.raises(ValueError, match="succeeded"):
        run.finish("suceeded")


def test_unwritable_runs_folder_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="VIDGEN_STORAGE_RUNS"):
        Run.create("a", {}, root=tmp_path / "file" / "runs")
    with pytest.raises(OSError, match="VIDGEN_STORAGE_RUNS"):
        Run.create("a", {}, root=tmp_path / "file")


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_says_so_and_keeps_what_was_there(tmp_path, monkeypatch):
    run = Run.create("full", {}, root=tmp_path)
    before = (run.path / "manifest.json").read_text()
    monkeypatch.setattr(runs, "atomic_write", full)
    with pytest.raises(OSError, match="full.*MiB free.*intact") as caught:
        run.record(note="x")
    assert caught.value.errno == errno.ENOSPC and (run.path / "manifest.json").read_text() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_under_the_metrics(tmp_path, monkeypatch):
    run = Run.create("full", {}, root=tmp_path)
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(runs, "_cut_torn_line", lambda file: None)
    with pytest.raises(OSError, match="is full"):
        run.log(step=1, loss=1.0)


def test_full_disk_at_the_end_does_not_hide_the_first_error(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="could not be recorded"), pytest.raises(ValueError, match="the real one"):
        with Run.create("full", {}, root=tmp_path):
            monkeypatch.setattr(runs, "atomic_write", full)
            raise ValueError("the real one")


def test_numbers_survive_and_words_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    run = Run.create("numbers", {"path": tmp_path, "lr": np.float64(0.1)}, root=tmp_path)
    run.log(step=np.int64(1), loss=torch.tensor(0.5), nan=float("nan"), inf=float("-inf"), many=np.float32(2))
    row, = Run.open(run.path).metrics()
    assert row["loss"] == 0.5 and np.isnan(row["nan"]) and row["inf"] == -np.inf and row["many"] == 2 and row["step"] == 1
    text = (run.path / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for wrong in ("good", [1, 2], None):
        with pytest.raises(TypeError, match="metric is a number"):
            run.log(step=2, verdict=wrong)
    with pytest.raises(ValueError, match="another name"):
        run.log(step=2, seconds=1)


def test_csv_takes_new_columns_and_another_process(tmp_path):
    run = Run.create("csv", {}, root=tmp_path)
    run.log(step=0, loss=1.0)
    run.log(step=1, loss=0.5, psnr=20.0)
    again = Run.open(run.path)
    again.log(step=2, psnr=21.0)
    again.log(step=3, fvd=7.0)
    lines = [line.split(",") for line in (run.path / "metrics.csv").read_text().splitlines()]
    assert lines[0] == ["step", "seconds", "loss", "psnr", "fvd"]
    assert [(line[0], line[2], line[3], line[4]) for line in lines[1:]] == [("0", "1.0", "", ""), ("1", "0.5", "20.0", ""), ("2", "", "21.0", ""), ("3", "", "", "7.0")]


def test_a_broken_tracker_is_reported_once_and_the_record_goes_on(tmp_path):
    class Broken(Tracker):
        def log(self, step, metrics):
            raise ConnectionError("server away")

    run = Run.create("broken", {}, root=tmp_path, trackers=[Broken])
    with pytest.warns(UserWarning, match="Broken stopped tracking.*server away") as caught:
        run.log(step=1, loss=1.0)
        run.log(step=2, loss=0.5)
    assert len(caught) == 1 and len(run.metrics()) == 2 and len((run.path / "metrics.csv").read_text().splitlines()) == 3


def test_trackers_hear_of_a_shared_file(tmp_path):
    heard = []

    class Ear(Tracker):
        def file(self, name, path):
            heard.append((name, path))

    run = Run.create("share", {}, root=tmp_path, trackers=[Ear])
    path = run.artifact("PROJECT_SUMMARY.json")
    path.write_text("{}")
    assert run.share(path) == path and heard == [("PROJECT_SUMMARY", path)]


def test_unknown_and_missing_trackers(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown tracker 'wand'; nearest: wandb"):
        Run.create("a", {}, root=tmp_path, trackers=["wand"]).log(step=1, x=1)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"vidgen\[track\]"):
        Run.create("a", {}, root=tmp_path, trackers=["wandb"]).log(step=1, x=1)


def test_trackers_come_from_the_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDGEN_TRACKING_TRACKERS", "csv,mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match="mlflow"):
        Run.create("a", {}, root=tmp_path).log(step=1, x=1)


def test_mlflow_is_told_parameters_metrics_files_and_the_end(tmp_path, monkeypatch):
    said = []

    class Client:
        def __init__(self, tracking_uri):
            said.append(tracking_uri)

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name, artifact_location):
            return "7"

        def create_run(self, experiment, run_name):
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

        def __getattr__(self, name):
            return lambda *args, **kw: said.append((name, *args, kw))

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client))
    run = Run.create("a", {"lr": 0.1}, root=tmp_path, trackers=["mlflow"])
    run.log(step=4, loss=0.5)
    run.finish("canceled")
    assert said[0] == f"sqlite:///{tmp_path / 'mlflow.db'}" and ("log_param", "r", "lr", 0.1, {}) in said
    assert ("log_metric", "r", "loss", 0.5, {"step": 4}) in said and said[-1] == ("set_terminated", "r", "KILLED", {})


def test_a_tracker_that_can_t_begin_is_left_behind(tmp_path):
    class Away(Tracker):
        def __init__(self, run):
            raise ConnectionError("server away")

    with pytest.warns(UserWarning, match="Away can't begin to track.*server away"):
        run = Run.create("away", {}, root=tmp_path, trackers=[Away])
        run.log(step=1, loss=1.0)
    run.finish()
    assert run.status == "succeeded" and len((run.path / "metrics.csv").read_text().splitlines()) == 2


def test_clips_are_not_replaced_unless_asked(tmp_path):
    run, clip = Run.create("again", {}, root=tmp_path, trackers=[]), vidgen.Clip(np.zeros((2, 16, 16, 3), np.uint8), fps=8)
    run.save_clip("a", clip)
    with pytest.raises(FileExistsError):
        run.save_clip("a", clip)
    assert run.save_clip("a", clip, overwrite=True).exists()


def test_a_childs_peak_is_its_own():
    assert np.ones(2**26).any() and peak_memory()["host_gib"] > 0.5
    child = subprocess.run([sys.executable, "-c", "from vidgen.runs import peak_memory; print(peak_memory()['host_gib'])"], capture_output=True, text=True, check=True)
    assert float(child.stdout) < 0.4


@pytest.mark.slow
def test_wandb_offline_for_real(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = Run.create("a", {"lr": 0.1}, root=tmp_path, trackers=["wandb"])
    run.log(step=4, loss=0.5)
    run.finish()
    assert list(run.path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_wandb_goes_on_from_what_its_files_have_kept(tmp_path, monkeypatch):
    "The first session is killed before it wrote anything, the second ends well and the third says some things again."
    from vidgen.runs import heard_by_wandb

    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    code = """
import os, sys
from pathlib import Path
import numpy as np
from vidgen.clip import Clip
from vidgen.runs import Run
run = Run.create("a", {}, root=Path(sys.argv[1]), trackers=["wandb"])
run.save_clip("before-0", Clip(np.zeros((3, 16, 16, 3), np.uint8), fps=8))
run.log(step=1, **{"x.y": 0.5})
run.log(step=2, **{"x.y": 0.25})
os.kill(os.getpid(), 9)
"""
    env = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env).returncode == -9
    path = next(tmp_path.glob("a-*"))
    for steps in ((3,), (2, 3, 4)):
        run = Run.open(path, trackers=["wandb"])
        for step in steps:
            run.log(step=step, **{"x.y": 1.0 / step, "note": 1.0})
        run.save_clip("before-0", vidgen.Clip(np.zeros((3, 16, 16, 3), np.uint8), fps=8), overwrite=True)
        run.finish()
    until = time.monotonic() + 60  # its service writes the end when it has the time
    while heard_by_wandb(path)[1] < 6 and time.monotonic() < until:
        time.sleep(0.1)
    known, end = heard_by_wandb(path)
    assert {step for name, step in known if name == "x.y"} == {1, 2, 3, 4} and ("before-0", None) in known and ("note", 4) in known
    assert end == 6, "four steps, a film, and the note of step 2, which was not told before"


@pytest.mark.slow
def test_mlflow_for_real(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    run = Run.create("a", {"lr": 0.1}, root=tmp_path, trackers=["mlflow"])
    run.log(step=4, loss=0.5)
    run.finish()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    found, = client.search_runs([client.get_experiment_by_name("a").experiment_id])
    assert found.data.metrics["loss"] == 0.5 and found.data.params == {"lr": "0.1"} and found.info.status == "FINISHED"


def test_files_stay_inside_and_are_not_overwritten(tmp_path):
    from vidgen.clip import Clip

    run = Run.create("files", {}, root=tmp_path)
    clip = Clip(np.zeros((3, 16, 16, 3), np.uint8), fps=8)
    assert run.save_clip("epoch/one", clip) == run.path / "samples/epoch/one.mp4"
    with pytest.raises(FileExistsError):
        run.save_clip("epoch/one", clip)
    for name in ("../x", "/etc/x", "", "a/../../x"):
        with pytest.raises(ValueError, match="leads out"):
            run.artifact(name)


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "/abs"])
def test_names_that_are_no_folder_names(tmp_path, name):
    with pytest.raises(ValueError, match="plain word"):
        Run.create(name, {}, root=tmp_path)


def test_own_keys_of_the_manifest_are_safe(tmp_path):
    run = Run.create("own", {}, root=tmp_path)
    with pytest.raises(ValueError, match="another name"):
        run.record(status="succeeded")


def test_find_passes_over_what_is_no_run(tmp_path):
    old = Run.create("a", {"seed": 1, "none": None}, root=tmp_path)
    old.finish()
    Run.create("a", {"seed": 2}, root=tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/manifest.json").write_text("{")
    (tmp_path / "empty").mkdir()
    assert [r.params["seed"] for r in find("a", root=tmp_path)] == [1, 2]
    assert [r.path for r in find(root=tmp_path, status="succeeded")] == [old.path]
    assert not find("a", root=tmp_path, seed=3) and not find("a", root=tmp_path, nothing=None) and not find(root=tmp_path / "no")
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        Run.open(tmp_path / "empty")


def test_an_onlooker_leaves_memory_alone(tmp_path):
    run = Run.create("watch", {}, root=tmp_path)
    Run.open(run.path, watch=True).finish()
    assert Run.open(run.path).manifest["peak_memory"]["host_gib"] is None
    assert peak_memory()["host_gib"] > 0


def test_progress_is_left_for_a_runner_and_taken_away(tmp_path):
    from vidgen.progress import Progress

    run = Run.create("progress", {}, root=tmp_path)
    for i in range(11):
        run.progress(Progress("train", i, 10))
    assert json.loads((run.path / "progress.json").read_text())["done"] == 10
    run.finish()
    assert not (run.path / "progress.json").exists()


def test_recording_needs_no_torch(tmp_path):
    done = python("import sys\nfrom vidgen.runs import Run\nwith Run.create('light', {}, root=sys.argv[1]) as run: run.log(step=1, x=1.0)\n"
                  "assert 'torch' not in sys.modules, 'torch was imported'", tmp_path)
    assert done.returncode == 0, done.stderr


def test_seeds_outside_the_range_are_refused():
    for seed in (-1, 2**32, 1.0, True, "7"):
        with pytest.raises(ValueError, match="whole number"):
            runs.seed_everything(seed)
