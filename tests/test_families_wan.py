"""Wan 2.1 against the stock pipelines, and what its reference does that is easily forgotten."""
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families import WORDS, company, float_answers, learns, ours, picture, saved, theirs

from vidgen.models import registry
from vidgen.models.family import family, load_parts, save_parts, stock
from vidgen.models.wan import LENGTH, TRANSFORMERS

WAN = family("wan")
T2V, I2V = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny(name=T2V, **kw):
    return WAN.tiny(name, words=WORDS, **kw)


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_equal_to_the_stock_pipeline(name, scheduler, tmp_path):
    parts = saved(WAN, name, tmp_path, scheduler=scheduler)
    image = picture() if parts.task == "i2v" else None
    a = ours(parts, "a red circle moving right", image=image)
    b = theirs(DiffusionPipeline.from_pretrained(tmp_path), "a red circle moving right", image=image)
    assert a.shape == b.shape == (9, 3, 64, 96)
    assert (a - b).abs().max() < 1e-4 and b.std() > 0.01


@pytest.mark.parametrize("name", [T2V, I2V])
@pytest.mark.parametrize("more", [dict(scale=1.0), dict(negative="a blue star"), dict(steps=1), dict(steps=10), dict(frames=1), dict(frames=17, size=(48, 64)), dict(seed=123)], ids=str)
def test_equal_to_the_stock_pipeline_in_every_setting(name, more):
    parts = tiny(name)
    more = more | ({"image": picture(*more.get("size", (64, 96))[::-1])} if parts.task == "i2v" else {})
    assert (ours(parts, "a red circle", **more) - theirs(stock(parts), "a red circle", **more)).abs().max() < 1e-4


def test_comparison_can_fail():
    for name in (T2V, I2V):
        parts, image = tiny(name), picture() if name == I2V else None
        clip = theirs(stock(parts), "a red circle", image=image)
        assert (ours(parts, "a red circle", seed=8, image=image) - clip).abs().max() > 1e-2
        assert (ours(parts, "a blue star", image=image) - clip).abs().max() > 1e-3
        assert name == T2V or (ours(parts, "a red circle", image=picture(seed=1)) - clip).abs().max() > 1e-3


@pytest.mark.parametrize("name", [T2V, I2V])
def test_half_precision_equals_the_stock_pipeline(name, tmp_path):
    image = picture() if name == I2V else None
    parts = load_parts(WAN, save_parts(tiny(name), tmp_path), precision="bf16")
    assert parts.vae.dtype == torch.float32 and parts.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert parts.transformer.scale_shift_table.dtype == torch.float32  # the class keeps it so
    for scale, most, mean in ((1.0, 4e-3, 1e-3), (3.0, 0.1, 5e-3)):  # two answers from one pass are rounded otherwise than from two
        a = ours(parts, "a red circle", image=image, scale=scale)
        with float_answers(parts):
            b = theirs(stock(parts), "a red circle", image=image, scale=scale)
        assert (a - b).abs().max() < most and (a - b).abs().mean() < mean


def test_a_user_gets_the_same_clip(tmp_path):
    save_parts(tiny(I2V), tmp_path / "mine")
    gen = registry.load(tmp_path / "mine")
    clip, = gen.generate("a red circle", picture(), seed=7, num_frames=9, num_inference_steps=3)
    b = theirs(DiffusionPipeline.from_pretrained(tmp_path / "mine"), "a red circle", steps=3, scale=gen.entry.guidance_scale, image=picture())
    assert np.abs(clip.frames / 255 - b.permute(0, 2, 3, 1).numpy()).max() < 1.5 / 255
    assert (clip.made["family"], clip.made["scheduler"], clip.made["task"]) == ("wan", "UniPCMultistepScheduler", "i2v")


@pytest.mark.parametrize("name", [T2V, I2V])
def test_a_clip_does_not_depend_on_its_batch(name):
    assert company(tiny(name)) <= 1


def test_embeddings_beyond_the_prompt_are_zero_and_equal_to_the_reference():
    parts = tiny()
    for prompt in ("a red circle", "", "a red  circle &amp; a <b>star</b>\n", "a red star " * 400):
        text, reference = WAN.encode_prompt(parts, [prompt]), stock(parts)._get_t5_prompt_embeds(prompt, max_sequence_length=512)
        assert torch.allclose(text.embeds_BLD, reference, atol=1e-6) and text.embeds_BLD.shape == (1, LENGTH, 32)
        assert (text.embeds_BLD[0, text.tokens[0]:] == 0).all()
    assert text.tokens[0] > LENGTH and "512" in text.notes[0][0]


def test_the_mask_goes_to_the_encoder_and_not_to_the_transformer():
    parts, seen = tiny(), []
    parts.text_encoder.register_forward_pre_hook(lambda m, a, k: seen.append(a[1] if len(a) > 1 else k["attention_mask"]), with_kwargs=True)
    parts.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(set(k)), with_kwargs=True)
    ours(parts, "a red circle", steps=1, scale=1.0)
    assert seen[0].sum() == 4 and seen[-1] == {"hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image", "return_dict"}


def test_the_picture_is_the_mode_of_a_whole_clip_and_a_mask():
    parts = tiny(I2V)
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    given = WAN.encode_image(parts, x, [], 9)
    _, reference = stock(parts).prepare_latents(x[:1], 1, 4, 64, 96, 9, torch.float32, "cpu", torch.Generator())
    assert torch.allclose(given["condition_BFCHW"][:1].transpose(1, 2), reference, atol=1e-5)
    assert given["seen_BLD"].shape == (2, 5, 16) and not torch.equal(*given["seen_BLD"])


def test_noise_is_drawn_channel_after_channel_in_float32():
    parts = tiny()
    parts.precision = "bf16"
    z = WAN.noise(parts, (3, 4, 8, 12), [torch.Generator().manual_seed(7)], {})
    assert torch.equal(z, torch.randn((1, 4, 3, 8, 12), generator=torch.Generator().manual_seed(7)).transpose(1, 2)) and z.dtype == torch.float32


def test_latents_are_normalised_channel_by_channel():
    parts = tiny()
    z = torch.randn(1, 3, 4, 8, 12)
    raw = parts.vae.encode(x := WAN.decode(parts, z, 9)).latent_dist.mode().transpose(1, 2)
    mean, std = (torch.tensor(v).view(1, 1, 4, 1, 1) for v in (parts.vae.config.latents_mean, parts.vae.config.latents_std))
    assert torch.allclose(WAN.encode_clip(parts, x), (raw - mean) / std, atol=1e-5) and len(set(parts.vae.config.latents_std)) == 4


def test_training():
    same, named, reached = learns(tiny())
    assert same and len(named) == 2 * 8 and reached == named
    same, named, reached = learns(tiny(I2V), torch.rand(2, 3, 64, 96))
    assert same and reached == named


def test_the_true_direction_undoes_the_noise_and_the_shift_is_the_checkpoints():
    parts = tiny("wan2.1-i2v-14b-720p")
    assert WAN.sampler(parts, 4, []).timesteps.tolist() == [999, 937, 833, 625]
    z, noise = torch.randn(1, 3, 4, 8, 12), torch.randn(1, 3, 4, 8, 12)
    walk, there = WAN.sampler(parts, 8, []), noise
    for i in range(8):
        there = walk.step(i, WAN.target(parts, z, noise, walk.timesteps[i : i + 1])[1], there)
    assert torch.allclose(there, z, atol=1e-3)


def test_names_sizes_and_rules():
    named = registry.entries()
    for name, task, height, width, steps in [(T2V, "t2v", 480, 832, 50), ("wan2.1-t2v-14b", "t2v", 480, 832, 50), (I2V, "i2v", 480, 832, 40), ("wan2.1-i2v-14b-720p", "i2v", 720, 1280, 40)]:
        e = named[name]
        assert (e.task, e.num_frames, e.height, e.width, e.num_inference_steps, e.fps, e.precision, e.licence) == (task, 81, height, width, steps, 16, "bf16", "Apache-2.0")
        WAN.rules(tiny(name).configs).check(e.num_frames, height, width)
    with pytest.raises(ValueError, match="77 or 81"):
        WAN.rules(tiny().configs).check(80, 480, 832)
    with pytest.raises(ValueError, match="nearest name|nearest"):
        WAN.tiny("wan2.1-t2v-13b")
    with pytest.raises(ValueError, match="1 to 1000"):
        WAN.sampler(tiny(), 1001, [])
