"""The video network that ships: it names its run, it sees the world, and its distances notice what is wrong. Needs the weights of 013_train_world_video."""
import json
from pathlib import Path

import numpy as np
import pytest

import vidgen
from vidgen.evaluate import backbones, distribution, watcher
from vidgen.evaluate.faults import codec
from vidgen.store import fingerprint
from vidgen.world import render, scene

FOLDER = Path(vidgen.__file__).parent / "weights" / "world-video"


FAINT = ("freeze", "defocus")   # three frames that stand still, edges a little softer: seen by more clips only


def clips(n, seed, damage="none"):
    rng = np.random.default_rng([seed, 1])
    return [watcher.spoilt(render(scene([seed, i])), damage, rng) for i in range(n)]


def test_the_shipped_files():
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 2e6
    made = json.loads((FOLDER / "config.json").read_text())["made"]
    published = json.loads((FOLDER.parents[2] / "reports" / "data" / "013_train_world_video.json").read_text())
    assert made["run"] == published["run"] and made["experiment"] == "013_train_world_video"
    assert backbones.load("world-video").dims == 128 and len(fingerprint(FOLDER)) == 64


@pytest.mark.parametrize("damage", [d for d in watcher.DAMAGES if d not in ("none", "drop")])
def test_its_distance_notices(damage):
    n = 192 if damage in FAINT else 64
    real = backbones.features(clips(2 * n, 50), "world-video", cache=False)
    ours = backbones.features(clips(n, 51, damage), "world-video", cache=False)
    ground = distribution.floor(real, n, distribution.kernel_distance, splits=20)
    assert distribution.kernel_distance(ours, real) > (1 if damage in FAINT else 2) * max(abs(ground.low), ground.high)
    assert distribution.mmd(ours, real, permutations=200).p < 0.01


def test_clean_clips_are_at_home():
    real, ours = (backbones.features(clips(n, seed), "world-video", cache=False) for n, seed in ((128, 52), (64, 53)))
    assert distribution.mmd(ours, real, permutations=500).p > 0.01
    missing = [c for c in clips(150, 54) if "pink" not in str(c.made["prompt"]) and "star" not in str(c.made["prompt"])]
    assert distribution.mmd(backbones.features(missing[:64], "world-video", cache=False), real, permutations=500).p < 0.05


def test_worse_is_further():
    real = backbones.features(clips(96, 55), "world-video", cache=False)
    far = [distribution.kernel_distance(backbones.features([codec(c, psnr=psnr, seed=i) for i, c in enumerate(clips(48, 56))], "world-video", cache=False), real) for psnr in (34, 28, 22)]
    assert far == sorted(far)
