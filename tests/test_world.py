"""The world keeps its promises: same bytes, inside the frame, equal areas, captions that read back, a fixed share held out."""
import numpy as np
import pytest

from vidgen.world.scenes import (ATTRIBUTES, BACKGROUNDS, PHRASINGS, SHAPES, Scene, caption, combinations, held_out, parse, prompts, render,
                                 scene)


def cover(clip, background):
    return np.abs(clip.frames.astype(int) - np.array(BACKGROUNDS[background])).sum(-1) > 12


@pytest.mark.parametrize("seed", range(0, 120, 3))
def test_nothing_leaves_the_frame(seed):
    s = scene(seed)
    mask = cover(render(s), s.background)
    assert mask.any((1, 2)).all()
    assert not (mask[:, 0].any() or mask[:, -1].any() or mask[:, :, 0].any() or mask[:, :, -1].any())


def test_same_seed_same_bytes():
    assert render(scene(5)).hash == render(scene(5)).hash
    assert len({render(scene(i)).hash for i in range(40)}) == 40


def test_equal_areas():
    areas = []
    for shape in SHAPES:
        s = Scene(shape, "red", "still", "black", radius=0.2)
        levels = render(s).frames[0, :, :, 0].astype(float)
        areas.append(((levels - 10) / 210).sum())
    assert np.ptp(areas) / np.mean(areas) < 0.02
    assert abs(np.mean(areas) - np.pi * (0.2 * 64) ** 2) / np.mean(areas) < 0.02


def test_size_does_not_change_the_scene():
    s = scene(11)
    small, large = render(s), render(s, width=192, height=128)
    shrunk = large.frames.reshape(17, 64, 2, 96, 2, 3).mean((2, 4))
    assert np.abs(shrunk - small.frames).mean() < 0.5


def test_window_is_a_part_of_the_whole():
    s = scene(12)
    assert np.array_equal(render(s, window=(3, 4, 8, 32, 16, 48)).frames, render(s).frames[3:7, 8:40, 16:64])


def test_captions_read_back():
    for seed in range(60):
        s = scene(seed)
        for phrasing in range(len(PHRASINGS)):
            assert parse(caption(s, phrasing)) == s.attributes
    assert parse("A GRAY cat")["background"] == "grey"
    assert parse("a red or blue circle") == {"shape": "circle", "colour": None, "motion": None, "background": None}


def test_held_out_share_and_coverage():
    held, trained = combinations(True), combinations(False)
    assert len(held) + len(trained) == len(combinations()) == 768
    assert 0.10 < len(held) / 768 < 0.15
    names = list(ATTRIBUTES)
    for a in names:
        for b in names[names.index(a) + 1:]:
            assert {(c[a], c[b]) for c in trained} == {(x, y) for x in ATTRIBUTES[a] for y in ATTRIBUTES[b]}, f"{a}, {b}: a pair is never trained"
    assert all(held_out(**parse(p)) for p in prompts(100, held=True)) and not any(held_out(**parse(p)) for p in prompts(100))


def test_prompts_are_balanced_by_shape():
    counts = [sum(parse(p)["shape"] == s for p in prompts(200)) for s in SHAPES]
    assert counts == [50] * 4


@pytest.mark.parametrize("field, word, near", [("shape", "circel", "circle"), ("colour", "gren", "green"), ("background", "gray", "grey"), ("motion", "rigth", "right")])
def test_wrong_words_are_answered(field, word, near):
    facts = dict(shape="circle", colour="red", motion="left", background="white") | {field: word}
    with pytest.raises(ValueError, match=near):
        Scene(**facts)
