"""A table of scores: what it must survive, what it must remember, what it must forget, and what it must not pretend to know."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

import vidgen
from vidgen.clip import Clip
from vidgen.data.sources import world
from vidgen.errors import Canceled
from vidgen.evaluate import report, score as page, visit as visits
from vidgen.evaluate.faults import faulty
from vidgen.evaluate.metric import Metric, Value
from vidgen.evaluate.report import Scores, histograms, interval
from vidgen.progress import Cancel
from vidgen.runs import Run, find
from vidgen.world import caption, render, scene

CALLS = []  # what `counted` was called for


def counted(footage):
    "Mean brightness; says that it ran."
    CALLS.append(footage.prompt)
    return Value(float(footage.frames.mean() / 255), detail={"frames": len(footage.frames)})


def measure(name="brightness", **more):
    "A metric that is remembered, as those of the package are."
    function = types.FunctionType(counted.__code__, globals(), name)
    function.__module__ = "vidgen.test"
    return Metric(name, function, "mean brightness", **more)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDGEN_STORAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path / "runs"))
    CALLS.clear()


@pytest.fixture
def folder(tmp_path):
    "Four clips, one shaken, one of a single frame, and a file that is none."
    here = tmp_path / "clips"
    made = [render(scene(i)) for i in range(4)]
    for i, clip in enumerate([*made, faulty(made[0], "shake"), Clip(made[1].frames[:1], made=made[1].made)]):
        clip.save(here / f"{i}.mp4")
    (here / "broken.mp4").write_bytes(b"not a film")
    return here


# what comes in

def test_a_broken_clip_is_named_and_the_others_are_measured(folder):
    whole = (folder / "0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    scores = vidgen.score(folder, metrics="temporal_stability,dynamic_degree")
    assert [c["name"] for c in scores.clips] == [f"{i}.mp4" for i in range(6)]
    assert {b["name"] for b in scores.broken} == {"broken.mp4", "cut.mp4", "empty.mp4"} and all(b["reason"] for b in scores.broken)
    row = scores["temporal_stability"]
    assert row["n"] == 5 and row["unknown"] == 1 and "1 frame" in row["reason"] and row["low"] < row["value"] < row["high"]
    assert "broken.mp4" in repr(scores) and "broken.mp4" in scores._repr_html_()


def test_one_frame_is_not_measurable_and_has_a_reason():
    scores = vidgen.score(render(scene(1)).frames[:1], metrics="temporal_stability,flow_uniformity,dynamic_degree", cache=False)
    for row in scores.rows:
        assert row["value"] is None and row["n"] == 0 and row["unknown"] == 1 and "1 frame" in row["reason"]
    assert np.isnan(scores.values("temporal_stability")).all() and scores.worst("temporal_stability") == []


def test_nothing_readable_is_a_table_too(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    scores = vidgen.score(tmp_path, metrics="temporal_stability")
    assert scores.clips == [] and len(scores.broken) == 1 and "no clip" in scores["temporal_stability"]["reason"]
    scores.save(tmp_path / "out")


@pytest.mark.parametrize(("given", "error", "says"), [
    (lambda p: p / "nowhere", FileNotFoundError, "nowhere"), (lambda p: p, ValueError, "holds no clip"), (lambda p: [], ValueError, "no clip"),
    (lambda p: [3], TypeError, "int"), (lambda p: np.zeros((4, 64, 64, 3)), TypeError, "float64"), (lambda p: [None], TypeError, "NoneType"),
])
def test_what_can_not_be_meant_is_refused(tmp_path, given, error, says):
    with pytest.raises(error, match=says):
        vidgen.score(given(tmp_path))


def test_a_missing_file_among_others_is_broken_not_fatal(folder):
    scores = vidgen.score([folder / "0.mp4", folder / "none.mp4", render(scene(9))], metrics="dynamic_degree")
    assert len(scores.clips) == 2 and "none.mp4" in scores.broken[0]["reason"]


def test_mixed_sizes_rates_and_copies_are_said(tmp_path):
    clips = [render(scene(1)), render(scene(1)), render(scene(2), width=192, height=128, fps=24), render(scene(3), num_frames=9)]
    notes = " | ".join(vidgen.score(clips, metrics="dynamic_degree", cache=False).notes)
    assert "2 sizes: 96x64 (3), 192x128 (1)" in notes and "2 frame rates: 8 fps (3), 24 fps (1)" in notes and "17 frames (3)" in notes and "1 of 4 clips are copies" in notes


def test_prompts_come_from_the_clip_a_file_beside_it_a_list_or_a_dictionary(folder, tmp_path):
    (folder / "0.txt").write_text("a text beside it\n")
    prompts = lambda **more: [c["prompt"] for c in vidgen.score(folder, metrics="dynamic_degree", **more).clips]
    own = prompts()
    assert own[0] == "a text beside it" and own[1] == caption(scene(1))
    assert prompts(prompts={"0.mp4": "zero", "3": "three"})[:4:3] == ["zero", "three"]
    (tmp_path / "p.json").write_text(json.dumps({"1": "one"}))
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(7)))
    assert prompts(prompts=tmp_path / "p.json")[1] == "one" and prompts(prompts=str(tmp_path / "p.txt"))[0] == "prompt 0"
    (tmp_path / "p.txt").write_text((tmp_path / "p.txt").read_text().rstrip() + "\n\n\n")
    assert prompts(prompts=tmp_path / "p.txt")[0] == "prompt 0"  # empty lines at the end are no prompts
    for wrong, says in (({"9": "x"}, "unknown clip"), (["a"], "1 prompts for 7 clips"), ({"0": " "}, "says something"), ({"0": 3}, "says something")):
        with pytest.raises(ValueError, match=says):
            prompts(prompts=wrong)


def test_a_file_that_holds_no_prompts_is_named_and_never_read_as_lines(tmp_path):
    clips = [render(scene(i)) for i in range(2)]
    (tmp_path / "two.yaml").write_text("prompts:\n- a star\n")  # as many lines as clips
    (tmp_path / "bad.json").write_text('{"0": "a star",}')
    for name, says in (("two.yaml", "suite"), ("bad.json", "bad.json is no JSON")):
        with pytest.raises(ValueError, match=says):
            visits.gather(clips, tmp_path / name)


def test_a_text_of_other_bytes_beside_a_clip_is_named(folder):
    (folder / "0.txt").write_bytes("ein gr\u00fcner Kreis".encode("latin-1"))
    with pytest.raises(ValueError, match="0.txt is no text in UTF-8"):
        visits.gather(folder)


def test_stability_is_judged_shot_by_shot():
    shots = [render(scene(i, motion=m, background=b)) for i, m, b in ((1, "right", "white"), (2, "up", "black"))]
    film = Clip(np.concatenate([c.frames for c in shots]), fps=8)
    whole, *parts = (vidgen.score(c, metrics="temporal_stability", cache=False) for c in (film, *shots))
    assert whole.detail(0, "temporal_stability")["cuts"] == [17]
    assert whole.rows[0]["value"] == pytest.approx(np.mean([p.rows[0]["value"] for p in parts]), abs=1e-3)


def test_manifests_clips_and_single_things():
    scores = vidgen.score(world(3, seed=5), metrics="dynamic_degree", cache=False)
    assert len(scores.clips) == 3 and scores.clips[0]["prompt"] == world(3, seed=5)[0].caption
    for single in (render(scene(1)), render(scene(1)).frames):
        assert len(vidgen.score(single, metrics="dynamic_degree", cache=False).clips) == 1


# what is measured

def test_needs_that_are_not_met_are_rows_with_a_reason():
    clips = [Clip(render(scene(i)).frames) for i in range(2)]
    word = Metric("word", counted, "", needs=("prompt",))
    shapes = Metric("shapes", counted, "", needs=("prompt", "world"))
    far = Metric("far", lambda x, y: Value(0.0), "", kind="set", needs=("reference",), backbone="none")
    scores = vidgen.score(clips, metrics=[word, shapes, far, "dynamic_degree"], cache=False)
    assert "no prompt" in scores["word"]["reason"] and "no prompt" in scores["shapes"]["reason"] and "reference" in scores["far"]["reason"]
    assert scores["dynamic_degree"]["n"] == 2 and CALLS == []
    some = vidgen.score(clips, metrics=[word, shapes], prompts=["a red car moving left", "a red star moving left"], cache=False)
    assert some["word"]["n"] == 2 and some["shapes"]["n"] == 1 and "not a prompt of the world" in some["shapes"]["reason"]


def test_a_metric_that_breaks_breaks_alone():
    bad = Metric("bad", lambda footage: 1 / 0, "")
    scores = vidgen.score([render(scene(1)), render(scene(2))], metrics=[bad, measure()])
    assert "failed: ZeroDivisionError" in scores["bad"]["reason"] and scores["bad"]["unknown"] == 2 and scores["brightness"]["n"] == 2


def test_choose():
    names = lambda words: [m.name for m in page.choose(words)]
    assert names("all") == list(page.registry()) and "flow_uniformity" not in names("all,-slow") and names("-slow") == names("all,-slow")
    assert names("dynamic_degree, temporal_stability,dynamic_degree") == ["dynamic_degree", "temporal_stability"] and names(measure()) == ["brightness"]
    assert names("slow") == ["flow_uniformity"]
    for wrong, says in (("temporal_stabilty", "temporal_stability"), ("all,-all", "no metric is left"), ("", "no metric"), ("-nonsense", "nonsense")):
        with pytest.raises(ValueError, match=says):
            names(wrong)


def test_a_name_belongs_to_one_metric(monkeypatch):
    monkeypatch.setattr(page, "pages", lambda: [types.SimpleNamespace(METRICS=(measure(), measure()), __name__="here")])
    with pytest.raises(ValueError, match="brightness"):
        page.registry()


def test_every_metric_says_what_it_is():
    for name, metric in page.registry().items():
        assert metric.name == name and metric.summary and metric.version and "," not in name and not name.startswith("-")


# sets

@pytest.fixture
def backbone(monkeypatch):
    "Features without a network: (3,) for each clip, or (T, 3) for `frames`."
    def features(footages, name, cache=True, device="auto"):
        CALLS.append(name)
        if name == "broken":
            raise RuntimeError("no weights")
        frames = np.stack([footages[0].frames.mean((1, 2))])
        return frames if name == "frames" else frames.mean(1)

    fake = types.SimpleNamespace(VERSION="1", load=lambda name: types.SimpleNamespace(hash=f"hash of {name}"), features=features)
    monkeypatch.setitem(sys.modules, "vidgen.evaluate.backbones", fake)
    monkeypatch.setattr("vidgen.evaluate.backbones", fake, raising=False)
    return fake


def gap(x, y):
    return Value(float(np.abs(x.mean(0) - y.mean(0)).mean()), "few clips", {"low": 0.1, "high": float("inf"), "shape": list(x.shape)})


def test_sets_come_from_features_alone_and_are_remembered(backbone, tmp_path):
    clips, other = [render(scene(i)) for i in range(3)], [render(scene(i)) for i in range(5, 9)]
    metrics = [Metric("gap", gap, "", kind="set", needs=("reference",), backbone="means"), Metric("gap frames", gap, "", kind="set", needs=("reference",), backbone="frames")]
    first = vidgen.score(clips, reference=other, metrics=metrics)
    assert first["gap"]["value"] == pytest.approx(np.abs(np.mean([c.frames.mean((0, 1, 2)) for c in clips], 0) - np.mean([c.frames.mean((0, 1, 2)) for c in other], 0)).mean(), rel=1e-4)
    assert first["gap"]["low"] == 0.1 and first["gap"]["high"] is None and first["gap"]["reason"] == "few clips" and first["gap"]["n"] == 3
    assert first["gap frames"]["detail"]["shape"] == [3, 17, 3] and len(CALLS) == 14 and first.about["reference"]["n"] == 4
    assert vidgen.score(clips, reference=other, metrics=metrics).rows == first.rows and len(CALLS) == 14
    with pytest.raises(ValueError, match="set"):
        first.values("gap")


def test_a_reference_that_is_too_small_broken_or_empty(backbone, tmp_path):
    clips, metric = [render(scene(i)) for i in range(3)], Metric("gap", gap, "", kind="set", needs=("reference",), backbone="means")
    one = vidgen.score(clips, reference=render(scene(9)), metrics=[metric])
    assert one["gap"]["value"] is None and "the reference" in one["gap"]["reason"] and "takes two" in one["gap"]["reason"]
    assert "the clips" in vidgen.score(clips[0], reference=clips, metrics=[metric])["gap"]["reason"]
    with pytest.raises(ValueError, match="holds no clip"):
        vidgen.score(clips, reference=tmp_path, metrics=[metric])
    (tmp_path / "a.mp4").write_bytes(b"x")
    bad = vidgen.score(clips, reference=tmp_path, metrics=[metric])
    assert bad.broken[0]["name"] == "reference: a.mp4" and bad["gap"]["value"] is None
    lost = vidgen.score(clips, reference=clips[:2], metrics=[Metric("gap", gap, "", kind="set", needs=("reference",), backbone="broken")])
    assert lost["gap"]["value"] is None and "no weights" in lost["gap"]["reason"]
    assert any("in the reference too" in note for note in vidgen.score(clips, reference=clips[:2], metrics=[metric]).notes)


def test_frames_of_clips_of_several_lengths(backbone):
    metric = Metric("gap", gap, "", kind="set", needs=("reference",), backbone="frames")
    scores = vidgen.score([render(scene(1)), render(scene(2), num_frames=9)], reference=[render(scene(3)), render(scene(4), num_frames=5)], metrics=[metric])
    assert scores["gap"]["detail"]["shape"] == [2, 5, 3] and "5 frames of each clip" in scores["gap"]["reason"]


# what is remembered

def test_the_second_time_nothing_is_opened(folder, monkeypatch):
    first = vidgen.score(folder, metrics=[measure(), "temporal_stability"])
    assert len(CALLS) == 6
    monkeypatch.setattr(Clip, "open", classmethod(lambda cls, path: 1 / 0 if path.name != "broken.mp4" else (_ for _ in ()).throw(ValueError("damaged"))))
    again = vidgen.score(folder, metrics=[measure(), "temporal_stability"])
    assert again.rows == first.rows and again.clips == first.clips and again.details == first.details and len(CALLS) == 6


def test_values_are_forgotten_when_the_version_the_content_or_the_prompt_changes(folder):
    score = lambda metric, **more: vidgen.score(folder, metrics=[metric], **more)
    score(measure())
    score(measure(version="2"))
    assert len(CALLS) == 12
    (folder / "0.mp4").rename(folder / "renamed.mp4")
    score(measure())
    assert len(CALLS) == 12, "a name is not a content"
    render(scene(50)).save(folder / "1.mp4", overwrite=True)
    changed = score(measure())
    assert len(CALLS) == 13 and [c["values"]["brightness"] for c in changed.clips if c["name"] == "1.mp4"] == [pytest.approx(render(scene(50)).frames.mean() / 255, abs=0.01)]
    wordy = measure("wordy", needs=("prompt",))
    score(wordy), score(wordy)
    assert len(CALLS) == 19
    score(wordy, prompts={"2.mp4": "another prompt"})
    assert len(CALLS) == 20 and CALLS[-1] == "another prompt"


def test_rate_counts_for_clips_in_memory():
    clip = render(scene(1))
    vidgen.score([clip, Clip(clip.frames, fps=24), Clip(clip.frames.copy())], metrics=[measure()])
    assert len(CALLS) == 2


def test_what_was_written_in_a_notebook_is_never_remembered():
    mine = Metric("mine", lambda footage: Value(1.0), "")
    vidgen.score(render(scene(1)), metrics=[mine])
    assert vidgen.score(render(scene(1)), metrics=[Metric("mine", lambda footage: Value(2.0), "")])["mine"]["value"] == 2.0


def test_the_weights_are_part_of_the_key(backbone):
    about = dict(backbone="net", needs=("prompt",))
    first = visits.value_key(measure(**about), "a star")
    backbone.load = lambda name: types.SimpleNamespace(hash="other")
    assert visits.value_key(measure(**about), "a star") != first != visits.value_key(measure(**about), "two stars")


def test_no_cache_leaves_nothing_and_a_folder_of_ones_own_is_used(tmp_path, monkeypatch):
    vidgen.score(render(scene(1)), metrics=[measure()], cache=False)
    assert not (tmp_path / "cache").exists()
    vidgen.score(render(scene(1)), metrics=[measure()], cache=tmp_path / "mine")
    assert len(list((tmp_path / "mine").rglob("*.json"))) == 1


def test_a_damaged_cache_is_no_cache(tmp_path):
    first = vidgen.score(render(scene(1)), metrics=[measure()], cache=tmp_path / "c")
    file, = (tmp_path / "c").rglob("*.json")
    for rubbish in ("", "{", "[]", '{"values": 3, "facts": {}}', '{"facts": {}}'):
        file.write_text(rubbish)
        assert vidgen.score(render(scene(1)), metrics=[measure()], cache=tmp_path / "c").rows == first.rows


def test_a_cache_that_can_not_be_written_is_warned_of(tmp_path):
    (tmp_path / "c").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="not remembered"):
        assert vidgen.score(render(scene(1)), metrics=[measure()], cache=tmp_path / "c")["brightness"]["n"] == 1


def test_two_runs_keep_what_both_found(tmp_path):
    plan = visits.Plan((), cache=tmp_path)
    plan.write("ab", {"facts": {}, "values": {"x": 1}})
    plan.write("ab", {"facts": {}, "values": {"y": 2}})
    assert plan.read("ab")["values"] == {"x": 1, "y": 2}


SLOW = """
import sys, time, types
from vidgen.evaluate.metric import Metric, Value
import vidgen
def slow(footage):
    with open(sys.argv[2], "a") as f: f.write(f"{footage.prompt}\\n")
    time.sleep(0.25)
    return Value(1.0)
slow.__module__ = "vidgen.test"
scores = vidgen.score(sys.argv[1], metrics=[Metric("slow thing", slow, "")])
print(scores["slow thing"]["n"], len(scores.broken))
"""


def test_killed_and_started_again_it_goes_on(folder, tmp_path):
    log, command = tmp_path / "log", [sys.executable, "-c", SLOW, str(folder), str(tmp_path / "log")]
    process = subprocess.Popen(command, env={**os.environ})
    until = time.monotonic() + 120
    while (not log.exists() or len(log.read_text().splitlines()) < 3) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = len(log.read_text().splitlines())
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.stdout.split() == ["6", "1"], done.stderr
    assert 3 <= before < 6 and len(log.read_text().splitlines()) in (6, 7), "only the clip that was being measured is measured again"
    for file in (tmp_path / "cache").rglob("*.json"):
        if not file.name.startswith("."):
            json.loads(file.read_text())  # a torn file never has the real name


def test_cancel_stops_between_clips_and_keeps_what_is_done():
    cancel, clips = Cancel(), [render(scene(i)) for i in range(4)]
    def stop(event):
        if event.done == 2:
            cancel.cancel("enough")
    with pytest.raises(Canceled):
        vidgen.score(clips, metrics=[measure()], progress=stop, cancel=cancel)
    assert len(CALLS) == 2
    vidgen.score(clips, metrics=[measure()])
    assert len(CALLS) == 4


def test_progress_counts_every_clip(folder):
    seen = []
    vidgen.score(folder, metrics=[measure()], progress=seen.append)
    assert [(e.stage, e.done, e.total) for e in seen] == [("clips", i, 7) for i in range(1, 8)] and "1 broken" in seen[-1].note


def test_processes_find_the_same(folder):
    alone = vidgen.score(folder, metrics="dynamic_degree", cache=False)
    assert vidgen.score(folder, metrics="dynamic_degree", cache=False, workers=2).rows == alone.rows
    with pytest.raises(ValueError, match="module"):
        vidgen.score(folder, metrics=[Metric("mine", lambda footage: Value(1.0), "")], workers=2)


# how sure

def test_intervals():
    assert interval([1.0] * 20).low < 0.9 and interval([0.0] * 20).high > 0.1 and interval([1.0] * 20).high == 1
    one = interval([0.4])
    assert one.value == 0.4 and not np.isfinite(one.low)
    rng = np.random.default_rng(0)
    values = rng.normal(3, 1, 400)
    found = interval(values)
    assert found.low < values.mean() < found.high and found.width == pytest.approx(2 * 1.96 / 20, rel=0.15)
    labels = np.repeat(np.arange(40), 10)
    shared = values + 3 * rng.normal(size=40)[labels]
    assert interval(shared, clusters_N=labels).width > 2 * interval(shared).width and interval(shared, clusters_N=labels).n == 40
    assert interval([1.0] * 20, clusters_N=list("ab") * 10).n == 2 and interval([1.0] * 20, clusters_N=list("ab") * 10).low < interval([1.0] * 20).low

    agreeing = np.repeat([1.0, 1.0, 1.0, 0.0], 10)
    assert interval(agreeing, clusters_N=np.repeat(list("abcd"), 10)).width > interval([1.0, 1.0, 1.0, 0.0]).width > 2 * interval(agreeing).width   # in tens which agree
    assert interval(agreeing, clusters_N=list(range(20)) * 2).width == pytest.approx(interval(agreeing).width, rel=0.25)


def test_an_interval_of_shares_keeps_its_word_where_prompts_differ():
    rng, held = np.random.default_rng(1), []
    for _ in range(400):
        chance = rng.beta(2, 2, 15)
        found = interval((rng.random((15, 6)) < chance[:, None]).ravel().astype(float), clusters_N=list(np.repeat(range(15), 6)))
        held.append(found.low <= 0.5 <= found.high)
    assert 0.92 <= np.mean(held) <= 0.99


def test_clips_of_one_prompt_are_drawn_together():
    clips = [render(scene(i)) for i in range(4) for _ in range(2)]
    asked = [f"prompt {i // 2}" for i in range(8)]
    together, apart = (vidgen.score(clips, prompts=p, metrics=["dynamic_degree"], cache=False) for p in (asked, [f"{a} {i}" for i, a in enumerate(asked)]))
    assert together["dynamic_degree"]["value"] == apart["dynamic_degree"]["value"] and together["dynamic_degree"]["n"] == 8
    assert any("8 clips of 4 prompts" in note for note in together.notes) and not any("prompts" in note for note in apart.notes)


def test_caveats_are_kept_beside_known_values():
    careful = Metric("careful", lambda footage: Value(0.5, "only half was read"), "")
    scores = vidgen.score([render(scene(1)), render(scene(2))], metrics=[careful], cache=False)
    assert scores["careful"]["value"] == 0.5 and "only half was read (2)" in scores["careful"]["reason"]
    assert any("clip-0000: only half was read; clip-0001" in note for note in scores.notes)


# what comes out

def test_saved_and_read_again(folder, tmp_path):
    scores = vidgen.score(folder, metrics="temporal_stability,dynamic_degree,oracle", suite="world")
    out = scores.save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"scores.json", "scores.csv", "clips.csv", "details.jsonl", "report.html", "histograms.png"}
    again = Scores.read(out)
    assert again.to_dict() == json.loads(json.dumps(scores.to_dict())) and again.detail("0.mp4", "temporal_stability") == scores.detail(0, "temporal_stability")
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert [r["metric"] for r in rows] == [r["metric"] for r in scores.rows] and float(rows[0]["value"]) == scores.rows[0]["value"]
    clips = list(csv.DictReader((out / "clips.csv").open()))
    assert len(clips) == 6 and clips[5]["temporal_stability"] == ""
    page_text = (out / "report.html").read_text()
    assert "http" not in page_text.replace("http://www.w3.org", "") and "data:image/png;base64" in page_text and "broken.mp4" in page_text
    json.loads((out / "scores.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))


def test_text_in_prompts_and_names_can_not_break_the_page(tmp_path):
    clip = render(scene(1))
    scores = vidgen.score([clip, clip], prompts=["<script>alert(1)</script>", "b"], metrics=[Metric("<b>", lambda f: Value(None, "<i>why</i>"), "")], cache=False)
    text = (scores.save(tmp_path / "out") / "report.html").read_text()
    assert "<script>" not in text and "<b>" not in text.replace("<body>", "") and "<i>" not in text


def test_no_plots_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = vidgen.score([render(scene(1)), render(scene(2))], metrics="dynamic_degree", cache=False).save(tmp_path / "out")
    assert not (out / "histograms.png").exists() and "No histograms" in (out / "report.html").read_text() and "vidgen[lab]" in (out / "report.html").read_text()


def test_questions():
    rows = [dict(metric="up", value=0.5, low=0.4, high=0.6, n=3, unknown=1, unit="", direction="higher", version="1", reason="", kind="clip"),
            dict(metric="down", value=0.5, low=0.4, high=0.6, n=3, unknown=1, unit="", direction="lower", version="1", reason="", kind="clip")]
    clips = [dict(name=n, prompt=n, labels={"kind": k}, values={"up": v, "down": v}, reasons={}) for n, k, v in (("a", "x", 0.9), ("b", "x", 0.1), ("c", "y", 0.5), ("d", "y", None))]
    scores = Scores(rows, clips)
    assert [n for _, n in scores.worst("up", 9)] == ["b", "c", "a"] and [n for _, n in scores.worst("down", 9)] == ["a", "c", "b"]
    by = {(r["kind"], r["metric"]): r for r in scores.by("kind")}
    assert by["x", "up"]["value"] == 0.5 and by["y", "up"]["n"] == 1 and by["y", "up"]["unknown"] == 1 and by["y", "up"]["low"] is None
    for call, says in ((lambda: scores["upp"], "up"), (lambda: scores.by("knd"), "kind"), (lambda: scores.detail("e", "up"), "clip")):
        with pytest.raises(ValueError, match=says):
            call()
    assert scores.detail(0, "up") == {} and histograms(Scores([])) is None


def test_numbers_go_into_a_run(tmp_path):
    scores = vidgen.score([render(scene(1)), render(scene(2))], metrics="dynamic_degree,oracle", cache=False)
    with Run.create("x", {}, root=tmp_path) as run:
        scores.log(run)
    assert run.metrics()[0]["dynamic_degree"] == scores["dynamic_degree"]["value"] and "dynamic_degree" in (run.path / "metrics.csv").read_text()


def test_plain():
    assert report.plain({1: np.float32(0.5), "a": (np.nan, np.array([1, 2])), "p": Path("x"), "ok": True}) == {"1": 0.5, "a": [None, [1, 2]], "p": "x", "ok": True}


# commands

def run(*args):
    from vidgen.cli import main

    return main(list(args))


def test_evaluate_writes_a_report_and_a_run(folder, tmp_path, capsys):
    assert run("evaluate", str(folder), "--metrics", "temporal_stability,oracle", "--suite", "world", "--out", str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "temporal_stability" in said and "report.html" in said and (tmp_path / "out" / "scores.csv").exists()
    record, = find("evaluate")
    assert record.status == "succeeded" and record.manifest["result"]["broken"] == 1 and record.metrics()


@pytest.mark.parametrize(("args", "says"), [
    (["nowhere"], "nowhere"), (["{}", "--metrics", "stabilty"], "temporal_stability"), (["{}", "--suite", "wrld"], "world"), (["{}", "--device", "gpu"], "cuda"),
    (["{}", "--reference", "nowhere"], "nowhere"), (["{}", "--prompts", "nowhere.txt"], "nowhere"),
])
def test_a_wrong_request_is_refused_before_anything_is_opened(folder, tmp_path, capsys, args, says):
    assert run("evaluate", *[a.format(folder) for a in args]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_shell_hears_that_nothing_could_be_read(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    assert run("evaluate", str(tmp_path / "bad.mp4"), "--metrics", "dynamic_degree", "--no-run") == 1


def test_evaluate_prints_json_and_keeps_no_run(folder, tmp_path, capsys):
    assert run("evaluate", str(folder), "--metrics", "dynamic_degree", "--no-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["metric"] == "dynamic_degree" and not (tmp_path / "runs").exists()


def test_metrics_are_listed(capsys):
    assert run("metrics") == 0 and "temporal_stability" in capsys.readouterr().out
    assert run("metrics", "--json") == 0
    assert {m["name"] for m in json.loads(capsys.readouterr().out)} == set(page.registry())


def test_the_same_frames_may_have_another_prompt(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), dtype=np.uint8)
    for prompt, seed in (("a red circle", 1), ("a blue square", 2), (None, None)):
        clip = Clip(frames, made={"prompt": prompt, "seed": seed} if prompt else {})
        found = page.score(clip, metrics=[measure(needs=("prompt",))], cache=tmp_path).clips[0]
        assert (found["prompt"], found["seed"]) == (prompt, seed)


def test_a_prompt_for_a_name_that_two_clips_have(tmp_path):
    items = [visits.Item("a/x.mp4", None), visits.Item("b/x.mp4", None), visits.Item("x.mp4", None), visits.Item("y.mp4", None)]
    found = visits.gather(items, {"b/x.mp4": "in b", "x.mp4": "on top", "y": "another"})
    assert [i.prompt for i in found] == [None, "in b", "on top", "another"]
    for given in ({"x.mp4": "which?"}, {"x": "which?"}):
        with pytest.raises(ValueError, match="name each clip with its folder"):
            visits.gather(items[:2], given)


def test_a_prompt_file_written_on_windows(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\na blue square\r\n")
    assert [i.prompt for i in visits.gather([visits.Item("a", None), visits.Item("b", None)], tmp_path / "p.txt")] == ["a red circle", "a blue square"]


def test_seeds_of_one_prompt_are_no_findings_of_a_label_either():
    rng = np.random.default_rng(0)
    level = {(g, p): rng.normal(0.5, 0.2) for g in "ab" for p in range(8)}
    clips = [{"name": f"{g}{p}-{s}", "prompt": f"{g}{p}", "labels": {"group": g}, "values": {"x": v + rng.normal(0, 0.001)}} for (g, p), v in level.items() for s in range(10)]
    row = {"metric": "x", "value": 0.5, "kind": "clip", "direction": "higher"}
    found, = [r for r in Scores([row], clips).by("group") if r["group"] == "a"]
    alone = Scores([row], [c | {"prompt": None} for c in clips]).by("group")[0]
    assert found["n"] == 80 and found["unknown"] == 0 and found["high"] - found["low"] > 2 * (alone["high"] - alone["low"])


def test_files_that_a_spreadsheet_or_a_strange_name_can_not_break(tmp_path):
    names, prompts = ["=1+1.mp4", "a\u2028b\x85.mp4", "c.mp4"], ['=HYPERLINK("http://x")', "@SUM(A1)", "-a, \"b\""]
    clips = [{"name": n, "prompt": p, "values": {"x": -1.5}, "reasons": {}} for n, p in zip(names, prompts)]
    row = {"metric": "x", "value": -1.5, "low": None, "high": None, "n": 3, "unknown": 0, "unit": "", "direction": "higher", "version": "1", "kind": "clip", "reason": ""}
    Scores([row], clips, details=[report.pack({"x": {"at": i}}) for i in range(3)]).save(tmp_path)
    rows = list(csv.DictReader((tmp_path / "clips.csv").open(newline="")))
    assert [r["prompt"] for r in rows] == ["'" + p for p in prompts] and rows[0]["name"] == "'=1+1.mp4" and rows[0]["x"] == "-1.5"
    back = Scores.read(tmp_path)
    assert [c["prompt"] for c in back.clips] == prompts and [back.detail(i, "x")["at"] for i in range(3)] == [0, 1, 2]
