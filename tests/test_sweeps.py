"""The runner of experiments: what it refuses, what it skips, what it leaves behind when something goes wrong."""
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import yaml

from vidgen import space, sweeps
from vidgen.errors import Canceled
from vidgen.progress import Cancel
from vidgen.runs import Run, find
from vidgen.space import Sweep, Range
from vidgen.sweeps import Failed, check, command, from_text, grid, parameters, run

PARAMETERS = 'run_dir = ""  # the run\'s folder\nsteps = 2  # how many\nrate = 0.5  # how fast\n'
WORK = """
from vidgen.runs import Run
run = Run.open(run_dir)
for step in range(steps):
    run.log(step=step, rate=rate)
run.finish(total=steps * rate)
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    "A laboratory in a temporary folder; returns a function that writes experiments."
    (tmp_path / "settings.ini").write_text("[storage]\nruns = runs\n")
    monkeypatch.chdir(tmp_path)
    return lambda *args, **kw: write(tmp_path, *args, **kw)


def write(root, name="900_count", cells=(WORK,), parameters=PARAMETERS, tags=("parameters",), **presets):
    folder = root / "experiments" / name
    (folder / "params").mkdir(parents=True, exist_ok=True)
    code = lambda text, **meta: {"cell_type": "code", "source": text, "metadata": meta, "outputs": [], "execution_count": None, "id": os.urandom(4).hex()}  # noqa: E731
    cells = [{"cell_type": "markdown", "source": "# Count", "metadata": {}, "id": "head"}, code(parameters, tags=list(tags)), *map(code, cells)]
    (folder / "run.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    for preset, values in presets.items():
        (folder / "params" / f"{preset}.yaml").write_text(yaml.safe_dump(values))
    return folder


def runs_made():
    return find(name="")


# what a parameters cell may hold

@pytest.mark.parametrize(("line", "says"), [
    ("steps = 2 * 3", "compute in a cell below"), ("import os", "not `name = literal`"), ("a = b = 1", "not `name = literal`"), ("a, b = 1, 2", "not `name = literal`"),
    ("x: int", "not `name = literal`"), ("x = None", "has type NoneType"), ("x: complex = 1", "has type complex"), ("x: int = 0.5", "its default is 0.5"),
    ("preset = 'a'", "option of the runner"), ("run_dir = 'here'", "must declare"),
])
def test_cells_that_are_refused(make, line, says):
    make(parameters=PARAMETERS + line)
    with pytest.raises(ValueError, match=says):
        parameters("900_count")


def test_cells_that_are_read(make):
    make(parameters=PARAMETERS + "# a remark of its own\nsizes = [  # widths\n    8,\n    16,\n]\nprompt = 'a # b'\nimage: str | None = None  # a first frame\nlow: float = 1\nt = (1, 2)\n")
    found = parameters("900_count")
    assert found["sizes"] == ([8, 16], "list[int]", "widths") and found["prompt"] == ("a # b", "str", "")
    assert found["image"] == (None, "str | None", "a first frame") and found["low"] == (1.0, "float", "") and type(found["low"].default) is float
    assert found["t"] == ([1, 2], "list[int]", "") and found["run_dir"].type == "str"


@pytest.mark.parametrize(("tags", "says"), [((), "no cells tagged"), (("parameter",), "no cells tagged"), (("Parameters",), "no cells tagged")])
def test_a_lost_tag_is_refused_before_anything_runs(make, tags, says):
    make(tags=tags)
    with pytest.raises(ValueError, match=says):
        run("900_count", steps=3)
    assert not runs_made()


def test_two_tags_and_broken_json(make):
    folder = make(parameters=PARAMETERS)
    nb = json.loads((folder / "run.ipynb").read_text())
    nb["cells"][2]["metadata"]["tags"] = ["parameters"]
    (folder / "run.ipynb").write_text(json.dumps(nb))
    with pytest.raises(ValueError, match="2 cells tagged"):
        parameters(folder)
    (folder / "run.ipynb").write_text("{")
    with pytest.raises(ValueError, match="not a notebook"):
        parameters(folder)


def test_an_experiment_is_found_by_every_name(make, tmp_path, monkeypatch):
    folder = make()
    (tmp_path / "deep/er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep/er")
    for name in ("900_count", "experiments/900_count", "experiments/900_count/run.ipynb", folder, folder / "run.ipynb", str(folder)):
        assert sweeps.notebook(name) == folder / "run.ipynb"
    with pytest.raises(ValueError, match="nearest: 900_count"):
        run("900_cuont")


# values

@pytest.mark.parametrize(("given", "error", "says"), [
    ({"stepps": 3}, ValueError, "nearest: steps"), ({"run_dir": "x"}, ValueError, "unknown parameter"), ({"steps": 2.5}, TypeError, "nearest: 2, 3"),
    ({"steps": 3.0}, TypeError, "nearest: 3$"), ({"steps": "3"}, TypeError, "nearest: 3$"), ({"steps": True}, TypeError, "int"), ({"steps": None}, TypeError, "NoneType"),
    ({"rate": "1e-4"}, TypeError, "nearest: 0.0001"), ({"rate": False}, TypeError, "float"), ({"preset": "smok"}, ValueError, "nearest: smoke"),
])
def test_wrong_values_are_refused_before_anything_runs(make, given, error, says):
    make(smoke={"steps": 1})
    with pytest.raises(error, match=says):
        run("900_count", **given)
    assert not runs_made()


def test_a_wrong_value_in_a_preset_is_refused(make):
    folder = make(bad={"steps": "many"}, unknown={"step": 1}, none=None, listed=[1])
    with pytest.raises(TypeError, match="'many'"):
        check("900_count", preset="bad")
    with pytest.raises(ValueError, match="nearest: steps"):
        check("900_count", preset="unknown")
    with pytest.raises(ValueError, match="name: value"):
        check("900_count", preset="listed")
    (folder / "params/torn.yaml").write_text("steps: [1")
    with pytest.raises(ValueError, match="can't be read"):
        check("900_count", preset="torn")
    assert check("900_count", preset="none") == {"steps": 2, "rate": 0.5}


def test_lists_and_optional_values(make):
    make(parameters=PARAMETERS + "sizes = [8]\nany = []\nimage: str | None = None\nmap = {'a': 1}\non = True\n")
    assert check("900_count", sizes=(1, 2), any=[1, "a"], image="x", map={}, on=False)["sizes"] == [1, 2]
    for wrong in ({"sizes": [1, "a"]}, {"sizes": 8}, {"image": 3}, {"map": []}, {"on": 1}):
        with pytest.raises(TypeError):
            check("900_count", **wrong)


def test_text_is_read_as_the_type_it_is_for(make):
    make(parameters=PARAMETERS + "prompt = 'a'\nsizes = [8]\nimage: str | None = None\non = True\n")
    assert from_text("900_count", prompt="3", steps="3", rate="1e-4", sizes="[1, 2]", image="null", on="False") == {
        "prompt": "3", "steps": 3, "rate": 1e-4, "sizes": [1, 2], "image": None, "on": False}
    for wrong in ({"steps": "2.5"}, {"on": "yes"}, {"sizes": "a"}, {"sizes": "[1"}, {"rate": "fast"}):
        with pytest.raises(TypeError, match="900_count"):
            from_text("900_count", **wrong)
    with pytest.raises(ValueError, match="unknown parameter"):
        from_text("900_count", run_dir="x")


# runs

def test_smoke_one_run_records_everything(make):
    make(smoke={"steps": 1})
    done = run("900_count", preset="smoke", rate=1)
    assert done.status == "succeeded" and done.params == {"steps": 1, "rate": 1.0} and done.manifest["result"] == {"total": 1.0}
    assert done.manifest["notebook"] == "experiments/900_count/run.ipynb" and done.manifest["preset"] == "smoke"
    assert done.manifest["peak_memory"]["host_gib"] > 0.01 and len(done.metrics()) == 1
    executed = json.loads((done.path / "run.ipynb").read_text())
    assert any("injected-parameters" in c["metadata"].get("tags", []) for c in executed["cells"])


def test_finished_runs_are_skipped_until_the_code_changes(make):
    make()
    first = run("900_count", rate=1)
    assert run("900_count", rate=1.0).path == first.path
    assert run("900_count", rate=1.0, force=True).path != first.path
    make(cells=[WORK + "# changed"])
    assert run("900_count", rate=1).manifest["code_hash"] != first.manifest["code_hash"]
    assert len(runs_made()) == 3


def test_a_failed_run_keeps_its_notebook_and_is_tried_again(make):
    make(cells=["print('so far')", "raise RuntimeError('lamp broke')"])
    for _ in range(2):
        with pytest.raises(Failed, match="RuntimeError: lamp broke") as caught:
            run("900_count")
    assert len(runs_made()) == 2 and caught.value.run.status == "failed"
    text = (caught.value.run.path / "run.ipynb").read_text()
    assert "so far" in text and "lamp broke" in text


def test_a_kernel_that_dies_is_a_failure(make):
    make(cells=["import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    with pytest.raises(Failed, match="kernel died"):
        run("900_count")
    assert runs_made()[0].status == "failed"


def test_a_failure_after_finish_is_a_failure(make):
    make(cells=[WORK, "1 / 0"])
    with pytest.raises(Failed, match="ZeroDivisionError"):
        run("900_count")
    assert runs_made()[0].status == "failed" and runs_made()[0].manifest["result"] == {"total": 1.0}


def test_the_kernel_is_this_interpreter_in_the_projects_folder(make, tmp_path, monkeypatch):
    make(cells=["import os, sys\nfrom vidgen.runs import Run\nRun.open(run_dir).finish(python=sys.executable, folder=os.getcwd())"])
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    result = run("900_count").manifest["result"]
    assert result == {"python": sys.executable, "folder": str(tmp_path)}
    assert os.getcwd() == str(tmp_path / "away")


def test_braces_and_blanks_in_a_path(tmp_path, monkeypatch):
    lab = tmp_path / "a {b} c"
    lab.mkdir()
    (lab / "settings.ini").write_text("[storage]\nruns = runs\n")
    monkeypatch.chdir(lab)
    write(lab)
    assert run("900_count").status == "succeeded"


def test_strings_arrive_as_they_were_given(make):
    prompt = "a \"red\" circle's \\ path\n{x} é ✓ $HOME"
    make(parameters=PARAMETERS + "prompt = ''\n", cells=["from vidgen.runs import Run\nRun.open(run_dir).finish(said=prompt)"])
    assert run("900_count", prompt=prompt).manifest["result"]["said"] == prompt


def test_progress_of_cells_and_inside_them(make):
    make(cells=["import time\nfrom vidgen.runs import Run\nfrom vidgen.progress import Progress\nrun = Run.open(run_dir)\n"
                "for i in range(5):\n    run.progress(Progress('train', i, 4, note='loss'))\n    time.sleep(0.25)"])
    events = []
    run("900_count", progress=events.append)
    assert {e.stage for e in events} == {"cells", "train"}
    inner = [e.done for e in events if e.stage == "train"]
    assert len(inner) >= 3 and inner == sorted(inner)
    assert any(e.note == "Count" and e.total == 4 for e in events)


SLOW = "from vidgen.runs import Run\nimport time\nrun = Run.open(run_dir)\nrun.log(step=1, x=1)\ntime.sleep(60)"


def test_a_cancel_stops_the_cell_and_what_follows(make, tmp_path):
    make(cells=[SLOW, f"open({str(tmp_path / 'after')!r}, 'w')"])
    cancel = Cancel()
    threading.Timer(2.5, cancel.cancel).start()
    start = time.monotonic()
    with pytest.raises(Canceled):
        run("900_count", cancel=cancel)
    assert time.monotonic() - start < 20 and runs_made()[0].status == "canceled" and not (tmp_path / "after").exists()


def test_a_cell_that_ignores_the_interrupt_is_killed(make, monkeypatch):
    make(cells=["import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + SLOW])
    monkeypatch.setattr(sweeps._Job.stop, "__defaults__", (1.0,))
    cancel = Cancel()
    threading.Timer(2.5, cancel.cancel).start()
    with pytest.raises(Canceled):
        run("900_count", cancel=cancel)
    assert runs_made()[0].status == "canceled"


def shell(*lines, **env):
    return subprocess.Popen([sys.executable, "-c", "\n".join(["import sys", "from vidgen.sweeps import command", *lines])],
                            env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_marks_the_run_as_canceled_and_leaves_no_kernel(make):
    make(cells=["import os\nfrom vidgen.runs import Run\nRun.open(run_dir).record(kernel=os.getpid())", SLOW])
    process = shell("sys.exit(command('900_count'))")
    for _ in range(300):
        if (found := runs_made()) and (found[0].path / "metrics.jsonl").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "canceled" in err
    done, = runs_made()
    assert done.status == "canceled" and done.metrics()[0]["x"] == 1
    assert not psutil.pid_exists(pid := done.manifest["kernel"]) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_home_may_be_read_only(make):
    make()
    process = shell("sys.exit(command('900_count'))", HOME="/proc/no/home", XDG_CACHE_HOME="", XDG_CONFIG_HOME="")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "total" in out, err


def test_an_unwritable_runs_folder_is_an_error_not_a_traceback(make, tmp_path, capsys):
    make()
    (tmp_path / "runs").write_text("a file")
    assert command("900_count") == 2
    assert "VIDGEN_STORAGE_RUNS" in capsys.readouterr().err


def test_without_papermill_the_error_names_the_extra(make, monkeypatch):
    make()
    monkeypatch.setitem(sys.modules, "papermill", None)
    with pytest.raises(ImportError, match=r"vidgen\[lab\]"):
        run("900_count")
    assert not runs_made()


# grids

def test_a_grid_goes_on_where_it_stopped_and_past_failures(make, tmp_path):
    make(cells=["assert steps != 2 or rate > 0.5, 'unlucky'", WORK])
    first = grid("900_count", steps=[1, 2], rate=0.5)
    assert [(r.params["steps"], r.status) for r in first] == [(1, "succeeded"), (2, "failed")]
    again = grid("900_count", steps=[1, 2, 3], rate=[0.5])
    assert again[0].path == first[0].path and again[1].path != first[1].path and [r.status for r in again] == ["succeeded", "failed", "succeeded"]


def test_a_grid_is_checked_whole_before_it_starts(make):
    make()
    for wrong in ({"steps": [1, "two"]}, {"step": [1]}, {"steps": []}, {}):
        with pytest.raises((ValueError, TypeError)):
            grid("900_count", **wrong)
    assert not runs_made()


def test_a_grid_from_its_file_and_the_shell(make, capsys):
    folder = make(cells=["assert steps < 3", WORK])
    (folder / "sweep.yaml").write_text("steps: [1, 2]\n")
    assert command("900_count", sweep=True) == 0
    assert command("900_count", [("rate", "0.5")], over=[("steps", "2,3")]) == 1
    out = capsys.readouterr().out
    assert out.count("finished before") == 1 and "AssertionError" in out
    assert [r.params["steps"] for r in runs_made()] == [1, 2, 3]


@pytest.mark.parametrize("given", [[("stepps", "1")], [("steps", "1.5")], [("steps", "")]])
def test_wrong_words_in_a_shell(make, capsys, given):
    make()
    assert command("900_count", given) == 2
    assert capsys.readouterr().err.startswith("error: ") and not runs_made()


def test_a_report_shows_result_stages_and_folder(make, tmp_path):
    done = Run.create("a", {})
    done.add_stages({"load": 1.234, "denoise": 2})
    done.finish(seen="a red circle", temporal_score=0.98765, clip="x.mp4")
    text = sweeps.report(done)
    for part in ("seen", "a red circle", "temporal score", "0.9877", "load 1.23 · denoise 2.00", f"runs/{done.path.name}", "a: succeeded"):
        assert part in text
    assert str(tmp_path) not in text
    curve = Run.create("b", {})
    curve.finish(curve=list(range(1000)), seen="a star")
    long = sweeps.report(curve)
    assert max(map(len, long.splitlines())) < 400 and "manifest.json" in long and "a star" in long


# files, ranges, tables

@pytest.mark.parametrize(("text", "says"), [
    ("[1]", "name: \\[values\\]"), ("draws: 3\n", "varies nothing"), ("steps: []\n", "steps has no values"), ("rate: {low: 2, high: 1}\n", "rate: a range goes from low to high"), ("rate: {low: 0, high: 1, log: true}\n", "above 0"),
    ("rate: {lo: 1, high: 2}\n", "look at 'lo'"), ("draws: 0\nsteps: [1]\n", "draws is a whole number"), ("steps: [1\n", "can't be read as YAML"), ("stepps: [1]\n", "nearest: steps"), ("preset: smok\nsteps: [1]\n", "nearest: smoke"),
    ("words: {low: 1, high: 2}\n", "a range is of numbers"),
])
def test_sweep_files_that_are_refused_before_anything_runs(make, text, says):
    folder = make(parameters=PARAMETERS + "words = 'a'\n", smoke={"steps": 1})
    (folder / "sweep.yaml").write_text(text)
    with pytest.raises((ValueError, TypeError), match=says):
        grid("900_count")
    assert not runs_made()


def test_a_file_with_ranges_seeds_and_a_preset(make, tmp_path, capsys):
    folder = make(parameters=PARAMETERS + "seed = 0  # of chance\n", cells=["from vidgen.runs import Run\nRun.open(run_dir).finish(loss={'mean': rate + seed}, steps=steps)"], small={"steps": 7})
    (folder / "sweep.yaml").write_text("preset: small\nrate: [5e-1]\nsteps: {low: 1, high: 9}\ndraws: 2\nseed: [0, 1]\n")
    assert command("900_count", [("rate", "0.25")], sweep=True, show=["loss.mean"], out=str(tmp_path / "out/table.json")) == 0
    made = [r.params for r in runs_made()]
    drawn = [round(0.5 + s[0] * 9) for s in space.shares(2, 1)]
    assert [p["seed"] for p in made] == [0, 0, 1, 1] and [p["steps"] for p in made] == drawn * 2 and {p["rate"] for p in made} == {0.25}
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert [line["setting"]["steps"] for line in table["table"]] == drawn and table["preset"] == "small"
    mean = table["table"][0]["result"]["loss.mean"]
    assert mean["value"] == 0.75 and mean["n"] == 2 and mean["low"] < 0.25 < 1.25 < mean["high"]
    assert "0.75 [" in (out := capsys.readouterr().out) and "sweep.csv" in out
    assert command("900_count", out="x.json") == 2 and "--sweep" in capsys.readouterr().err


def test_points_cover_a_space_and_a_longer_sweep_repeats_nothing():
    sweep = Sweep({"a": Range(0, 1), "b": Range(1e-4, 1, log=True), "c": ["x", "y"]}, draws=16)
    found = [p for p in sweep.points() if p["c"] == "x"]
    assert len(found) == 16 and {int(p["a"] * 4) for p in found} == {0, 1, 2, 3} and min(p["b"] for p in found) < 1e-3 < 1e-1 < max(p["b"] for p in found)
    assert space.points({"a": Range(0, 1), "b": Range(1, 2)}, draws=4) == space.points({"a": Range(0, 1), "b": Range(1, 2)}, draws=9)[:4]


def test_one_seed_has_no_interval_and_a_failure_is_missing():
    lines = space.table([{"params": {"a": 1, "seed": 0}, "status": "succeeded", "result": {"x": 1}}, {"params": {"a": 1, "seed": 1}, "status": "failed", "result": {"x": 9}}])
    assert lines == [{"setting": {"a": 1}, "runs": 2, "missing": 1, "result": {"x": {"value": 1.0, "low": None, "high": None, "n": 1}}}]
    with pytest.raises(ValueError, match="nearest: x"):
        space.shown(lines, ["xx"])


# killed

def killed_when(process, condition):
    for _ in range(600):
        if condition() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.wait(30)


def gone(pid):
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_a_killed_sweep_goes_on_with_what_is_missing(make):
    "kill -9 in the second of three runs: the first isn't repeated, the table is the whole one's."
    folder = make(cells=["import os, time\nfrom vidgen.runs import Run\nrun = Run.open(run_dir)\nrun.record(kernel=os.getpid())\nif steps == 2 and not os.path.exists('calm'):\n    time.sleep(60)", WORK])
    (folder / "sweep.yaml").write_text("steps: [1, 2, 3]\n")
    killed_when(process := shell("sys.exit(command('900_count', sweep=True))"), lambda: any("kernel" in r.manifest and r.params["steps"] == 2 for r in runs_made()))
    table, = (folder.parent.parent / "runs").glob("sweep-900_count-*/sweep.json")
    before = json.loads(table.read_text())
    assert [r["status"] for r in before["runs"]] == ["succeeded", "to come", "to come"] and process.returncode == -signal.SIGKILL
    assert [r.status for r in runs_made()] == ["succeeded", "died"] and gone(runs_made()[1].manifest["kernel"])
    open("calm", "w").close()
    assert command("900_count", sweep=True) == 0
    assert [(r.params["steps"], r.status) for r in runs_made()] == [(1, "succeeded"), (2, "died"), (2, "succeeded"), (3, "succeeded")]
    after = json.loads(table.read_text())
    assert [r["result"]["total"] for r in after["runs"]] == [0.5, 1.0, 1.5] and after["runs"][0]["run"] == before["runs"][0]["run"]


TRAINED = """
from pathlib import Path
from vidgen.runs import Run
from vidgen.train.config import Recipe
from vidgen.train.trainer import train
run = Run.open(run_dir)
done = train(Recipe(data="world:8", held="world:2/held", steps=steps, batch=1, rank=2, latents="mean", save_every=4, log_every=1, validate_every=0, prompts=0, noise_levels=1, warmup=0, device="cpu", lr=rate), run=run)
run.finish(steps=done.steps, loss=done.after["loss/mean"])
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_training_of_a_sweep_goes_on_at_its_checkpoint(make):
    "And ends with the numbers of the one nobody killed, in the folder it was begun in."
    make(cells=[TRAINED])
    killed_when(shell("sys.exit(command('900_count', [('steps', '60'), ('rate', '1e-3')]))"), lambda: any(any(r.path.glob("checkpoints/step-*.safetensors")) for r in runs_made()))
    killed, = runs_made()
    done = run("900_count", steps=60, rate=1e-3)
    assert done.path == killed.path and done.manifest["resumed"] == 1 and done.status == "succeeded" and done.manifest["result"]["steps"] == 60
    steps = [row["step"] for row in done.metrics() if "train/loss" in row]
    assert steps.count(1) == 1 and set(steps) == set(range(1, 61))
    calm = run("900_count", steps=60, rate=1e-3, force=True)
    assert calm.path != done.path and calm.manifest["result"] == done.manifest["result"]
