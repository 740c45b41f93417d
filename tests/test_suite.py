"""Prompt suites: what a file may hold, how clips find their labels; and the oracle as a metric."""
import re

import pytest
import yaml

import vidgen
from vidgen.evaluate import suite as page
from vidgen.evaluate.metric import Footage
from vidgen.evaluate.suite import Suite, accuracy, all_right, check, load, names, of_world, right, vocabulary
from vidgen.world import caption, render, scene
from vidgen.world.oracle import wilson
from vidgen.world.scenes import ATTRIBUTES, PHRASINGS, held_out, parse, prompts

GOOD = {"name": "x", "version": 1, "summary": "y", "prompts": [{"prompt": "a star", "kind": "short"}]}


@pytest.mark.parametrize("name", names())
def test_every_suite_that_ships_is_right(name):
    found = load(name)
    assert found.name == name and found.version >= 1 and found.summary and 5 <= len(found) <= 100 and len(set(found)) == len(found)
    labels = [set(p.labels) for p in found.prompts]
    assert all(label == labels[0] and label for label in labels), "every prompt has the same labels"


def test_those_asked_for_are_there():
    assert {"world", "press", "brand", "short", "long", "edge-cases", "fairness"} <= set(names())


def test_the_world_suite_covers_the_world():
    found = load("world")
    for name, words in ATTRIBUTES.items():
        for held in (True, False):
            assert {parse(p.text)[name] for p in found.prompts if p.labels["held_out"] == held} == set(words), (name, held)
    assert all(of_world(text) for text in found) and all(held_out(**parse(p.text)) == p.labels["held_out"] for p in found.prompts)
    assert sum(p.labels["held_out"] for p in found.prompts) == len(found) / 2 and all(of_world(text) for text in load("fairness-world"))


def test_long_is_long_and_short_is_short():
    assert all(70 <= len(text.split()) <= 150 for text in load("long")) and all(p.labels["last"] in p.text for p in load("long").prompts)
    assert all(len(text.split()) == p.labels["words"] <= 3 for p in load("short").prompts for text in [p.text])


def test_fairness_is_every_template_with_every_group():
    for name in ("fairness", "fairness-world"):
        found = load(name)
        templates, groups = ({p.labels[k] for p in found.prompts} for k in ("template", "group"))
        assert len(found) == len(templates) * len(groups) and all("{" not in text for text in found)


@pytest.mark.parametrize(("change", "says"), [
    ({"promts": []}, "prompts"), ({"version": "1"}, "whole number"), ({"version": True}, "whole number"), ({"version": 0}, "whole number"), ({"name": ""}, "words"),
    ({"summary": None}, "words"), ({"prompts": []}, "no prompt"), ({"prompts": ["a star"]}, "- prompt: words"), ({"prompts": [{"prompt": " "}]}, "prompt 1"),
    ({"prompts": [{"prompt": "a", "k": [1]}]}, "label"), ({"prompts": [{"prompt": "a"}, {"prompt": "a"}]}, "twice"), ({"templates": ["{group}"]}, "need each other"),
    ({"templates": ["x"], "groups": ["a", "b"]}, "once"), ({"templates": ["{group} {group}"], "groups": ["a"]}, "once"), ({"templates": {"a": "{group}"}, "groups": ["a"]}, "list"),
    ({"templates": ["{group}"], "groups": {"a": 3}}, "words"),
])
def test_a_wrong_file_is_refused_with_its_name(change, says):
    with pytest.raises(ValueError, match=says) as err:
        check(GOOD | change, "file.yaml")
    assert str(err.value).startswith("file.yaml")


def test_what_is_no_suite(tmp_path):
    with pytest.raises(ValueError, match="list"):
        check([], "f")
    with pytest.raises(ValueError, match="world"):
        load("wrold")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("name: [")
    with pytest.raises(ValueError, match="YAML"):
        load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(GOOD))
    assert load(tmp_path / "b.yaml") == load(load(tmp_path / "b.yaml")) == check(GOOD, "")


def test_the_files_travel_with_the_package():
    import tomllib
    from pathlib import Path

    data = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["vidgen"]
    assert "**/*.yaml" in data and page.FOLDER.is_dir() and page.FOLDER.parent.name == "vidgen"


# labels

def test_clips_find_their_labels_and_what_is_missing_is_said():
    asked = check(GOOD | {"prompts": [{"prompt": caption(scene(i)), "kind": f"k{i % 2}"} for i in range(4)]}, "f")
    scores = vidgen.score([render(scene(i)) for i in (0, 1, 2, 9)], metrics="oracle", suite=asked, cache=False)
    assert [c["labels"] for c in scores.clips] == [{"kind": "k0"}, {"kind": "k1"}, {"kind": "k0"}, {}]
    assert any(caption(scene(3)) in note and "1 of 4 prompts" in note for note in scores.notes) and any("1 of 4 clips" in note for note in scores.notes)
    assert [(r["kind"], r["n"]) for r in scores.by("kind")] == [("k0", 2), ("k1", 1)] and scores.about["suite"] == "x/1"


# the world

def test_the_vocabulary_is_that_of_the_tokenizer():
    from vidgen.world.shapes import WORDS

    assert set(WORDS) <= vocabulary() and all(of_world(p) for held in (True, False) for p in prompts(50, held=held))
    assert {w for i in range(30) for j in range(len(PHRASINGS)) for w in re.findall(r"\w+", caption(scene(i), j))} <= vocabulary()


@pytest.mark.parametrize("prompt", ["a red car moving left", "ein roter Kreis", "a red circle, please", "background", "", "   ", None, "🔴"])
def test_other_prompts_are_not_of_the_world(prompt):
    assert not of_world(prompt)


def test_only_the_worlds_prompts_of_the_edge_cases_are_marked():
    strange = [p for p in load("edge-cases").prompts if of_world(p.text)]
    assert {p.labels["case"] for p in strange} <= {"contradiction", "writing", "repetition"}  # red;circle is the world's, whatever the commas


# the oracle

def test_right_and_wrong_by_attribute():
    s = scene(21)
    clip = render(s)
    for name in ATTRIBUTES:
        other = next(w for w in ATTRIBUTES[name] if w != getattr(s, name))
        if name == "motion":
            asked = caption(s.__class__(**{**s.__dict__, "motion": other}))
        else:
            asked = caption(s).replace(getattr(s, name), other)
        marks = {a: right(a, Footage(clip, asked)).value for a in ATTRIBUTES}
        assert marks == {a: float(a != name) for a in ATTRIBUTES} and all_right(Footage(clip, asked)).value == 0, name
    assert all_right(Footage(clip, caption(s))).value == 1
    only = right("colour", Footage(clip, f"a {s.shape}"))
    assert only.value is None and "no colour" in only.reason and all_right(Footage(clip, f"a {s.shape}")).value == 1


def test_a_clip_in_which_nothing_is_seen_is_wrong_not_unknown():
    import numpy as np

    footage = Footage(np.zeros((5, 64, 96, 3), np.uint8), "a red star")
    assert all_right(footage).value == 0 and right("shape", footage).detail["read"] == "nothing"


def test_the_clip_is_read_once(monkeypatch):
    from vidgen.world import oracle

    calls, read = [], oracle.read
    monkeypatch.setattr(oracle, "read", lambda clip: calls.append(1) or read(clip))
    vidgen.score(render(scene(1)), metrics=list(page.METRICS), cache=False)
    assert len(calls) == 1


def test_accuracy_is_wilsons_and_agrees_with_the_oracles_own_count():
    from vidgen.world import oracle

    scenes = list({caption(s): s for s in map(scene, range(30))}.values())[:24]
    asked = [caption(scenes[(i + 1) % 24] if i % 4 == 0 else s) for i, s in enumerate(scenes)]
    asked = [f"{text}" if asked.index(text) == i else caption(scenes[i]) for i, text in enumerate(asked)]   # a prompt belongs to one clip
    clips = [render(s) for s in scenes]
    scores = vidgen.score(clips, prompts=asked, metrics="oracle,oracle_shape,oracle_colour,oracle_motion,oracle_background", cache=False)
    truth = oracle.score(clips, asked)
    for row in truth.rows:
        mine = scores["oracle" if row["attribute"] == "all" else f"oracle_{row['attribute']}"]
        assert mine["value"] == pytest.approx(row["share"]) and mine["n"] == row["asked"]
    table = {(r["combination"], r["attribute"]): r for r in scores.tables["Oracle: accuracy"]}
    for row in truth.rows:
        found = table["all", row["attribute"]]
        assert (found["right"], found["asked"]) == (row["right"], row["asked"])
        assert (found["low"], found["high"]) == pytest.approx(wilson(row["right"], row["asked"]), abs=1e-3)
    assert table["training", "all"]["asked"] + table["held out", "all"]["asked"] == 24
    for name in ATTRIBUTES:
        rows = {r["asked"]: r for r in scores.tables[f"Oracle: {name} asked, and read"]}
        for word, reads in truth.confusion[name].items():
            assert {k: v for k, v in rows[word].items() if k != "asked" and v} == reads


def test_no_oracle_no_tables():
    assert vidgen.score(render(scene(1)), metrics="dynamic_degree", cache=False).tables == {} and accuracy([]) == []


def test_a_suite_iterates_its_texts():
    assert isinstance(load("short"), Suite) and list(load("short"))[0] == "rain" and len(load("short")) == 16


def test_clips_of_one_prompt_count_together():
    asked = dict(shape="star", colour="red", motion="left", background="white")
    each = [{"prompt": f"{i % 10}", "held_out": False, "asked": asked, "read": asked | ({"shape": "circle"} if i % 10 < 3 else {})} for i in range(200)]
    alone = [row | {"prompt": None} for row in each]
    together, apart = (next(r for r in accuracy(found) if r["attribute"] == "shape") for found in (each, alone))
    assert together["share"] == apart["share"] == 0.7 and together["right"] == 140
    assert (apart["low"], apart["high"]) == pytest.approx(wilson(140, 200)) and together["high"] - together["low"] > 2.5 * (apart["high"] - apart["low"])
