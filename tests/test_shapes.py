"""The models that ship: their files, plain loading by diffusers, and that they still do what the report says."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vidgen
from vidgen import world
from vidgen.world import oracle
from vidgen.world.scenes import caption, render, scene
from vidgen.world.shapes import MAX_TOKENS, to_tensor

WEIGHTS = Path(vidgen.__file__).parent / "weights"
NAMES = ("shapes-t2v", "shapes-i2v")


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    return {name: vidgen.load(name) for name in NAMES}


def test_together_they_stay_under_12_mb():
    files = [p for name in NAMES for p in (WEIGHTS / name).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


@pytest.mark.parametrize("name", NAMES)
def test_they_name_the_run_that_made_them(name):
    made = json.loads((WEIGHTS / name / "vidgen.json").read_text())
    published = json.loads((WEIGHTS.parents[1] / "reports" / "data" / "000_train_world.json").read_text())
    assert made["run"] == published["run"]
    assert published["result"]["models"][name]["fingerprint"] == vidgen.load(name).weights


@pytest.mark.parametrize("name", NAMES)
def test_plain_diffusers_loads_and_runs_them(name):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(WEIGHTS / name)
    assert {m.dtype for m in (pipe.text_encoder, pipe.transformer, pipe.vae)} == {torch.float32}
    more = {"image": Image.fromarray(render(scene(3)).frames[0])} if name.endswith("i2v") else {}
    frames = pipe(prompt=caption(scene(3)), num_frames=17, height=64, width=96, num_inference_steps=25, guidance_scale=3.0, max_sequence_length=MAX_TOKENS,
                  output_type="np", generator=torch.Generator().manual_seed(3), **more).frames[0]
    clip = vidgen.Clip(np.rint(frames * 255).astype(np.uint8), fps=8)
    assert oracle.read(clip).background == scene(3).background and oracle.read(clip).seen


def test_they_follow_the_prompt(models):
    for held in (False, True):
        asked = world.prompts(40, seed=4321, held=held)
        score = oracle.score(models["shapes-t2v"].generate(asked, seed=99), asked)
        assert score.right["all"] >= 37, score


def test_the_codec_keeps_what_the_oracle_reads(models):
    vae, scenes = models["shapes-t2v"].parts.vae, [scene(9_100_000 + i) for i in range(32)]
    given = [render(s) for s in scenes]
    with torch.no_grad():
        pairs = [torch.stack([to_tensor(c.frames) for c in given[i : i + 2]]) for i in range(0, len(given), 2)]
        back = [vidgen.Clip.from_tensor(x.clamp(-1, 1), fps=8) for pair in pairs for x in vae.decode(vae.encode(pair).latent_dist.mean).sample]
    score = oracle.score(back, [caption(s) for s in scenes])
    assert score.right["all"] >= 31, score
    errors = [((a.frames.astype(float) - b.frames) ** 2).mean() for a, b in zip(given, back)]
    assert np.mean([10 * np.log10(255**2 / e) for e in errors]) >= 30


def test_the_image_model_moves_what_it_is_given(models):
    scenes = [scene(9_000_000 + i, held=False) for i in range(24)]
    given = [render(s) for s in scenes]
    clips = models["shapes-i2v"].generate([caption(s) for s in scenes], [c.frames[0] for c in given], seed=5)
    score = oracle.score(clips, [caption(s) for s in scenes])
    assert score.right["motion"] >= 21, score
    errors = [((a.frames[0].astype(float) - b.frames[0]) ** 2).mean() for a, b in zip(given, clips)]
    assert 10 * np.log10(255**2 / np.mean(errors)) >= 25


def test_shuffled_captions_score_at_chance(models):
    asked = world.prompts(32, seed=7)
    clips = models["shapes-t2v"].generate(asked, seed=1)
    assert oracle.score(clips, asked[5:] + asked[:5]).right["all"] <= 4


def test_unknown_words_are_named_not_hidden(models):
    clip = models["shapes-t2v"].generate("a crimson zeppelin moving left", seed=1)[0]
    assert "crimson" in str(clip.made["warnings"]) and "zeppelin" in str(clip.made["warnings"])
