"""What the seam offers a family that draws, guides or speaks in a way of its own, and that the others don't notice."""
import json
from dataclasses import replace

import pytest
import torch

from vidgen.generate import baseline
from vidgen.generate.guidance import schedule
from vidgen.models import family as seam
from vidgen.models import registry

COG = seam.family("cogvideox")


def batch(negative="", scale=3.0):
    return baseline.Batch(("a circle",), (negative,), (7,), 9, 64, 96, 2, schedule("constant", scale))


def using(monkeypatch, **changes):
    "A tiny CogVideoX whose family has other ways."
    changed = replace(COG, **changes)
    monkeypatch.setattr(seam.Parts, "family", property(lambda self: changed))
    return COG.tiny()


def test_the_defaults_of_the_seam_are_what_was_always_done(monkeypatch):
    parts = COG.tiny()
    draws = torch.cat([torch.randn((1, 3, 4, 8, 12), generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    assert torch.equal(COG.noise(parts, (3, 4, 8, 12), [torch.Generator().manual_seed(s) for s in (1, 2)], {}), draws)
    assert COG.guidance(parts, 6.0) == (6.0, None) and COG.facts(parts) == COG.beside(parts) == {} and COG.keep_fp32 == ()


def test_a_model_that_guides_itself_is_asked_once_and_reads_the_scale(monkeypatch):
    told, sizes = [], []

    def predict(parts, z, t, txt, extras):
        told.append(extras.get("guidance_scale"))
        sizes.append(len(z))
        return COG.predict(parts, z, t, txt, {k: v for k, v in extras.items() if k != "guidance_scale"})

    parts = using(monkeypatch, guidance=lambda parts, scale: (1.0, scale), predict=predict)
    notes = baseline.run(parts, batch("blurry"), baseline.Watch())[1]
    assert told == [3.0, 3.0] and sizes == [1, 1] and any("no negative prompt" in n for n in notes[0])
    assert baseline.run(parts, batch(), baseline.Watch())[1] == [()]


def test_guidance_may_weigh_otherwise_than_the_scale_says(monkeypatch):
    plain = baseline.run(COG.tiny(), batch(scale=4.0), baseline.Watch())[0]
    shifted = baseline.run(using(monkeypatch, guidance=lambda parts, scale: (1 + scale, None)), batch(scale=3.0), baseline.Watch())[0]
    assert torch.equal(plain, shifted)


def test_texts_of_several_tensors_are_doubled_together(monkeypatch):
    seen = []

    def encode(parts, prompts, x_BCHW=None):
        return replace(COG.encode_prompt(parts, prompts), more={"mask_BL": torch.full((len(prompts), 32), float(bool(prompts[0])))})

    def predict(parts, z, t, txt, extras):
        seen.append(txt["mask_BL"][:, 0].tolist())
        return COG.predict(parts, z, t, txt["embeds_BLD"], extras)

    baseline.run(using(monkeypatch, encode_prompt=encode, predict=predict), batch(), baseline.Watch())
    assert seen == [[0.0, 1.0]] * 2


def test_latents_may_stay_float32_beside_half_weights(monkeypatch, tmp_path):
    folder = seam.save_parts(COG.tiny(), tmp_path)
    changed = replace(COG, keep_fp32=("vae",), noise=lambda parts, shape, generators, extras: seam.draw(parts, shape, generators, precision="fp32"))
    parts = seam.load_parts(changed, folder, precision="bf16")
    assert parts.vae.dtype == torch.float32 and parts.transformer.dtype == parts.text_encoder.dtype == torch.bfloat16
    assert changed.noise(parts, (3, 4, 8, 12), [torch.Generator()], {}).dtype == torch.float32


@pytest.mark.parametrize("name", ["Open-Sora 2.0", "open-sora", "opensora", "opensora-v2", "hpcai-tech/Open-Sora-v2"])
def test_open_sora_is_said_to_come_later(name):
    for ask in (registry.load, seam.family):
        with pytest.raises(ValueError, match="Open-Sora 2.0 can't be run yet.*diffusers has no pipeline.*later"):
            ask(name)


def test_a_safety_checker_is_neither_loaded_nor_missed(tmp_path):
    folder = seam.save_parts(COG.tiny(), tmp_path / "mine")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"safety_checker": ["cosmos_guardrail", "CosmosSafetyChecker"]}))
    registry.check(*registry.resolve(folder))
    assert "safety_checker" not in registry.load(folder).parts.components


def test_version_15_has_names():
    named = registry.entries()
    for name, task in [("cogvideox1.5-5b", "t2v"), ("cogvideox1.5-5b-i2v", "i2v")]:
        e = named[name]
        assert (e.task, e.num_frames, e.width, e.height, e.fps, e.precision, e.scheduler) == (task, 81, 1360, 768, 16, "bf16", "dpm")
        COG.rules({"vae": {"block_out_channels": (1,) * 4}, "transformer": {"patch_size_t": 2, "patch_size": 2}}).check(e.num_frames, e.height, e.width)
