"""LTX-Video against the stock pipelines, and what its reference does that is easily forgotten."""
import numpy as np
import pytest
import torch
from diffusers import LTXImageToVideoPipeline, LTXPipeline
from families import WORDS, company, float_answers, learns, ours, picture, saved, theirs

from vidgen.models import registry
from vidgen.models.family import family, load_parts, save_parts, stock
from vidgen.models.ltx import FPS, LENGTH

LTX = family("ltx")
NAMES = {"ltx-video": LTXPipeline, "ltx-video-i2v": LTXImageToVideoPipeline}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny(name="ltx-video", **kw):
    return LTX.tiny(name, words=WORDS, **kw)


@pytest.mark.parametrize("name", list(NAMES))
def test_equal_to_the_stock_pipeline(name, tmp_path):
    parts = saved(LTX, name, tmp_path)
    image = picture() if parts.task == "i2v" else None
    a = ours(parts, "a red circle moving right", frames=17, image=image)
    b = theirs(NAMES[name].from_pretrained(tmp_path), "a red circle moving right", frames=17, image=image)
    assert a.shape == b.shape == (17, 3, 64, 96)
    assert (a - b).abs().max() < 1e-4 and b.std() > 0.01


@pytest.mark.parametrize("name", list(NAMES))
@pytest.mark.parametrize("more", [dict(scale=1.0), dict(negative="a blue star"), dict(steps=2), dict(steps=20), dict(frames=1), dict(frames=25, size=(96, 128)), dict(seed=123)], ids=str)
def test_equal_to_the_stock_pipeline_in_every_setting(name, more):
    parts = tiny(name)
    more = more | ({"image": picture(*more.get("size", (64, 96))[::-1])} if parts.task == "i2v" else {})
    assert (ours(parts, "a red circle", **more) - theirs(stock(parts), "a red circle", **more)).abs().max() < 1e-4


def test_comparison_can_fail():
    for name in NAMES:
        parts, image = tiny(name), picture() if "i2v" in name else None
        clip = theirs(stock(parts), "a red circle", image=image)
        assert (ours(parts, "a red circle", seed=8, image=image) - clip).abs().max() > 1e-2
        assert (ours(parts, "a blue star", image=image) - clip).abs().max() > 1e-3
        assert "i2v" not in name or (ours(parts, "a red circle", image=picture(seed=1)) - clip).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(NAMES))
def test_half_precision_equals_the_stock_pipeline(name, tmp_path):
    image = picture() if "i2v" in name else None
    parts = load_parts(LTX, save_parts(tiny(name), tmp_path), precision="bf16")
    for scale, most, mean in ((1.0, 4e-3, 1e-3), (3.0, 0.1, 5e-3)):  # two answers from one pass are rounded otherwise than from two
        a = ours(parts, "a red circle", image=image, scale=scale)
        with float_answers(parts):
            b = theirs(stock(parts), "a red circle", image=image, scale=scale)
        assert (a - b).abs().max() < most and (a - b).abs().mean() < mean


def test_one_folder_serves_both_names(tmp_path, monkeypatch):
    save_parts(tiny(), tmp_path / "LTX-Video")
    monkeypatch.setenv("VIDGEN_MODEL_PATHS", str(tmp_path))
    asked = dict(seed=7, num_frames=9, height=64, width=96, num_inference_steps=3)
    for name, image in (("ltx-video", None), ("ltx-video-i2v", picture())):
        gen = registry.load(name, precision="fp32")
        clip, = gen.generate("a red circle", image, **asked)
        b = theirs(NAMES[name].from_pretrained(tmp_path / "LTX-Video"), "a red circle", steps=3, scale=gen.entry.guidance_scale, image=image)
        assert np.abs(clip.frames / 255 - b.permute(0, 2, 3, 1).numpy()).max() < 1.5 / 255
        assert (clip.made["model"], clip.made["task"], clip.made["fps"]) == (name, gen.entry.task, FPS)
    with pytest.raises(ValueError, match="ltx-video-i2v"):
        registry.load("ltx-video", precision="fp32").generate("a red circle", picture(), **asked)


@pytest.mark.parametrize("name", list(NAMES))
def test_a_clip_does_not_depend_on_its_batch(name):
    assert company(tiny(name)) <= 1


def test_the_transformer_gets_the_mask_and_the_encoder_does_not():
    parts, seen = tiny(), []
    parts.text_encoder.register_forward_pre_hook(lambda m, a, k: seen.append((len(a), set(k))), with_kwargs=True)
    parts.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k["encoder_attention_mask"].sum(1).tolist()), with_kwargs=True)
    ours(parts, "a red circle", steps=2)
    assert seen == [(1, set()), (1, set()), [1, 4], [1, 4]]
    reference, mask = stock(parts)._get_t5_prompt_embeds("a red circle", max_sequence_length=128)
    text = LTX.encode_prompt(parts, ["a red circle"])
    assert torch.allclose(text.embeds_BLD, reference, atol=1e-6) and torch.equal(text.more["mask_BL"], mask) and text.embeds_BLD.shape[1] == LENGTH


def test_padding_does_not_reach_the_answer_but_words_do():
    parts, z = tiny(), torch.randn(1, 2, 8, 2, 3)
    text = LTX.encode_prompt(parts, ["a red circle"]).condition

    def answer(embeds):
        with torch.no_grad():
            return LTX.predict(parts, z, 500.0, text | {"embeds_BLD": embeds}, {})

    plain, padding, word = answer(text["embeds_BLD"]), text["embeds_BLD"].clone(), text["embeds_BLD"].clone()
    padding[:, 4:] += 1
    word[:, 3] += 1
    assert torch.equal(plain, answer(padding)) and not torch.allclose(plain, answer(word), atol=1e-4)


def test_the_first_frame_has_timestep_zero_and_stands_still():
    parts, seen = tiny("ltx-video-i2v"), []
    parts.transformer.register_forward_pre_hook(lambda m, a, k: seen.append((k["timestep"], k["hidden_states"][:, :6])), with_kwargs=True)
    ours(parts, "a red circle", image=picture(), steps=3)
    for times, first in seen:
        assert times.shape == (2, 12) and (times[:, :6] == 0).all() and (times[:, 6:] > 0).all() and torch.equal(first, seen[0][1])


def test_noise_levels_shift_with_the_size_of_the_clip():
    parts = tiny()
    few, many = (LTX.sampler(parts, 5, [], (f, 8, 16, 22)).timesteps for f in (3, 21))
    assert (many[1:4] > few[1:4]).all() and few[0] == many[0] == 1000 and torch.allclose(few[-1], torch.tensor(100.0)) and torch.allclose(many[-1], few[-1])


def test_positions_are_counted_in_seconds_at_25():
    parts, seen = tiny(), []
    parts.transformer.rope.register_forward_pre_hook(lambda m, a: seen.append(a[4]))
    ours(parts, "a red circle", steps=2, scale=1.0)
    assert seen == [(8 / 25, 32, 32)] * 2


def test_an_autoencoder_that_reads_a_timestep_is_told_nought():
    from diffusers import AutoencoderKLLTXVideo

    parts = tiny()
    config = dict(parts.vae.config) | {"timestep_conditioning": True}
    torch.manual_seed(0)
    parts.components["vae"] = AutoencoderKLLTXVideo.from_config(config).eval()
    assert (ours(parts, "a red circle") - theirs(stock(parts), "a red circle")).abs().max() < 1e-4


def test_latents_are_normalised_channel_by_channel():
    parts, z = tiny(), torch.randn(1, 2, 8, 2, 3)
    x = LTX.decode(parts, z, 9)
    raw = parts.vae.encode(x).latent_dist.mode()
    assert torch.allclose(LTX.encode_clip(parts, x).transpose(1, 2), stock(parts)._normalize_latents(raw, parts.vae.latents_mean, parts.vae.latents_std, 1.0), atol=1e-5)
    assert parts.vae.latents_std.std() > 0.1


def test_training():
    same, named, reached = learns(tiny())
    assert same and len(named) == 2 * 8 and reached == named
    same, named, reached = learns(tiny("ltx-video-i2v"), torch.rand(2, 3, 64, 96))
    assert same and reached == named


def test_a_known_first_frame_costs_nothing_in_training():
    parts, z = tiny("ltx-video-i2v"), torch.randn(1, 2, 8, 2, 3)
    text, loss = LTX.encode_prompt(parts, ["a"]).condition, lambda z: LTX.training_loss(
        parts, z, text, generator=torch.Generator().manual_seed(0), image_B1CHW={"known_B1CHW": torch.zeros(1, 1, 8, 2, 3)})
    other = z.clone()
    other[:, 0] += 5
    assert torch.equal(loss(z), loss(other))


def test_names_sizes_and_rules():
    for name, task in (("ltx-video", "t2v"), ("ltx-video-i2v", "i2v")):
        e = registry.entries()[name]
        assert (e.task, e.num_frames, e.height, e.width, e.fps, e.precision, e.repo) == (task, 161, 512, 704, 25, "bf16", "Lightricks/LTX-Video") and e.licence
        LTX.rules(tiny(name).configs).check(e.num_frames, e.height, e.width)
    with pytest.raises(ValueError, match="153 or 161"):
        LTX.rules(tiny().configs).check(160, 512, 704)
    with pytest.raises(ValueError, match="multiple of 32.*480 or 512"):
        LTX.rules(tiny().configs).check(161, 500, 704)
    with pytest.raises(ValueError, match="nearest"):
        LTX.tiny("ltx-vido")


def test_one_step_is_refused_where_the_stock_schedule_breaks_and_made_where_it_does_not():
    parts = tiny()
    with pytest.raises(ValueError, match="2 steps or more"):
        LTX.sampler(parts, 1, [])
    parts.components["scheduler"] = LTX.make_scheduler("euler", dict(parts.scheduler.config) | {"shift_terminal": None})
    assert (ours(parts, "a red circle", steps=1) - theirs(stock(parts), "a red circle", steps=1)).abs().max() < 1e-4
