"""The command line under everything that goes wrong: each fault is one sentence, a status, and nothing half done on the disk."""
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from vidgen import cli, doctor, runs
from vidgen.clip import Clip
from vidgen.models import family, plan, registry

RED = "a red circle moving right on a white background"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    "Tiny random checkpoints of the real classes, in a folder for model.paths."
    folder = tmp_path_factory.mktemp("models")
    for name, like in (("tiny-t2v", "cogvideox-2b"), ("tiny-i2v", "cogvideox-5b-i2v")):
        family.save_parts(family.family("cogvideox").tiny(like, words=RED.split()), folder / name)
    return folder


@pytest.fixture
def lab(checkpoints, tmp_path, monkeypatch):
    "An empty laboratory that knows the tiny models."
    (tmp_path / "settings.ini").write_text(f"[model]\npaths = {checkpoints}\nname = tiny-t2v\n[storage]\nruns = runs\n")
    for key in [k for k in os.environ if k.startswith("VIDGEN_")]:
        monkeypatch.delenv(key)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def vidgen(lab, capsys):
    "Call the command line in this process: (status, stdout, stderr)."
    def call(*args):
        capsys.readouterr()
        status = cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, " ".join(err.split())
    return call


def made(folder="."):
    "Films and what is left of films."
    return sorted(p.name for p in Path(folder).rglob("*") if p.suffix in (".mp4", ".gif", ".part"))


def picture(path, width=96, height=64):
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)).save(path)
    return path


# help

def test_smoke_help_is_instant_and_light(lab):
    code = "import sys\nfrom vidgen.cli import main\nassert main(['--help']) == 0 and main(['generate', '--help']) == 0\n" \
           "heavy = [m for m in ('torch', 'diffusers', 'transformers', 'cv2', 'av', 'numpy.testing', 'papermill') if m in sys.modules]\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Make a clip from a prompt" in done.stdout and "--seed 7" in done.stdout, done.stderr
    spent = []
    for _ in range(3):  # seconds of work, whatever else the machine does
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", "from vidgen.cli import main; main(['--help'])"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5, spent


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_teaches_with_examples(vidgen, name):
    status, out, _ = vidgen(name, "--help")
    assert status == 0 and "Examples:" in out and f"vidgen {name}" in out


def test_the_console_command_is_this_one():
    from importlib.metadata import entry_points

    assert [e.value for e in entry_points(group="console_scripts", name="vidgen")][0] == "vidgen.cli:console"


def test_version_and_no_words_at_all(vidgen):
    assert vidgen("--version")[1].startswith("vidgen ")
    assert "Commands" in vidgen()[1]


# a request that is right

def test_smoke_a_clip_is_made_measured_and_on_record(vidgen, lab):
    status, out, err = vidgen("generate", RED, "--steps", 2, "--seed", 7, "--out", "a/clip.mp4")
    assert status == 0, err
    clip = Clip.open("a/clip.mp4")
    assert clip.made["prompt"] == RED and clip.made["seed"] == 7 and clip.made["num_inference_steps"] == 2
    for part in ("a/clip.mp4", "stability", "tiny-t2v, 2 steps", "load", "denoise", "a step)", "decode", "encode", "GiB", "runs/generate-"):
        assert part in out, part
    assert "seen" not in out
    run, = runs.find("generate")
    assert run.status == "succeeded" and run.params["prompt"] == RED and run.params["seed"] == 7 and len(run.manifest["model_hash"]) == 64
    assert run.manifest["result"]["hash"] == _again(vidgen, lab) and set(run.manifest["stages"]) >= {"load", "text", "denoise", "decode", "encode"}


def _again(vidgen, lab):
    "The hash of the same clip, made once more, through JSON."
    status, out, _ = vidgen("generate", RED, "--steps", 2, "--seed", 7, "--no-run", "--json", "--model", "tiny-t2v")
    result = json.loads(out)
    assert status == 0 and result["run"] is None and len(runs.find("generate")) == 1
    assert result["clips"][0]["path"] == "a-red-circle-moving-right-on-a-white-background-7.mp4"
    return [clip["hash"] for clip in result["clips"]]


def test_several_clips_another_rate_and_names_that_are_free(vidgen):
    assert vidgen("generate", RED, "--steps", 1, "--frames", 9, "-n", 2, "--fps", 12, "--seed", 3, "--no-run", "-o", "x.mp4")[0] == 0
    assert [Clip.open(f"x-{i}.mp4").made["seed"] for i in (1, 2)] == [3, 4] and Clip.open("x-1.mp4").fps == 12
    for _ in range(2):
        assert vidgen("generate", "red", "--steps", 1, "--frames", 1, "--seed", 3, "--no-run")[0] == 0
    assert made() == ["red-3-2.mp4", "red-3.mp4", "x-1.mp4", "x-2.mp4"]


def test_a_picture_picks_the_model_that_takes_one(vidgen, lab, monkeypatch):
    status, out, err = vidgen("generate", "--image", picture("photo.png"), RED, "--model", "tiny-i2v", "--steps", 1, "--out", "i.mp4", "--no-run")
    assert status == 0 and "tiny-i2v" in out, err
    from vidgen.generate.command import pick

    monkeypatch.setenv("VIDGEN_MODEL_NAME", "shapes-t2v")
    assert pick(None, image=True) == "shapes-i2v" and pick("tiny-t2v", image=True) == "tiny-t2v"
    monkeypatch.setenv("VIDGEN_MODEL_NAME", "cogvideox-5b")
    assert pick(None, image=True) == "cogvideox-5b-i2v"


def test_a_model_of_the_world_is_read_back(vidgen, lab, checkpoints):
    shutil.copytree(checkpoints / "tiny-t2v", lab / "world-t2v")
    (lab / "world-t2v/vidgen.json").write_text("{}")
    status, out, _ = vidgen("generate", RED, "--steps", 1, "--model", lab / "world-t2v", "--json", "--no-run")
    fact = json.loads(out)["clips"][0]
    assert fact["as_asked"] is False and set(fact["wrong"]) <= {"shape", "colour", "motion", "background"}
    status, out, _ = vidgen("generate", "something else", "--steps", 1, "--model", lab / "world-t2v", "--no-run")
    assert status == 0 and "seen" in out and "asked" not in out


def test_what_cannot_be_measured_does_not_take_the_film_with_it(vidgen, monkeypatch):
    import vidgen.evaluate.flow as flow

    monkeypatch.setattr(flow, "temporal_stability", lambda *a, **k: 1 / 0)
    status, out, _ = vidgen("generate", RED, "--steps", 1, "--out", "a.mp4")
    assert status == 0 and "could not be measured" in out and made(".") == ["a.mp4"] and runs.find()[0].status == "succeeded"


# a request that is wrong: one sentence, status 2, no film, no run

WRONG = {
    "frame counts": (["--frames", "16"], "--frames 16 can't be made; nearest: 9 or 17; all: 1, 9, 17, 25, 33"),
    "frame counts between": (["--frames", "29"], "nearest: 25 or 33"),
    "no frames": (["--frames", "0"], "--frames 0"),
    "width": (["--width", "100"], "--width 100 is not a positive multiple of 16; nearest: 96 or 112"),
    "height": (["--height", "-8"], "--height -8"),
    "steps": (["--steps", "0"], "--steps 0"),
    "negative steps": (["--steps", "-3"], "--steps -3"),
    "steps in parts": (["--steps", "2.5"], "--steps"),
    "seed": (["--seed", "-1"], "seed -1"),
    "guidance": (["--guidance", "-2"], "--guidance -2"),
    "schedule": (["--guidance-schedule", "dynamc"], "nearest: dynamic"),
    "rate": (["--fps", "0"], "--fps 0"),
    "clips": (["--num-videos", "0"], "--num-videos 0"),
    "precision": (["--precision", "fp64"], "unknown precision 'fp64'; nearest: fp16"),
    "device": (["--device", "tpu"], "all: auto, cpu, cuda"),
    "unknown model": (["--model", "cogvideo-2b"], "nearest: cogvideox-2b"),
    "no such folder": (["--model", "./nowhere/model"], "nowhere/model"),
    "unknown option": (["--stpes", "3"], "--steps"),
    "a folder": (["--out", "."], "is a folder"),
    "a file for a folder": (["--out", "settings.ini/clip.mp4"], "is a file, not a folder"),
    "kind of file": (["--out", "clip.avi"], ".mp4"),
    "no permission": (["--out", "/proc/clip.mp4"], "/proc/clip.mp4"),
    "missing picture": (["--image", "photo.png", "--model", "tiny-i2v"], "there is no picture photo.png"),
    "picture for a text model": (["--image", "settings.ini", "--model", "tiny-t2v"], "can't use an image"),
    "no picture for an image model": (["--model", "tiny-i2v"], "--image FILE"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_sentence(vidgen, case):
    more, says = WRONG[case]
    status, out, err = vidgen("generate", RED, *more)
    assert status in ((1, 2) if case in ("no permission", "no such folder") else (2,)) and says in err and not out, err
    assert err.startswith("error: ") and not made() and not runs.find()


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt(vidgen, prompt):
    status, _, err = vidgen("generate", prompt)
    assert status == 2 and "the prompt is empty" in err and not runs.find()


def test_unreadable_and_huge_pictures(vidgen):
    Path("text.png").write_text("not a picture")
    Path("cut.png").write_bytes(picture("whole.png") and Path("whole.png").read_bytes()[:900])
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    Path("huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    for name, says in (("text.png", "knows no such format"), ("cut.png", "cut.png"), ("huge.png", "megapixels"), (".", "picture")):
        status, _, err = vidgen("generate", RED, "--model", "tiny-i2v", "--image", name)
        assert status == 2 and says in err, (name, err)
    assert not made() and not runs.find()


def test_a_file_that_is_there_stays(vidgen):
    Path("a.mp4").write_text("precious")
    status, _, err = vidgen("generate", RED, "--steps", 1, "--out", "a.mp4")
    assert status == 2 and "--overwrite" in err and Path("a.mp4").read_text() == "precious" and not runs.find()
    assert vidgen("generate", RED, "--steps", 1, "--out", "a.mp4", "--overwrite")[0] == 0 and Clip.open("a.mp4").num_frames > 1


def test_a_long_prompt_is_cut_and_strange_words_are_named(vidgen):
    status, out, _ = vidgen("generate", ("a red zebra " * 900)[:10_000], "--steps", 1, "--frames", 1, "--out", "a.mp4", "--no-run")
    assert status == 0 and "zebra" in out
    note = next(line for line in out.splitlines() if "tokens" in line)
    assert "the prompt has" in note and "are left out" in note


@pytest.mark.parametrize(("more", "says"), [(["--device", "cuda:7"], "cuda"), (["--steps", "5000"], "1000")])
def test_what_only_the_loaded_model_knows(vidgen, more, says):
    status, out, err = vidgen("generate", RED, "--out", "a.mp4", *more)
    assert status == 2 and says in err and not out and not made() and runs.find()[0].status == "failed"


# right, and yet it fails

def test_a_model_that_cannot_fit_is_refused_until_forced(vidgen, monkeypatch):
    monkeypatch.setattr(plan, "free_memory", lambda device: 10_000)
    status, _, err = vidgen("generate", RED, "--steps", 1, "--out", "a.mp4")
    assert status == 1 and "does not fit" in err and "needed on cpu" in err and "--force" in err and "force=True" not in err and not made()
    assert runs.find()[0].status == "failed"
    assert vidgen("generate", RED, "--steps", 1, "--out", "a.mp4", "--force")[0] == 0


@pytest.mark.parametrize("damage", ["cut", "noise", "config", "gone"])
def test_damaged_weights_are_named(vidgen, checkpoints, lab, damage):
    shutil.copytree(checkpoints / "tiny-t2v", lab / "bad")
    file = lab / "bad/transformer" / ("config.json" if damage == "config" else "diffusion_pytorch_model.safetensors")
    data = file.read_bytes()
    file.unlink() if damage == "gone" else file.write_bytes({"cut": data[: len(data) // 2], "noise": os.urandom(len(data)), "config": b"{"}[damage])
    status, _, err = vidgen("generate", RED, "--model", lab / "bad", "--out", "a.mp4")
    assert status == 1 and str(file) in err.replace(" ", "").replace("\n", "") and not made() and not runs.find()


def test_weights_that_are_not_here_name_the_command(vidgen):
    status, _, err = vidgen("generate", RED, "--model", "cogvideox-5b")
    assert status == 1 and "hf download zai-org/CogVideoX-5b" in err and "Looked in" in err


def test_an_unwritable_folder_of_runs_names_the_way_around(vidgen, lab, monkeypatch):
    (lab / "taken").write_text("a file")
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(lab / "taken"))
    status, _, err = vidgen("generate", RED, "--steps", 1, "--out", "a.mp4")
    assert status in (1, 2) and "VIDGEN_STORAGE_RUNS" in err and "--no-run" in err and "Errno" not in err and not made()
    assert vidgen("generate", RED, "--steps", 1, "--out", "a.mp4", "--no-run")[0] == 0


@contextmanager
def small_files():
    "No file of this process may grow beyond 2 KB: what a full disk does, on any machine. Over before pytest writes its next dot, which may go into a file too."
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_a_film_that_cannot_be_written_leaves_nothing(vidgen, name):
    with small_files():
        status, out, err = vidgen("generate", RED, "--steps", 1, "--out", name, "--no-run")
    assert status == 1 and "stability" not in out and not made() and name in err, err


@pytest.fixture
def tiny_disk(lab):
    "A file system of 64 KB, where one can be mounted."
    folder = lab / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_for_the_film(vidgen, tiny_disk):
    (tiny_disk / "fill").write_bytes(b"0" * 60_000)
    status, out, err = vidgen("generate", RED, "--steps", 1, "--out", tiny_disk / "a.mp4")
    assert status == 1 and "space" in err and made(tiny_disk) == [] and "stability" not in out
    assert runs.find()[0].status == "failed"


def test_a_full_disk_for_the_run(vidgen, tiny_disk, monkeypatch):
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tiny_disk / "runs"))
    (tiny_disk / "fill").write_bytes(b"0" * 61_000)
    status, _, err = vidgen("generate", RED, "--steps", 1, "--out", "a.mp4")
    assert status == 1 and "full" in err and "--no-run" in err and not made()


def test_ctrl_c_while_the_film_is_written(vidgen, monkeypatch):
    from vidgen import clip

    def half(target, *rest, **more):
        Path(target).write_bytes(b"half a film")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setitem(clip._WRITERS, ".mp4", half)
    status, out, err = vidgen("generate", RED, "--steps", 1, "--out", "a.mp4")
    assert status == 130 and "stopped" in err and "marked as canceled" in err and not made() and not out
    assert runs.find()[0].status == "canceled"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def start(*args, background=False, **env):
    "The command in a process of its own; `background`: as a script's `command &`, where Ctrl-C is ignored."
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " * background + "from vidgen.cli import console; console()"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)],
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("sign", "when", "background"), [(signal.SIGTERM, "loading", False), (signal.SIGINT, "denoising", False), (signal.SIGTERM, "denoising", True)])
def test_a_real_signal_leaves_a_canceled_run_and_no_film(lab, sign, when, background):
    process = start("generate", RED, "--steps", 900, "--out", "a.mp4", background=background)
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if (found := runs.find()) and (when == "loading" or found[0].manifest["model"]):
            break
        time.sleep(0.05)
    time.sleep(0.3)
    for _ in range(2):  # twice, as impatient people do
        process.send_signal(sign)
        time.sleep(0.02)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not out and "marked as canceled" in err and "Traceback" not in err, err
    assert not made() and [r.status for r in runs.find()] == ["canceled"]


def test_home_may_be_read_only_and_json_is_alone_on_stdout(lab):
    nowhere = dict(HOME="/proc/no/home", XDG_CACHE_HOME="/proc/no/cache", HF_HOME="/proc/no/hf", XDG_CONFIG_HOME="/proc/no/config")
    process = start("generate", "a red zebra", "--steps", 1, "--out", "a.mp4", "--json", **nowhere)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert Path(result["clips"][0]["path"]).stat().st_size and "zebra" in " ".join(result["notes"]) and "Traceback" not in err


def test_what_nobody_foresaw(vidgen, monkeypatch):
    monkeypatch.setattr(registry, "models", lambda: {}["lamp"])
    status, _, err = vidgen("models")
    assert status == 1 and "KeyError" in err and "--debug" in err
    with pytest.raises(KeyError):
        cli.main(["models", "--debug"])


def test_out_of_memory_says_what_needs_less(vidgen, monkeypatch):
    monkeypatch.setattr(registry, "load", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
    status, _, err = vidgen("generate", RED, "--out", "a.mp4")
    assert status == 1 and "out of memory" in err and "--precision" in err and runs.find()[0].status == "failed"


# the other commands

def test_an_explicit_default_is_kept_beside_a_plan(monkeypatch, vidgen):
    from vidgen.generate import command

    seen = []
    monkeypatch.setattr(command, "work", lambda *_, **load: seen.append(load) or {}["enough"])
    vidgen("generate", "a red circle", "--plan", "auto-lossy", "--offload", "none", "--gate", "0", "--no-run")
    assert seen[0]["plan"] == "auto-lossy" and seen[0]["offload"] == "none" and seen[0]["gate"] == 0 and not {"cache", "tiling", "storage"} & set(seen[0])


def test_models_as_text_and_json(vidgen):
    status, out, _ = vidgen("models")
    assert status == 0 and "shapes-t2v" in out and "tiny-t2v" in out and "hf download zai-org/CogVideoX-5b" in out
    rows = json.loads(vidgen("models", "--json")[1])
    assert {"tiny-t2v", "cogvideox-5b"} <= {r["name"] for r in rows}


def test_runs_are_listed_latest_first(vidgen):
    assert "no runs" in vidgen("runs")[1]
    for i in range(3):
        with runs.Run.create("lamp", {"i": i}) as run:
            run.finish(light=i)
        time.sleep(0.01)
    status, out, _ = vidgen("runs", "lamp", "-n", 2, "--json")
    assert status == 0 and [r["result"] for r in json.loads(out)] == ["light 2", "light 1"]
    with runs.Run.create("clip", {}) as run:
        run.finish(path=["a.mp4"], stability=[0.98765], as_asked=[None], hash=["f" * 200])
    out = vidgen("runs", "clip")[1]
    assert "path a.mp4, stability 0.988, hash fff" in out and "…" in out and "None" not in out
    assert vidgen("runs", "--status", "canceld")[0] == 2 and "canceled" in vidgen("runs", "--status", "canceld")[2]


@pytest.mark.parametrize(("words", "given", "over"), [
    (["-p", "seed", "3"], [("seed", "3")], []), (["-p", "seed=3", "--param", "prompt", "a = b"], [("seed", "3"), ("prompt", "a = b")], []),
    (["-p", "x", "-1", "-g", "seed", "1,2"], [("x", "-1")], [("seed", "1,2")]),
])
def test_sweep_passes_pairs_on(vidgen, monkeypatch, words, given, over):
    from vidgen import sweeps

    seen = {}
    monkeypatch.setattr(sweeps, "command", lambda experiment, given, **more: seen.update(experiment=experiment, given=given, **more) or 7)
    status, _, err = vidgen("sweep", "001", *words, "--preset", "smoke", "--force", "--show", "loss", "-o", "table.json")
    assert status == 7 and seen == dict(experiment="001", given=given, over=over, preset="smoke", force=True, sweep=False, show=["loss"], out="table.json"), err


def test_a_pair_without_its_value(vidgen):
    status, _, err = vidgen("sweep", "001", "-p", "seed")
    assert status == 2 and "-p NAME VALUE" in err


def test_smoke_doctor_finds_this_machine_well(vidgen):
    status, out, _ = vidgen("doctor")
    assert status == 0 and "ready" in out and "H.264" in out and "tiny-t2v" not in out.split("ready")[1]


@pytest.mark.parametrize(("env", "says"), [
    ({"VIDGEN_MODEL_NAME": "cogvideox-5b"}, "hf download zai-org/CogVideoX-5b"), ({"VIDGEN_GENERATE_SED": "1"}, "generate_sed"),
    ({"VIDGEN_STORAGE_RUNS": "/proc/runs"}, "VIDGEN_STORAGE_RUNS=/path"),
])
def test_doctor_names_what_is_broken_and_the_cure(vidgen, monkeypatch, env, says):
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    status, out, err = vidgen("doctor")
    assert status == 1 and "broken" in out and says.lower() in out.lower(), out


def test_doctor_sees_a_second_opencv_a_missing_package_and_a_full_disk(monkeypatch, lab):
    version = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "4.9" if name == "opencv-python" else version(name))
    found, = doctor.opencv()
    assert found.state == "broken" and "pip uninstall -y opencv-python &&" in found.mend
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    found, = doctor.disk()
    assert found.state == "broken" and "VIDGEN_STORAGE_RUNS" in found.mend
    monkeypatch.setitem(sys.modules, "av", None)
    found, = doctor.imports()
    assert found.state == "broken" and found.mend == "pip install --force-reinstall av"
    monkeypatch.setenv("HF_HOME", "/proc/no/hf")
    assert [f.state for f in doctor.folders() if f.name == "hub cache"] == ["look"]


def test_what_commands_ask_in_the_same_words_is_declared_once():
    "By `options`; where the words differ, what is meant differs: a folder of films, a GPU for each process, tiles dealt out."
    from typing import get_type_hints

    from vidgen.generate import batch_command, command, options, parallel_command

    hints = [get_type_hints(f, include_extras=True) for f in (command.generate, batch_command.command, parallel_command.command)]
    for name in {n for one in hints for n in one if n != "return" and sum(n in other for other in hints) > 1}:
        kinds = [one[name].__metadata__[0] for one in hints if name in one]
        assert all(k is kinds[0] for k in kinds) or name in ("prompt", "out", "device", "tiling"), name
    declared = [v.__metadata__[0] for v in vars(options).values() if hasattr(v, "__metadata__")]
    assert len(declared) > 20 and all(any(k is one[n].__metadata__[0] for one in hints for n in one if n != "return") for k in declared)
