"""A batch under everything that goes wrong: a faulty file, a bad picture, a killed parent, a killed worker, a full disk; and the same films whoever makes them."""
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidgen import cli, runs
from vidgen.clip import Clip
from vidgen.errors import Canceled
from vidgen.generate import gallery, maker, workers
from vidgen.generate.batch import batch, locked, time_workers
from vidgen.generate.requests import Faults, chunks, items_of, read
from vidgen.progress import Cancel

RED, BLUE = "a red circle moving right on a white background", "a blue star moving left on a black background"
FAST = {"num_inference_steps": 2, "num_frames": 9}


@pytest.fixture(autouse=True)
def lab(tmp_path, monkeypatch):
    for key in [k for k in os.environ if k.startswith("VIDGEN_")]:
        monkeypatch.delenv(key)
    (tmp_path / "settings.ini").write_text("[storage]\nruns = runs\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(n, **more):
    return [{"prompt": RED if i % 2 else BLUE, "seed": i, "name": f"clip-{i}", **FAST, **more} for i in range(n)]


def written(requests, name="requests.jsonl"):
    Path(name).write_text("\n".join(json.dumps(r) for r in requests))
    return name


def hashes(outcome):
    return {r["name"]: r["hash"] for r in outcome.rows}


def whole(folder):
    "Every film can be read and is the one its note promises; nothing unfinished is left."
    films = sorted(Path(folder).rglob("*.mp4"))
    assert all(Clip.open(f).num_frames for f in films) and not [p for p in Path(folder).rglob("*") if ".part" in p.name]
    return [f.stem for f in films]


# the file

@pytest.mark.parametrize(("line", "says"), [
    ('{"promt": "a"}', "line 2: unknown key 'promt'; nearest: prompt"), ('{"prompt": ""}', "line 2: there is no prompt"), ('{"prompt": "  "}', "prompt is empty"), ("[1, 2", "no JSON"), ("17", "object"),
    ('{"prompt": "a", "seed": true}', "seed is a whole number"), ('{"prompt": "a", "seed": -1}', "seed -1"), ('{"prompt": "a", "seed": [1, 2]}', "2 seeds for 1 clips"), ('{"prompt": "a", "seed": 1.5}', "whole number"),
    ('{"prompt": "a", "num_frames": 16}', "nearest: 9 or 17"), ('{"prompt": "a", "height": 50}', "height=50"), ('{"prompt": "a", "guidance_scale": NaN}', "NaN is no number"), ('{"prompt": "a", "guidance_scale": 0.5}', "from 1 up"),
    ('{"prompt": "a", "num_inference_steps": 0}', "num_inference_steps=0"), ('{"prompt": "a", "num_videos_per_prompt": 0}', "num_videos_per_prompt=0"), ('{"prompt": "a", "model": "shape-t2v"}', "nearest: shapes-t2v"),
    ('{"prompt": "a", "model": "shapes-i2v"}', "starts from a picture"), ('{"prompt": "a", "model": "shapes-t2v", "image": "x.png"}', "can't use an image"), ('{"prompt": "a", "name": "../x"}', "is not a key"),
    ('{"prompt": "a", "name": "first"}', "the name 'first' is that of line 1"), ('{"prompt": "a", "prompt": "b"}', "given twice"), ('{"prompt": "a", "guidance": "dynamc"}', "nearest: dynamic"), ('{"prompt": "a", "image": 3}', "image is text"),
])
def test_a_faulty_line_is_refused_before_anything_is_loaded(line, says):
    Path("requests.jsonl").write_text(json.dumps({"prompt": RED, "name": "first"}) + "\n" + line)
    with pytest.raises(Faults, match=re.escape(says)):
        batch("requests.jsonl", "films")
    assert not Path("films").exists()


def test_nothing_heavy_is_loaded_to_find_a_fault():
    written([{"prompt": RED}, {"prompt": RED, "sed": 1}])
    code = "import sys\nfrom vidgen.cli import main\nassert main(['batch', 'requests.jsonl', '--out', 'films']) == 2\n" \
           "heavy = [m for m in ('torch', 'diffusers', 'transformers', 'cv2') if m in sys.modules]\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "line 2: unknown key 'sed'; nearest: seed" in " ".join(done.stderr.split()), done.stderr


def test_all_faults_are_named_at_once_and_many_are_counted():
    with pytest.raises(Faults) as err:
        read([{"prompt": RED}] + [{"prompt": RED, "num_frames": 16}] * 30)
    assert len(err.value.lines) == 30 and "30 of 31 requests" in str(err.value) and "… and 10 more" in str(err.value)


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_an_empty_file_is_an_error(text):
    Path("requests.jsonl").write_text(text)
    with pytest.raises(ValueError, match="holds no request"):
        batch("requests.jsonl", "films")


def test_a_missing_file_and_one_of_another_coding():
    with pytest.raises(FileNotFoundError, match="there is no file requests.jsonl"):
        batch("requests.jsonl", "films")
    Path("requests.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        batch("requests.jsonl", "films")


def test_list_lines_dictionaries_and_a_byte_order_mark_are_the_same():
    requests = asked(3)
    Path("a.json").write_text(json.dumps(requests, indent=2))
    Path("b.jsonl").write_text("\ufeff" + "\r\n\r\n".join(json.dumps(r) for r in requests))
    found = [[(i.name, i.key) for i in read(source)] for source in (requests, "a.json", "b.jsonl")]
    assert found[0] == found[1] == found[2]


def test_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(json.dumps(r) for r in asked(2))))
    assert [i.where for i in read("-")] == ["line 1", "line 2"]


# the key

def key(**request):
    return items_of("line 1", {"prompt": RED, **request}, base=Path(), how={})[0].key


def test_the_key_holds_everything_that_is_seen_and_nothing_else(monkeypatch):
    other = [key(seed=1), key(prompt=BLUE), key(num_frames=9), key(num_inference_steps=3), key(guidance_scale=2), key(guidance="dynamic"), key(negative_prompt="blur"), key(height=96)]
    assert len({key(), *other}) == 9
    assert key() == key(name="x") == key(model="shapes-t2v") == key(seed=0, num_frames=17, guidance_scale=3, num_inference_steps=25) == key(image=None)
    monkeypatch.setenv("VIDGEN_GENERATE_NUM_INFERENCE_STEPS", "5")
    assert key() == key(num_inference_steps=5) != key(num_inference_steps=25)


def test_the_key_holds_the_bytes_of_a_picture_and_the_precision():
    for name, value in (("a.png", 10), ("b.png", 10), ("c.png", 20)):
        Image.new("RGB", (96, 64), (value,) * 3).save(name)
    assert key(image="a.png") == key(image="b.png") != key(image="c.png")
    bf16, = items_of("", {"prompt": RED}, base=Path(), how={"precision": "bf16"})
    fp32, = items_of("", {"prompt": RED}, base=Path(), how={"precision": "fp32"})
    assert fp32.key == key() != bf16.key


def test_another_way_of_computing_is_another_clip():
    ways = [{}, {"cache": "steps:0"}, {"gate": 0.5}, {"quantise": "int8-weight"}]
    assert len({read(asked(1), **how)[0].key for how in ways}) == 4
    assert read(asked(1))[0].key == read(asked(1), cache="", gate=1.0, offload="none")[0].key
    for wrong, says in (({"cach": "x"}, "nearest: cache"), ({"cache": "tea:1"}, "nearest: teacache"), ({"offload": "modl"}, "nearest: model"), ({"gate": 2}, "between 0 and 1"), ({"plan": 3}, "'auto'")):
        with pytest.raises(ValueError, match=says):
            batch(asked(1), "films", **wrong)
    assert not Path("films").exists()


def test_another_sampler_is_another_clip_and_an_unknown_one_is_refused():
    usual, other = read(asked(1)), read(asked(1), scheduler="dpm")
    assert usual[0].key != other[0].key and usual[0].key == read(asked(1), scheduler="")[0].key
    with pytest.raises(Faults, match="unknown scheduler of shapes-t2v 'dpmm'; nearest: dpm"):
        batch(asked(1), "films", scheduler="dpmm")
    assert cli.main(["batch", written(asked(1)), "--out", "films", "--no-run", "--scheduler", "dimm"]) == 2 and not Path("films").exists()
    assert cli.main(["batch", "requests.jsonl", "--out", "films", "--no-run", "--devices", "cpu", "--scheduler", "dpm"]) == 0
    assert Clip.open("films/clip-0.mp4").made["scheduler"] == "CogVideoXDPMScheduler"


def test_a_step_cache_holds_for_the_whole_batch():
    exact, cached = (batch(asked(3, num_inference_steps=6), out, devices="cpu", **how) for out, how in (("films", {}), ("cached", {"cache": "steps:0,3"})))
    assert not set(hashes(exact).values()) & set(hashes(cached).values()) and cached.facts["cache"] == "steps:0,3"
    assert [r["status"] for r in batch(asked(3, num_inference_steps=6), "films", devices="cpu", cache="steps:0,3").rows] == ["made"] * 3
    assert Clip.open("cached/clip-0.mp4").made["plan"]["cache"] == "steps:0,3"


def test_a_model_trained_further_is_another(tmp_path):
    from vidgen.models.family import family, save_parts

    keys = []
    for seed in (0, 1):
        save_parts(family("cogvideox").tiny("cogvideox-2b", seed=seed, words=RED.split()), tmp_path / "mine")
        keys.append(read([{"prompt": RED, "model": str(tmp_path / "mine")}])[0].key)
    assert keys[0] != keys[1]


def test_order_and_company_of_a_line_change_nothing():
    requests = [{k: v for k, v in r.items() if k != "name"} for r in asked(5)]
    names = {i.name for i in read(requests)}
    assert {i.name for i in read(requests[::-1] + [{"prompt": "a green star"}])} > names and len(names) == 5


def test_chunks_do_not_mix_groups_and_lose_nothing():
    items = read([*asked(5), *({**r, "name": r["name"] + "x", "num_inference_steps": 3} for r in asked(4))])
    found = chunks(items, 2)
    assert [len(c) for c in found] == [2, 2, 1, 2, 2] and all(len({i.group for i in c}) == 1 for c in found)
    assert sorted(i.name for c in found for i in c) == sorted(i.name for i in items)


# one process

def test_a_second_call_makes_only_what_is_missing():
    first = batch(asked(4), "films", devices="cpu")
    before = {p.name: p.stat().st_mtime_ns for p in Path("films").glob("*.mp4*")}
    assert [r["status"] for r in first.rows] == ["made"] * 4 and len(before) == 8
    Path("films/clip-1.mp4").unlink()
    Path("films/clip-2.mp4.json").write_text("{")
    changed = asked(4)
    changed[3]["seed"] = 99
    again = batch(changed, "films", devices="cpu")
    assert [r["status"] for r in again.rows] == ["kept", "made", "made", "made"]
    assert Path("films/clip-0.mp4").stat().st_mtime_ns == before["clip-0.mp4"]
    for i, same in enumerate([True, True, True, False]):   # made again in other company: the same to one grey level
        assert (np.abs(Clip.open(f"films/clip-{i}.mp4").frames.astype(int) - 0).mean() > 0) and (again.rows[i]["seed"] == first.rows[i]["seed"]) == same
    assert [r["status"] for r in batch(changed, "films", devices="cpu").rows] == ["kept"] * 4


def test_everything_there_loads_no_model(monkeypatch):
    batch(asked(2), "films", devices="cpu")
    monkeypatch.setattr(maker.registry, "load", None)
    assert [r["status"] for r in batch(asked(2), "films", devices="cpu").rows] == ["kept"] * 2


def test_a_failing_request_costs_only_itself():
    Path("no.png").write_text("no picture")
    Image.new("RGB", (96, 64), "white").save("yes.png")
    bad = [{"prompt": RED, "image": "no.png", "name": "unreadable"}, {"prompt": RED, "image": "gone.png", "name": "gone"}, {"prompt": RED, "model": "cogvideox-5b", "name": "no weights"},
           {"prompt": RED, "num_inference_steps": 1001, "name": "too many steps"}]
    outcome = batch([*bad[:2], *asked(2), {"prompt": RED, "image": "yes.png", "name": "pictured", **FAST}, *bad[2:]], "films", devices="cpu")
    said = {r["name"]: r.get("error") for r in outcome.rows}
    assert [r["name"] for r in outcome.rows if r["status"] == "made"] == ["clip-0", "clip-1", "pictured"]
    assert "PIL knows no such format" in said["unreadable"] and "there is no picture" in said["gone"] and "hf download" in said["no weights"] and "1 to 1000" in said["too many steps"]
    assert {r["model"] for r in outcome.rows} == {"shapes-t2v", "shapes-i2v", "cogvideox-5b"}


def test_what_breaks_a_chunk_is_found_out(monkeypatch):
    class OutOfMemoryError(RuntimeError):
        pass

    real = maker.registry.load

    def load(*a, **k):
        gen = real(*a, **k)
        generate = gen.generate

        def picky(prompts, *a, **k):
            if any("green" in p for p in prompts):
                raise OutOfMemoryError("tried to allocate 20 GiB")
            return generate(prompts, *a, **k)

        gen.generate = picky
        return gen

    monkeypatch.setattr(maker.registry, "load", load)
    requests = asked(3)
    requests[1]["prompt"] = "a green star"
    outcome = batch(requests, "films", devices="cpu", at_once=3)
    assert [r["status"] for r in outcome.rows] == ["made", "failed", "made"] and outcome.rows[1]["error"].startswith("out of memory")


def runs_out_once(patch):
    "Memory runs out at the first clips; what is cheaper is half precision."
    from vidgen.generate import fast, generator

    real, calls = generator._clips, []

    def clips(*a):
        calls.append(a)
        if len(calls) == 1:
            raise MemoryError
        return real(*a)

    patch.setattr(generator, "_clips", clips)
    patch.setattr(fast, "cheaper", lambda plan, clips: replace(plan, precision="bf16"))


def test_a_clip_made_with_less_than_was_asked_says_so_for_good(monkeypatch):
    with monkeypatch.context() as patch:
        runs_out_once(patch)
        first = batch(asked(2), "films", devices="cpu", precision="fp32")
    again = batch(asked(2), "films", devices="cpu", precision="fp32")
    for outcome, status in ((first, "made"), (again, "kept")):
        assert [(r["status"], r["plan"], r["degraded"]) for r in outcome.rows] == [(status, {"precision": "bf16"}, ["precision bf16 instead of fp32"])] * 2
        assert "2 with less than was asked" in repr(outcome) and "clip-1: memory ran out, made with precision bf16" in repr(outcome) and "--redo-degraded" in repr(outcome)
    assert next(csv.DictReader(Path("films/report.csv").open()))["degraded"] == "precision bf16 instead of fp32"
    assert cli.main(["batch", written(asked(2)), "--out", "films", "--no-run", "--devices", "cpu", "--precision", "fp32", "--redo-degraded"]) == 0
    rows = json.loads(Path("films/report.json").read_text())["rows"]
    assert [(r["status"], r["plan"], r["degraded"]) for r in rows] == [("made", {"precision": "fp32"}, [])] * 2
    assert [r["status"] for r in batch(asked(2), "films", devices="cpu", precision="fp32", redo_degraded=True).rows] == ["kept"] * 2


def test_a_model_that_does_not_load_is_tried_once(monkeypatch):
    calls = []

    def load(name, **k):
        calls.append(name)
        raise MemoryError

    monkeypatch.setattr(maker.registry, "load", load)
    outcome = batch(asked(6), "films", devices="cpu")
    assert calls == ["shapes-t2v"] and {r["error"].split(":")[0] for r in outcome.rows} == {"out of memory"}


def test_one_model_is_loaded_at_a_time():
    Image.new("RGB", (96, 64), "white").save("yes.png")
    mixed = [r for i, r in enumerate(asked(2)) for r in (r, {"prompt": RED, "image": "yes.png", "seed": i, "name": f"pictured-{i}", **FAST})]
    work = maker.Maker("cpu", precision="fp32")
    for chunk in chunks(read(mixed), 1):
        assert [r["status"] for r in work.make(chunk, Path("films"))] == ["made"]
    assert work.loads == 2


def test_the_same_request_twice_is_one_film():
    outcome = batch([{"prompt": RED, **FAST}, {"prompt": RED, "seed": 0, **FAST}], "films", devices="cpu")
    assert len(whole("films")) == 1 and [r["where"] for r in outcome.rows] == ["request 1", "request 2"] and outcome.rows[0]["hash"] == outcome.rows[1]["hash"]


def test_a_disk_that_takes_nothing_ends_the_batch(monkeypatch):
    real, calls = Clip.save, []

    def save(clip, path, **k):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, "no space left", str(path))
        return real(clip, path, **k)

    with monkeypatch.context() as patch, pytest.raises(maker.DiskFailed, match="goes on from there"):
        patch.setattr(Clip, "save", save)
        batch(asked(4), "films", devices="cpu", at_once=1)
    report = json.loads(Path("films/report.json").read_text())
    assert (report["made"], report["waiting"]) == (1, 3)
    assert [r["status"] for r in batch(asked(4), "films", devices="cpu").rows] == ["kept"] + ["made"] * 3


def test_a_chunk_stopped_in_its_middle_reports_what_it_has_made(monkeypatch):
    real, calls = Clip.save, []

    def save(clip, path, **k):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(clip, path, **k)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Clip, "save", save)
        batch(asked(4), "films", devices="cpu", at_once=2)
    assert [r["status"] for r in json.loads(Path("films/report.json").read_text())["rows"]] == ["made", "waiting", "waiting", "waiting"] and whole("films") == ["clip-0"]


def test_cancel_keeps_what_is_made():
    cancel = Cancel()
    with pytest.raises(Canceled):
        batch(asked(6), "films", devices="cpu", at_once=1, cancel=cancel, progress=lambda e: e.done >= 3 and cancel.cancel())
    made = len(whole("films"))
    assert made >= 2 and json.loads(Path("films/report.json").read_text())["made"] == made
    assert [r["status"] for r in batch(asked(6), "films", devices="cpu").rows].count("kept") == made


def test_progress_rises_over_the_whole_batch():
    events = []
    batch(asked(3) + [{**r, "name": r["name"] + "-long", "num_inference_steps": 6} for r in asked(1)], "films", devices="cpu", progress=events.append)
    done = [e.done for e in events]
    assert done == sorted(done) and done[-1] == events[-1].total == 4 and len(set(done)) > 8 and {e.stage for e in events} == {"clips"}
    assert any("loading shapes-t2v" in e.note for e in events) and events[-1].note == "4 made"


def test_two_batches_do_not_share_a_folder():
    with locked(Path("films")), pytest.raises(ValueError, match="another batch is writing into films"):
        batch(asked(1), "films", devices="cpu")


# the report

class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "poster", "srcset", "action")]

    def handle_data(self, data):
        self.text += data


def test_the_report_says_the_same_three_times():
    evil = {"prompt": "=cmd() <script>alert('&')</script> a red circle", "name": "sub dir/ä#1", "negative_prompt": "<b>", **FAST}
    outcome = batch([*asked(2), evil, {"prompt": RED, "image": "gone.png"}], "films", devices="cpu")
    report, table = json.loads(Path("films/report.json").read_text()), list(csv.DictReader(Path("films/report.csv").open()))
    assert [r["name"] for r in report["rows"]] == [r["name"] for r in table] == [r["name"] for r in outcome.rows]
    assert (report["made"], report["failed"], report["devices"]) == (3, 1, ["cpu"]) and report["clips_per_minute"] > 0
    assert table[2]["prompt"].startswith("'=cmd") and table[3]["error"].startswith("there is no picture") and float(table[0]["seconds"]) > 0
    page = Page()
    page.feed(html := Path("films/index.html").read_text())
    from urllib.parse import unquote

    assert page.tags.count("script") == 1 and page.tags.count("video") == 3 and page.tags.count("b") == 1 and "viewport" in html
    assert all((Path("films") / unquote(link)).is_file() for link in page.links) and len(page.links) == 6
    assert "http:" not in html and "https:" not in html and evil["prompt"] in page.text
    for row in outcome.rows[:2]:
        assert f"seed {row['seed']}" in page.text and f"stability {row['stability']:.2f}" in page.text
    assert all("seen" in r and r["as_asked"] in (True, False) for r in report["rows"][:2]) and table[0]["as_asked"] in ("True", "False")


def test_numbers_of_a_report():
    rows = [{"status": "made", "stability": 1.0, "as_asked": True}, {"status": "kept", "stability": 0.5, "as_asked": None}, {"status": "failed"}]
    assert gallery.means(rows) == {"stability": 0.75, "as_asked": 1.0} and gallery.counts(rows)["waiting"] == 0
    assert gallery.means([{"status": "failed"}]) == {}


# the command

def test_smoke_the_command(capsys):
    written([*asked(2), {"prompt": RED, "image": "gone.png", "name": "gone"}])
    assert cli.main(["batch", "requests.jsonl", "--out", "films", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [r["status"] for r in report["rows"]] == ["made", "made", "failed"]
    run, = runs.find("batch")
    assert run.status == "succeeded" and run.manifest["result"]["made"] == 2 and run.manifest["clips"][0]["hash"] == report["rows"][0]["hash"]
    written(asked(2))
    assert cli.main(["batch", "requests.jsonl", "--out", "films", "--no-run"]) == 0
    said = capsys.readouterr().out
    assert "2 kept" in said and "index.html" in said and len(runs.find("batch")) == 1
    assert cli.main(["batch", "requests.jsonl", "--out", "elsewhere", "--check"]) == 0 and not Path("elsewhere").exists()
    assert cli.main(["batch", "requests.jsonl", "--out", "films", "--devices", "cuda:99"]) == 2


@pytest.mark.parametrize(("words", "says"), [("gpu", "unknown device"), ("cpu:0", "unknown device"), (0, "at least one"), ("", "unknown device"), (True, "is a number or a text"), ("auto,cpu", "name each")])
def test_wrong_devices(words, says):
    with pytest.raises(ValueError, match=says):
        workers.devices(words)


# killed

def notes(folder="films"):
    return len(list(Path(folder).glob("*.mp4.json")))


def wait_for(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@contextmanager
def started(*words):
    "The command in a process of its own, which has made two films; it does not outlive the block."
    code = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}; from vidgen.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, "batch", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: notes() >= 2 or process.poll() is not None)
        yield process
    finally:
        process.kill()
        process.communicate()


def goes_on(requests):
    "The same call again keeps what is there, makes what is missing, and leaves nothing half done."
    there = notes()
    before = {p.name: p.stat().st_mtime_ns for p in Path("films").glob("*.mp4")}
    Path("films/.clip-9-0123456789ab.part.mp4").write_text("half a film")
    rows = batch(requests, "films", devices="cpu").rows
    assert [r["status"] for r in rows].count("kept") == there < len(requests) and {r["status"] for r in rows} == {"kept", "made"}
    assert all((Path("films", r["file"]).stat().st_mtime_ns == before.get(r["file"])) == (r["status"] == "kept") for r in rows) and len(whole("films")) == len(requests)


def test_a_killed_batch_takes_its_workers_with_it_and_goes_on_later():
    import psutil

    requests = asked(24, num_inference_steps=6)
    with started(written(requests), "--out", "films", "--no-run", "--devices", "cpu:2") as process:
        left = psutil.Process(process.pid).children()
        process.kill()
        wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in left), 20)
    assert len(left) == 2 and process.returncode == -signal.SIGKILL
    goes_on(requests)


@pytest.mark.slow
def test_a_killed_process_alone_goes_on_later():
    requests = asked(40, num_inference_steps=4)
    with started(written(requests), "--out", "films", "--no-run", "--devices", "cpu") as process:
        process.kill()
    goes_on(requests)


def test_interrupted_on_the_keyboard():
    requests = asked(40, num_inference_steps=4)
    with started(written(requests), "--out", "films", "--devices", "cpu") as process:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and "goes on from there" in said and runs.find("batch")[0].status == "canceled"
    report = json.loads(Path("films/report.json").read_text())
    assert report["made"] == len(whole("films")) >= 2 and report["waiting"] == 40 - report["made"]


# many processes

@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "What one process makes of eight requests."
    return hashes(batch(asked(8), tmp_path_factory.mktemp("alone"), devices="cpu"))


class Killing(workers.Pool):
    "Kills a worker that gets a clip of one of these names, as often as it says."
    kills = {}

    def _feed(self, worker, todo, folder):
        busy = worker.chunk
        super()._feed(worker, todo, folder)
        for item in worker.chunk if worker.chunk and not busy else ():
            if self.kills.get(item.name, 0) > 0:
                self.kills[item.name] -= 1
                os.kill(worker.process.pid, signal.SIGKILL)


def killing(monkeypatch, **kills):
    monkeypatch.setattr(workers, "Pool", Killing)
    monkeypatch.setattr(Killing, "kills", {k.replace("_", "-"): n for k, n in kills.items()})


def test_two_workers_make_the_same_films(alone):
    outcome = batch(asked(8), "films", devices="cpu:2")
    assert hashes(outcome) == alone and len(set(alone.values())) == 8 and outcome.facts["deaths"] == [] and len(whole("films")) == 8
    assert [r["name"] for r in outcome.rows] == [f"clip-{i}" for i in range(8)]


def test_a_killed_worker_costs_nothing_that_can_be_made_again(alone, monkeypatch):
    killing(monkeypatch, clip_0=1)
    outcome = batch(asked(8), "films", devices="cpu:2", progress=lambda e: None)
    assert {r["status"] for r in outcome.rows} == {"made"} and outcome.facts["deaths"] == ["killed by SIGKILL (out of memory?)"]
    others = {n: h for n, h in hashes(outcome).items() if n not in ("clip-0", "clip-1")}   # these two were made again, each alone
    assert others == {n: alone[n] for n in others} and len(whole("films")) == 8


@pytest.mark.slow
def test_a_request_that_kills_is_tried_twice_and_reported(alone, monkeypatch):
    killing(monkeypatch, clip_1=9)
    outcome = batch(asked(4), "films", devices="cpu:2")
    assert [r["status"] for r in outcome.rows] == ["made", "failed", "made", "made"] and len(outcome.facts["deaths"]) == 2
    assert "died, and so did the next: killed by SIGKILL" in outcome.rows[1]["error"] and hashes(batch(asked(4), "films")).keys() == {f"clip-{i}" for i in range(4)}


def test_workers_that_cannot_start_are_said(monkeypatch):
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="don't start on cpu: ended with status 1"):
        batch(asked(2), "films", devices="cpu:2")


@pytest.mark.slow
def test_a_disk_that_fails_in_a_worker_ends_the_batch():
    Path("films/clip-1.mp4").mkdir(parents=True)
    with pytest.raises(maker.DiskFailed, match="goes on from there"):
        batch(asked(2), "films", devices="cpu:2", at_once=1)


def test_the_longest_work_goes_first_and_a_worker_stays_with_its_model():
    items = read([{"prompt": RED, "seed": s, "num_inference_steps": n} for s, n in enumerate((2, 9, 5))])
    todo = workers.Queue([(i,) for i in items])
    assert [todo.take("shapes-t2v", [])[0].num_inference_steps for _ in range(3)] == [9, 5, 2] and todo.take("", []) is None


def test_time_workers_wants_something_to_compare():
    with pytest.raises(ValueError, match="two devices"):
        time_workers(asked(2), "cpu")


@pytest.mark.slow
def test_time_workers():
    found = time_workers(asked(6), "cpu:2", rounds=2)
    assert found["equal"] and found["clips"] == 6 and {n: len(s) for n, s in found["seconds"].items()} == {1: 2, 2: 2} and found["ratio"] > 0


# what a word means

def mine(folder, text):
    from vidgen.generate.steps import FILE
    from vidgen.models.family import family, save_parts

    if not folder.exists():
        save_parts(family("cogvideox").tiny("cogvideox-2b", seed=0, words=RED.split()), folder)
    (folder / FILE).write_text(text)
    return [{"prompt": RED, "model": str(folder), **FAST}]


def test_the_key_of_a_measured_cache_holds_what_was_measured(tmp_path):
    files = [json.dumps({"usual": "measured", "steps": {"computed": c, "of": 4}, "teacache": [1, 0], "magcache": [1.0, 0.9, 0.9, 0.9]}) for c in ("0,2", "0,3")]
    for rule, same in {"auto": False, "measured": False, "teacache:0.1": False, "magcache:0.1": False, "": True, "steps:0": True}.items():
        one, other = (read(mine(tmp_path / "mine", text), cache=rule)[0].key for text in files)
        assert (one == other) is same, rule
    assert read(mine(tmp_path / "mine", files[0]), cache="auto")[0].key == read(mine(tmp_path / "mine", files[0]), cache="measured")[0].key
    item, = read(mine(tmp_path / "mine", "{"), cache="auto")
    assert "step_cache.json is not valid JSON" in item.fault and not read(mine(tmp_path / "mine", "{"))[0].fault


def test_the_key_of_an_automatic_plan_is_that_of_the_plan(monkeypatch):
    from vidgen.generate import requests

    assert read(asked(1), plan="auto")[0].key == read(asked(1))[0].key and read(asked(1), plan="auto", gate=0.5)[0].key == read(asked(1), gate=0.5)[0].key
    real = requests.registry.planned
    monkeypatch.setattr(requests.registry, "planned", lambda *a: replace(real(*a), precision="bf16", storage="fp8", offload="model"))
    assert read(asked(1), plan="auto")[0].key == read(asked(1), precision="bf16", storage="fp8")[0].key


def test_a_worker_with_less_room_than_the_plan_assumed_says_so(monkeypatch):
    item, = read(asked(1), plan="auto")
    real = maker.registry.load
    monkeypatch.setattr(maker.registry, "load", lambda name, **how: real(name, **(how | {"plan": None, "storage": "fp8"})))
    row, = maker.Maker("cpu", plan="auto").make((item,), Path("films"))
    assert row["degraded"] == ["storage fp8 instead of none"]


def test_a_row_tells_the_steps_that_were_computed():
    rows = batch(asked(1, num_inference_steps=6), "films", devices="cpu", cache="steps:0-3,5").rows + batch(asked(1), "plain", devices="cpu").rows
    assert rows[0]["computed_steps"] == "0-3,5" and "computed_steps" not in rows[1]
    assert next(csv.DictReader(Path("films/report.csv").open()))["computed_steps"] == "0-3,5"


def test_films_of_a_rule_that_gave_others_are_made_anew():
    from vidgen.generate.requests import computed_as, look_up

    assert computed_as({"cache": "firstblock:0.1"}, look_up("shapes-t2v"))["edition"] == 2
    assert "edition" not in computed_as({"cache": "steps:0"}, look_up("shapes-t2v"))


def test_a_look_ahead_counts_degraded_films_as_missing(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        runs_out_once(patch)
        batch(asked(2), "films", devices="cpu", precision="fp32")
    for more, says in (([], "2 there already"), (["--redo-degraded"], "clips")):
        assert cli.main(["batch", written(asked(2)), "--out", "films", "--precision", "fp32", "--check", *more]) == 0
        assert ("2 there already" in capsys.readouterr().out) is not bool(more)


def test_all_mistakes_of_a_line_are_said_at_once():
    with pytest.raises(Faults) as err:
        read([{"prompt": "  ", "steps": 8, "num_frames": 16, "height": 50, "guidance": 6, "seed": -1, "name": "../x", "num_videos_per_prompt": 0}, {"prompt": RED}, {"prompt": RED, "frames": 9}])
    said = [what for where, what in err.value.lines if where == "request 1"]
    for word in ("the word here is num_inference_steps", "prompt is empty", "num_frames=16", "height=50", "the number is guidance_scale", "seed -1", "is not a key", "num_videos_per_prompt=0"):
        assert sum(word in s for s in said) == 1, word
    assert len(said) == 8 and "2 of 3 requests" in str(err.value) and "the word here is num_frames" in str(err.value)


def test_the_help_shows_a_line_and_its_keys(capsys):
    from vidgen.generate.requests import KEYS

    assert cli.main(["batch", "--help"]) == 0
    said = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert '{"prompt": "a red circle"' in said and all(f" {key}" in said for key in KEYS)


def test_an_adapter_holds_for_the_whole_batch(tmp_path):
    import torch
    from safetensors.torch import save_file

    for seed, name in enumerate(("fox", "hen")):
        torch.manual_seed(seed)
        save_file({f"transformer.transformer_blocks.0.attn1.to_q.lora_{x}.weight": torch.randn(*size) for x, size in {"A": (2, 128), "B": (128, 2)}.items()}, f"{name}.safetensors")
    keys = [read(asked(1), lora=lora)[0].key for lora in ([], ["fox.safetensors"], ["fox.safetensors:0.5"], ["hen.safetensors"])]
    assert len(set(keys)) == 4 and keys[0] == read(asked(1))[0].key
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        batch(asked(1), "films", lora=["gone.safetensors"])
    with pytest.raises(ValueError, match="a list of files"):
        batch(asked(1), "films", lora="fox.safetensors")
    assert cli.main(["batch", written(asked(2)), "--out", "films", "--no-run", "--devices", "cpu", "--lora", "fox.safetensors:0.5"]) == 0
    assert Clip.open("films/clip-0.mp4").made["adapters"]["fox"]["scale"] == 0.5
