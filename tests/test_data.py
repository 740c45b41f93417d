"""Manifests: what goes in comes out, and nothing is dropped in silence."""
import json

import numpy as np
import pytest

from vidgen.clip import Clip
from vidgen.data.manifest import Manifest, Sample, read_manifest, split
from vidgen.data.sources import folder, world


def test_round_trip(tmp_path):
    data = world(50, part="held")
    again = read_manifest(data.save(tmp_path / "held.jsonl"))
    assert again.samples == data.samples and again.hash == data.hash
    assert again[3].clip().hash == data[3].clip().hash


@pytest.mark.parametrize("text, word", [('{"caption": "no media"}', "media"), ("{", "line 2"), ('{"media": "a", "capton": "b"}', "caption")])
def test_wrong_lines_are_named(tmp_path, text, word):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"media": "a.mp4"}) + "\n" + text + "\n")
    with pytest.raises(ValueError, match=word) as err:
        read_manifest(path)
    assert "line 2" in str(err.value)


def test_clips_in_memory(tmp_path):
    clip = Clip(np.zeros((2, 4, 4, 3), np.uint8))
    data = Manifest((Sample(clip),))
    assert data[0].clip() is clip
    with pytest.raises(ValueError, match="in memory"):
        data.save(tmp_path / "m.jsonl")
    assert not (tmp_path / "m.jsonl").exists()


def test_split_keeps_sides():
    data = world(400)
    train, test = split(data, 0.2)
    assert len(train) + len(test) == 400 and 40 < len(test) < 130
    assert {s.media for s in split(data[:100], 0.2)[1]} <= {s.media for s in test}
    with pytest.raises(ValueError, match="share"):
        split(data, 1.0)


def test_unknown_scheme_and_address():
    with pytest.raises(ValueError, match="world"):
        Sample("wrld:3").clip()
    with pytest.raises(ValueError, match="SEED"):
        Sample("world:three").clip()


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="mp4"):
        folder(tmp_path)


def test_hash_follows_the_bytes_not_the_place(tmp_path):
    world(1)[0].clip().save(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    one, two = (Manifest((Sample(str(tmp_path / name), "same words"),)) for name in ("a.mp4", "b.mp4"))
    assert one.hash == two.hash
    world(1, seed=5)[0].clip().save(tmp_path / "b.mp4", overwrite=True)
    assert one.hash != two.hash
