"""Manifests: what goes in comes out, and nothing is dropped in silence."""
import json

import numpy as np
import pytest

from vidgen.clip import Clip
from vidgen.data.manifest import Manifest, Sample, film, line, read_manifest, split
from vidgen.data.sources import folder, open_manifest, world


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


def test_split_keeps_a_film_on_one_side(tmp_path):
    from vidgen.data.build import build
    from vidgen.data.lookalike import lookalike

    lookalike("msrvtt", tmp_path / "mini")
    data = open_manifest(build("msrvtt", tmp_path / "mini", tmp_path / "msr").folder)
    assert len({film(s) for s in data}) < len(data)
    for share in (0.1, 0.5):
        train, held = split(data, share)
        assert len(train) + len(held) == len(data) and held and not {film(s) for s in train} & {film(s) for s in held}
        turned = split(Manifest(data.samples[::-1]), share)
        assert [set(map(line, side)) for side in turned] == [set(map(line, train)), set(map(line, held))]


@pytest.mark.parametrize("films", [2, 3, 15])
def test_split_holds_and_keeps_a_film_of_few(films):
    for first in range(0, 60, 4):
        some = Manifest(tuple(Sample(f"world:{first + i}") for i in range(films)))
        assert all(map(len, split(some))) and all(map(len, split(some, 0.99)))
    assert [len(side) for side in split(some[:1])] == [1, 0] and [len(side) for side in split(some[:0])] == [0, 0]


def test_a_film_is_named_by_what_it_shows(tmp_path):
    clip = world(1)[0].clip()
    clip.save(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    a, b = (Sample(str(tmp_path / f"{n}.mp4"), n) for n in "ab")
    assert film(a) == film(b) == film(Sample("gone.mp4", facts={"sha256": film(a)})) and film(Sample(clip)) == film(Sample(clip, "x")) != film(a)


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
