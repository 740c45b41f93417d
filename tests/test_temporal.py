"""Frame to frame: definitions kept to the letter, defects of known programs not repeated, cuts split, the unknowable unknown."""
import json

import numpy as np
import pytest

from vidgen.evaluate import faults
from vidgen.evaluate.metric import Footage
from vidgen.evaluate.temporal import (METRICS, between, by_shot, colours, cuts, degree, dynamic, features, motion_smoothness, occluded, seams, shots, similarity,
                                      similarity_metrics, temporal_flickering, unexplained, warp, warping_error)
from vidgen.world import render, scene

TABLE = {m.name: m for m in METRICS}


class Shots(dict):
    def __missing__(self, name):
        self[name] = Footage(faults.textured(name))
        return self[name]


shot = Shots()


def shift(frame, dx, dy=0):
    return np.roll(frame, (dy, dx), (0, 1))


# the definitions

def test_warp_reads_where_the_flow_points():
    frame = np.random.default_rng(0).uniform(0, 255, (40, 60, 3)).astype(np.float32)
    flow = np.broadcast_to(np.float32([3, -2]), (40, 60, 2))
    back, inside = warp(shift(frame, 3, -2), flow)
    assert np.array_equal(back[inside], frame[inside]) and inside.sum() == 38 * 57
    half, _ = warp(frame, np.broadcast_to(np.float32([0.5, 0]), (40, 60, 2)))
    assert np.allclose(half[:, :-1], (frame[:, 1:] + frame[:, :-1]) / 2, atol=0.05)


def test_occlusion_is_the_published_rule():
    rng = np.random.default_rng(1)
    flow, back = rng.normal(0, 1, (2, 33, 47, 2)).astype(np.float32) * [1.0, 0.2] + [1, 0]
    flow, back = np.float32(flow * 0.3), np.float32(-back * 0.3)
    found = occluded(flow, back)
    for y in range(0, 33, 4):
        for x in range(0, 47, 5):
            u, v = flow[y, x]
            xx, yy = np.clip(x + u, 0, 46), np.clip(y + v, 0, 32)
            x0, y0 = min(int(xx), 45), min(int(yy), 31)
            a, b = xx - x0, yy - y0
            there = (1 - a) * (1 - b) * back[y0, x0] + a * (1 - b) * back[y0, x0 + 1] + (1 - a) * b * back[y0 + 1, x0] + a * b * back[y0 + 1, x0 + 1]
            apart = ((flow[y, x] + there) ** 2).sum() - (0.01 * ((flow[y, x] ** 2).sum() + (there**2).sum()) + 0.5)
            slope = sum(((flow[q] - flow[y, x]) ** 2).sum() for q in ((y, x + 1), (y + 1, x)) if q[0] < 33 and q[1] < 47)
            torn = slope - (0.01 * (flow[y, x] ** 2).sum() + 0.002)
            if min(abs(apart), abs(torn)) > 0.02:  # bilinear sampling is in fixed point
                assert found[y, x] == (apart > 0 or torn > 0)
    still = np.zeros((33, 47, 2), np.float32)
    assert not occluded(still, still).any() and occluded(still + np.float32([1, 0]), still).all()


def test_warping_error_of_a_translation_and_of_a_known_change():
    assert warping_error(shot["static"]).value == 0
    for name in ("pan 1", "pan 3", "pan 6"):
        assert warping_error(shot[name]).value < 1e-4
    frames = np.repeat(faults.textured("static").frames[:1].clip(20, 200), 4, 0)
    frames[1::2] += 10  # the same change in each colour: its square, not three times it
    value = warping_error(Footage(frames))
    assert value.value == pytest.approx((10 / 255) ** 2, rel=0.02) and 0 < value.detail["seen"] <= 1 and len(value.detail["series"]) == 3


def test_flicker_is_vbench_to_the_digit():
    for name in ("pan 3", "local flicker", "white noise"):
        frames = faults.textured(name).frames
        apart = [np.abs(a.astype(np.float32) - b.astype(np.float32)).mean(dtype=np.float64) for a, b in zip(frames, frames[1:])]
        assert temporal_flickering(shot[name]).value == pytest.approx((255 - np.mean(apart)) / 255, abs=1e-9)
    assert temporal_flickering(shot["static"]).value == 1
    assert temporal_flickering(Footage(faults.textured("pan 3").frames[:, ::2, ::-3])).value < 1  # a view that isn't contiguous


def test_smoothness():
    a, b = (np.full((40, 40, 3), v, np.float32) for v in (10, 30))
    still = np.zeros((40, 40, 2), np.float32)
    assert np.allclose(between(a, b, still, still), 20)
    texture = faults.textured("static").frames[0].astype(np.float32)
    moved = np.broadcast_to(np.float32([6, 0]), (*texture.shape[:2], 2))
    middle = between(texture, shift(texture, 6), moved, -moved)
    assert np.abs(middle - shift(texture, 3))[:, 10:-10].max() < 1
    values = {name: motion_smoothness(shot[name]).value for name in ("static", "pan 1", "pan 6", "zoom 3 %", "rotation", "accelerating pan", "judder", "shake 3", "vibrate", "gain flicker 10 %")}
    assert values["static"] == 1 and min(values[n] for n in ("pan 1", "pan 6", "zoom 3 %", "rotation", "accelerating pan")) > 0.985
    assert max(values[n] for n in ("judder", "shake 3", "vibrate", "gain flicker 10 %")) < 0.97
    odd = Footage(faults.faulty(faults.textured("static"), "black", 1.0).frames)
    assert motion_smoothness(odd).value == pytest.approx(motion_smoothness(Footage(odd.frames[1:])).value, abs=0.02)  # where it begins doesn't matter


def test_dynamic_degree_without_the_known_defects():
    photograph = faults.textured("static").frames
    for count in (2, 3, 5, 16):
        assert dynamic(Footage(photograph[:count])).value == 0  # two frames need one fast pair, not round(0.5) = 0
    assert dynamic(shot["pan 3"]).value == 0 and dynamic(shot["pan 6"]).value == 1
    pan = faults.textured("pan 6").frames
    for pairs, fast in ((9, 2), (9, 3), (10, 2), (10, 3), (4, 1), (5, 1), (15, 4), (15, 3)):  # half up, never to the even number
        frames = np.concatenate([pan[:1].repeat(pairs - fast, 0), pan[: fast + 1]])
        assert dynamic(Footage(frames)).value == (fast >= np.floor((pairs + 1) / 4 + 0.5)), (pairs, fast)
    slow = faults.textured("pan 3").frames
    assert dynamic(Footage(slow, fps=24)).value == 1 and dynamic(Footage(slow, fps=8)).value == 0  # it is a speed
    assert dynamic(Footage(pan, fps=4)).value == 0 and dynamic(Footage(pan[:2], fps=60)).detail["of"] == 1
    assert degree(shot["pan 6"]).value == pytest.approx(6 / 160, rel=0.05) and degree(shot["static"]).value == 0


def test_similarity_of_a_turning_vector():
    angle = np.deg2rad(10.0 * np.arange(6))
    s = similarity(np.stack([np.cos(angle), np.sin(angle)], 1) * np.arange(1, 7)[:, None])  # lengths don't matter
    first = np.cos(angle[1:])
    assert s.adjacent == pytest.approx(np.cos(np.deg2rad(10))) and s.first == pytest.approx(first.mean())
    assert s.blend == pytest.approx((first.mean() + s.adjacent) / 2)
    opposed = similarity([[1, 0], [-1, 0], [1, 0]])
    assert opposed.adjacent == -1 and opposed.first == 0 and opposed.blend == 0.25 and opposed.lowest == (1, -1.0)


def test_drift_is_the_theil_sen_slope():
    from scipy.stats import theilslopes

    x = np.random.default_rng(0).normal(size=(9, 16)) + 3
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert similarity(x).loss == pytest.approx(-theilslopes(unit[1:] @ unit[0]).slope)
    assert similarity(x[:2]).loss is None


@pytest.mark.parametrize("bad", [np.ones((1, 4)), np.ones(4), np.zeros((3, 4)), np.full((3, 4), np.nan)])
def test_no_similarity_without_features(bad):
    with pytest.raises(ValueError, match="features"):
        similarity(bad)


def test_colours_are_a_bhattacharyya_coefficient():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (3, 3, 20, 30)).astype(np.float32)
    x[2] = 0
    f = colours(x, bins=4)
    assert f.shape == (3, 64) and np.allclose((f**2).sum(1), 1) and f[2, 0] == 1
    edges = colours(np.broadcast_to(np.float32([0, 1 / 3, 1])[None, :, None, None], (1, 3, 5, 5)), bins=4)
    assert edges[0, (0 * 4 + 1) * 4 + 3] == pytest.approx(1)
    nearly = colours(np.stack([np.full((3, 8, 8), 0.499, np.float32), np.full((3, 8, 8), 0.501, np.float32)]), bins=6)
    assert nearly[0] @ nearly[1] > 0.999  # no jump at a border of bins


def test_any_backbone():
    import torch

    footage = Footage(render(scene(3)))
    calls = []

    def mean(x):
        calls.append(x.shape)
        assert x.dtype == np.float32 and 0 <= x.min() and x.max() <= 1
        return x.mean((2, 3))

    found = features(footage, mean, batch=5)
    assert found.shape == (17, 3) and [c[0] for c in calls] == [5, 5, 5, 2] and np.allclose(found, footage.frames.mean((1, 2)) / 255, atol=1e-5)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    assert features(footage, network).shape == (17, 12)
    of = lambda f: features(f, mean)
    calls.clear()
    metrics = similarity_metrics("mean", of)
    assert [m.name for m in metrics] == ["frame_similarity@mean", "frame_adjacent@mean", "frame_first@mean", "frame_drift@mean"]
    assert [m(footage).value > 0.9 for m in metrics[:3]] == [True] * 3 and len(calls) == 2  # once for all


# cuts

CUT = {"cut", "cut in pan"}


@pytest.mark.parametrize("name", list(faults.OWED))
def test_only_cuts_are_cuts(name):
    assert cuts(shot[name]) == ((8,) if name in CUT else ())


@pytest.mark.parametrize("seed", range(6))
def test_cuts_between_scenes_even_on_one_background(seed):
    a = render(scene([seed, 1]))
    b = render(scene([seed, 2], **({"background": a.made["scene"]["background"]} if seed % 2 else {})))
    joined = np.concatenate([a.frames[:9], b.frames, a.frames[9:]])
    assert cuts(Footage(joined)) == (9, 26)
    assert cuts(Footage(faults.codec(a, seed=seed))) == ()
    assert cuts(Footage(faults.faulty(a, "cut", 2.0, seed=seed))) == (6, 12)
    for kind in ("shake", "flicker", "judder", "black", "white", "drift", "noise", "freeze"):
        assert cuts(Footage(faults.faulty(a, kind, seed=seed))) == (), kind


def test_a_cut_across_black_and_the_shortest_clips():
    a, b = (faults.textured("pan 3", seed=seed).frames for seed in (0, 1))
    black = np.zeros_like(a[:3])
    assert cuts(Footage(np.concatenate([a[:6], black, b[:6]]))) == (9,)
    assert cuts(Footage(np.concatenate([a[:6], black, a[6:12]]))) == ()
    assert cuts(Footage(np.stack([a[0], b[0]]))) == (1,) and cuts(Footage(a[:2])) == cuts(Footage(a[:1])) == cuts(Footage(black)) == ()
    assert all(0 <= left <= 2.1 for *_, left, _ in seams(Footage(np.concatenate([a[:6], b[:6]]))))


def test_one_foreign_frame_is_a_flash():
    frames = faults.textured("pan 3").frames.copy()
    frames[7] = faults.textured("pan 3", seed=1).frames[7]
    assert cuts(Footage(frames)) == ()
    frames[8:10] = faults.textured("pan 3", seed=1).frames[8:10]
    assert cuts(Footage(frames)) == (7, 10)


def test_unexplained_ignores_brightness_and_knows_strangers():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 255, (2, 60, 60, 3)).astype(np.float32)
    everywhere = np.ones((60, 60), bool)
    assert unexplained(a, a + 40, everywhere) < 1e-9 and unexplained(a, b, everywhere) == pytest.approx(1, abs=0.05)
    assert unexplained(a, a, ~everywhere) == 1


def test_a_cut_splits_before_scoring():
    a, b = faults.textured("pan 3").frames, faults.textured("pan 6", seed=1).frames[:10]
    whole = Footage(np.concatenate([a, b]))
    assert shots(whole) == [(0, 16), (16, 26)]
    for m in METRICS:
        value, parts = m(whole), [m(Footage(a)).value, m(Footage(b)).value]
        assert value.value == pytest.approx((16 * parts[0] + 10 * parts[1]) / 26, rel=1e-6, abs=1e-9), m.name
        assert value.detail["cuts"] == [16] and [r["stop"] for r in value.detail["shots"]] == [16, 26]
    torn = by_shot(Footage(np.concatenate([a, b[:1]])), lambda piece: TABLE["warping_error@dis"](piece))
    assert torn.value == pytest.approx(warping_error(Footage(a)).value) and "1 frame" in torn.detail["shots"][1]["reason"]


def test_parts_know_what_the_whole_knows():
    whole = Footage(np.concatenate([faults.textured("pan 3").frames, faults.textured("pan 6", seed=1).frames]))
    whole.flows, whole.flows_back, whole.motion, whole.differences
    piece, again = whole.part(16, 32), Footage(whole.frames[16:32])
    assert piece.start == 16 and piece.part(3, 5).start == 19 and piece.flows[3] is whole.flows[19]
    for name in ("small", "luma", "flows", "flows_back", "motion", "differences"):
        assert np.allclose(np.asarray(getattr(piece, name)), np.asarray(getattr(again, name)), atol=1e-4), name


# what can't be known

@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_the_unknowable(metric):
    clip = faults.textured("pan 3").frames
    one = metric(Footage(clip[:1]))
    assert one.value is None and "1 frame" in one.reason
    two = metric(Footage(clip[:2]))
    assert (two.value is None) == (metric.name in ("motion_smoothness@dis", "frame_drift@colours"))
    tiny = metric(Footage(np.zeros((5, 16, 64, 3), np.uint8)))
    assert (tiny.value is None) == (metric.name.endswith("@dis") or metric.name == "dynamic_degree")
    black = metric(Footage(np.zeros((5, 64, 96, 3), np.uint8)))
    assert black.value is not None and black.detail["cuts"] == []
    for name in ("pan 3", "cut", "one black", "white noise"):
        json.dumps(metric(shot[name]).detail)


SIDES = {"temporal_flickering": (["static", "noise 2"], ["gain flicker 10 %", "gain flicker 30 %", "local flicker", "shake 3", "white noise"], 0.96),
         "motion_smoothness@dis": (["static", "noise 2", "pan 1", "pan 3", "pan 6", "pan 12", "ease pan", "accelerating pan", "zoom 1 %", "zoom 3 %", "rotation", "object 3", "freeze"],
                                   ["shake 3", "vibrate", "pan and shake", "gain flicker 10 %", "gain flicker 30 %", "judder", "white noise", "one black"], 0.97)}
LOW = ["static", "black", "noise 2", "pan 1", "pan 3", "pan 6", "pan 12", "ease pan", "accelerating pan", "zoom 1 %", "zoom 3 %", "rotation", "object 3", "object 7", "freeze", "cut", "cut in pan", "judder"]
HIGH = ["gain flicker 10 %", "gain flicker 30 %", "local flicker", "boiling 3", "one black", "teleport", "white noise"]


@pytest.mark.parametrize("name", [*SIDES, "warping_error@dis"])
def test_the_reference_clips_fall_on_their_side(name):
    good, bad, line = SIDES.get(name, (LOW, HIGH, 0.0004))
    sign = -1 if name == "warping_error@dis" else 1
    values = {clip: TABLE[name](shot[clip]).value for clip in [*good, *bad]}
    assert all(sign * values[c] > sign * line for c in good) and all(sign * values[c] < sign * line for c in bad), values


def test_stillness_is_seen_beside_the_scores_that_reward_it():
    for name in ("temporal_flickering", "motion_smoothness@dis", "warping_error@dis", "frame_similarity@colours"):
        assert TABLE[name](shot["static"]).detail["dynamic_degree"] == 0 < 0.03 < TABLE[name](shot["pan 6"]).detail["dynamic_degree"]


def test_no_network_is_loaded():
    import subprocess
    import sys

    code = "import sys, vidgen.evaluate.temporal; print([m for m in ('torch', 'cv2', 'scipy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_value_that_is_known_carries_no_excuse():
    long, short = Footage(faults.textured("pan 3")), Footage(faults.textured("pan 3").frames[:2])
    for metric in (m for m in METRICS if m.name.endswith("@colours")):
        assert metric(long).value is not None and metric(long).reason == ""
        assert (metric(short).reason != "") == (metric(short).value is None)
