"""Failures: each is found where it was put, with its frames; nothing is found in clean clips; the unknowable is unknown."""
import json
from functools import cache

import numpy as np
import pytest

from vidgen.evaluate import faults
from vidgen.evaluate.failures import DETECTORS, METRICS, Finding, Limits, bends, colour_paths, cut, dead_frames, edge_width, examine, flicker, freeze, judder, object_drift
from vidgen.evaluate.metric import Footage
from vidgen.world import render, scene

MOVING = ("left", "right", "up", "down", "growing")
CLEAN = ("static", "noise 2", "pan 1", "pan 3", "pan 6", "accelerating pan", "ease pan", "zoom 1 %", "zoom 3 %", "rotation", "object 3", "object 7")


@cache
def textured(name):
    return faults.textured(name)


@cache
def moving(seed):
    return render(scene([seed, 68], motion=MOVING[seed % 5]))


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_found_in_clean_textures(name):
    assert examine(textured(name)).found == ()


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_found_in_clean_scenes(seed):
    clip = moving(seed)
    assert examine(clip).found == ()
    assert examine(faults.codec(clip, psnr=32, seed=seed)).found == ()
    assert examine(render(scene(seed, motion="still"))).found == ()


# a fault, its amount, the detector that must find it, and textures in which it must be found too
CASES = [("flicker", 0.12, "flicker", "pan 3"), ("local flicker", 0.15, "flicker", "static"), ("drift", 150.0, "object_drift", "pan 1"), ("cut", 1.0, "cuts", "pan 3"), ("freeze", 0.4, "freeze", "pan 3"),
         ("judder", 2.0, "judder", "pan 3"), ("judder", 3.0, "judder", "rotation"), ("blur", 3.0, "blur", None), ("defocus", 3.0, "focus_loss", "pan 1"), ("black", 1.0, "dead_frames", "pan 3"),
         ("white", 2.0, "dead_frames", "static")]


@pytest.mark.parametrize(("kind", "amount", "name", "texture"), CASES, ids=lambda v: str(v))
def test_what_was_put_in_is_found(kind, amount, name, texture):
    detect = DETECTORS[name][0]
    clips = [moving(seed) for seed in range(5)] + ([textured(texture)] if texture else [])
    for seed, clip in enumerate(clips):
        finding = detect(Footage(faults.faulty(clip, kind, amount, seed=seed)), Limits())
        assert finding.found and finding.frames and finding.evidence, (seed, finding)
        assert finding.name == name and max(finding.frames) < len(clip.frames) and list(finding.frames) == sorted(set(finding.frames))


def test_where_it_is():
    clip = textured("pan 3")
    assert cut(Footage(faults.faulty(clip, "cut", 3.0))).frames == (4, 8, 12)
    assert dead_frames(Footage(faults.faulty(clip, "black", 2.0))).frames == (7, 8)
    frozen = freeze(Footage(faults.faulty(clip, "freeze", 0.5)))
    assert frozen.frames == tuple(range(8, 16)) and frozen.score == 7 and frozen.evidence["seconds"] == 7 / 8
    stuck = clip.frames.copy()
    stuck[5:11] = stuck[5]
    assert freeze(Footage(stuck)).frames == (5, 6, 7, 8, 9, 10) and not judder(Footage(stuck)).found
    stuck = clip.frames.copy()
    stuck[2:7], stuck[8:13] = stuck[2], stuck[8]
    assert freeze(Footage(stuck)).found and not judder(Footage(stuck)).found  # long runs are no judder, however many
    assert judder(Footage(faults.faulty(clip, "judder", 2))).frames == (1, 3, 5, 7, 9, 11, 13, 15)
    lit = clip.frames.copy()
    lit[6:12:2] = np.clip(lit[6:12:2] * 1.3, 0, 255).astype(np.uint8)
    assert {6, 7, 8, 9, 10} <= set(flicker(Footage(lit)).frames) <= set(range(5, 13))


def test_flicker_is_measured_in_grey_levels():
    still = np.repeat(textured("static").frames[:1].clip(30, 200), 9, 0)
    for depth in (3, 8, 20):
        frames = still.copy()
        frames[1::2] += depth
        assert flicker(Footage(frames)).score == pytest.approx(depth, rel=0.1)
    once = still.copy()
    once[4] += 20
    assert not flicker(Footage(once)).found and flicker(Footage(once)).frames  # a flash is shown, and isn't flicker
    frames = still.copy()
    frames[1::2, 60:110, 90:160] += 12
    assert flicker(Footage(frames)).score > 8
    assert np.abs(bends(Footage(still))).max() == 0
    noise = faults.faulty(textured("static"), "noise", 10.0)
    assert not flicker(Footage(noise)).found


def test_a_gradual_change_of_light_is_no_flicker():
    still = textured("static").frames[:1].astype(np.float32)
    ramp = (still * np.linspace(0.6, 1, 16)[:, None, None, None]).astype(np.uint8)
    assert not flicker(Footage(ramp)).found


def test_drift_is_slow_and_follows_the_thing():
    clip = moving(1)
    small, large = (object_drift(Footage(faults.faulty(clip, "drift", a))).score for a in (20.0, 120.0))
    assert object_drift(Footage(clip)).score < 2 < small < large
    assert not object_drift(Footage(faults.faulty(clip, "flicker"))).found
    lagging = Footage(clip)
    lagging.motion = [0.88 * flow for flow in lagging.motion]  # two pixels behind in the end
    assert object_drift(lagging).score < 4
    grey = np.full((9, 64, 96, 3), 128, np.uint8)
    assert object_drift(Footage(grey)).score is None and "stands out" in object_drift(Footage(grey)).reason
    assert np.isnan(colour_paths(Footage(grey))).all()
    square = np.full((9, 64, 96, 3), 20, np.uint8)
    for t in range(9):
        square[t, 20:44, 20 + 4 * t : 44 + 4 * t] = (60 + 15 * t, 120, 200)
    there = object_drift(Footage(square))
    assert there.found and there.frames[-1] == 8
    assert not object_drift(Footage(np.where(square > 50, np.uint8([90, 120, 200]), square))).found


def test_a_cut_is_no_drift_and_no_loss_of_focus():
    a, b = textured("pan 3").frames, render(scene(3, motion="right"), width=256, height=160).frames
    for after in (b, faults.faulty(faults.textured("rotation", seed=3), "blur", 3.0).frames):
        assert set(examine(np.concatenate([a, after])).found) == {"cuts"}


def test_edge_width_of_a_blurred_step():
    import cv2

    step = np.where(np.arange(240) < 120, 40.0, 200.0)[None].repeat(120, 0)
    for sigma in (0.8, 1.5, 3.0, 5.0):
        soft = cv2.GaussianBlur(step, (0, 0), sigma)
        assert edge_width(soft) == pytest.approx(sigma, rel=0.1)
        assert edge_width(soft.T) == pytest.approx(edge_width(soft), rel=0.02) and edge_width(soft * 0.4) == pytest.approx(edge_width(soft), rel=0.02)
    assert edge_width(step) < 0.6 and edge_width(np.full((50, 50), 9.0)) is None
    noisy = np.random.default_rng(0).normal(cv2.GaussianBlur(step, (0, 0), 4.0), 6)
    assert edge_width(noisy) > 2.5  # the variance of the Laplacian calls this sharp


def test_a_thing_that_stops_gently_is_not_frozen_and_a_still_is_no_failure():
    for name in ("ease pan", "static"):
        clip = textured(name)
        assert not freeze(Footage(clip)).found and not judder(Footage(clip)).found
    assert freeze(Footage(textured("static"))).evidence["static"] is True
    noisy = faults.faulty(faults.faulty(textured("pan 3"), "freeze", 0.5), "noise", 0.4)
    assert freeze(Footage(noisy)).found  # nearly frozen is frozen


def test_pixels_that_turn_by_one_level_are_no_motion():
    frames = np.repeat(render(scene(3, motion="still")).frames[:1], 17, 0).copy()
    frames[1, 0, 0, 0] ^= 1
    frames[14, 0, 0, 0] ^= 1
    assert freeze(Footage(frames)).score == 0 == judder(Footage(frames)).score


def test_black_by_the_book():
    frames = np.full((3, 100, 100, 3), 60, np.uint8)
    frames[1].reshape(-1, 3)[:9800] = 25  # 98 % under a tenth
    frames[2].reshape(-1, 3)[:9700] = 25
    frames[2].reshape(-1, 3)[9700:] = 255
    assert dead_frames(Footage(frames)).evidence["black"] == [1] and 0 in dead_frames(Footage(frames)).evidence["flat"]
    assert dead_frames(Footage(np.zeros((1, 20, 20, 3), np.uint8))).found  # one frame is enough
    for background in ("black", "white", "navy", "grey"):
        assert not dead_frames(Footage(render(scene(2, background=background)))).found


@pytest.mark.parametrize("count", [1, 2])
def test_too_short_is_not_measurable(count):
    found = examine(textured("pan 3").frames[:count])
    unknown = {f.name for f in found.findings if f.score is None}
    assert unknown == {"flicker", "object_drift", "freeze", "judder", "focus_loss"} | ({"cuts"} if count == 1 else set())
    assert found.found == () and f"{count} frame" in found["flicker"].reason and "not measurable" in repr(found)


def test_black_tiny_and_mixed():
    black = examine(np.zeros((8, 64, 96, 3), np.uint8))
    assert set(black.found) == {"dead_frames"} and black["blur"].score is None and black["dead_frames"].score == 8
    tiny = examine(np.zeros((8, 16, 24, 3), np.uint8))
    assert {f.name for f in tiny.findings if f.score is None} >= {"flicker", "object_drift", "cuts"}
    mixed = examine(faults.faulty(faults.faulty(textured("pan 3"), "black", 2.0), "judder", 2))
    assert {"dead_frames", "judder"} <= set(mixed.found)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_as_metrics(metric):
    footage = Footage(faults.faulty(moving(2), "flicker"))
    value, finding = metric(footage), DETECTORS[metric.name][0](footage, Limits())
    assert value.value == finding.score and value.detail["found"] == finding.found and value.detail["threshold"] == finding.threshold and metric.direction == "lower"
    json.dumps(value.detail)
    short = metric(Footage(np.zeros((1, 64, 96, 3), np.uint8)))
    assert (short.value is None) == (short.detail["found"] is None)


def test_limits_decide_and_nothing_else():
    clip = faults.faulty(moving(0), "drift", 120.0)
    found = object_drift(Footage(clip))
    assert not object_drift(Footage(clip), Limits(drift=found.score + 1)).found and found.score == object_drift(Footage(clip), Limits(drift=1.0)).score
    assert Finding("x", 1.0, 1.0, "").found and not Finding("x", None, 1.0, "", reason="why").found
    assert "1-3, 7" in repr(Finding("x", 2.0, 1.0, "", (1, 2, 3, 7)))
    with pytest.raises(ValueError, match="flicker"):
        examine(moving(0))["flickr"]
    with pytest.raises(TypeError, match="Clip.open"):
        examine("clip.mp4")
