"""Cosmos 1.0 and 2 against the stock pipelines, and what their reference does that is easily forgotten."""
import diffusers
import numpy as np
import pytest
import torch
from families import WORDS, company, float_answers, learns, picture, saved

from vidgen.generate import baseline
from vidgen.generate.generator import first_frame
from vidgen.generate.guidance import schedule
from vidgen.models import registry
from vidgen.models.cosmos import TRANSFORMERS, PassThrough
from vidgen.models.family import family, load_parts, save_parts, stock

COSMOS = family("cosmos")
T2W, V2W, NEW, STILL = "cosmos-1-7b-text2world", "cosmos-1-7b-video2world", "cosmos-2-2b-video2world", "cosmos-2-2b-text2image"
KINDS = [T2W, V2W, NEW, STILL]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny(name=T2W, **kw):
    return COSMOS.tiny(name, words=WORDS, **kw)


def batch(parts, prompt="a red circle", *, seed=7, frames=9, steps=4, scale=3.0, negative="", image=None, size=(64, 96)):
    x = None if image is None else first_frame(image, size[1], size[0])[0][None]
    frames = 1 if parts.pipeline == "Cosmos2TextToImagePipeline" else frames
    return baseline.Batch((prompt,), (negative,), (seed,), frames, *size, steps, schedule("constant", scale), x)


def ours(parts, *args, **kw):
    "(latents [C, F, H, W], frames [F, 3, H, W] in [0, 1])."
    last = []
    x, _ = baseline.run(parts, batch(parts, *args, **kw), baseline.Watch(callback=lambda step, t, z: last.append(z)))
    return last[-1][0].transpose(0, 1), (x[0].permute(1, 0, 2, 3) / 2 + 0.5).clamp(0, 1)


def theirs(pipe, prompt="a red circle", *, seed=7, frames=9, steps=4, scale=3.0, negative="", image=None, size=(64, 96), output="latent"):
    "The same from a stock pipeline, one of the two at a time; frames are bytes that were rounded down."
    pipe.set_progress_bar_config(disable=True)
    more = {"image": image} if image else {}
    if type(pipe).__name__ != "Cosmos2TextToImagePipeline":
        more["num_frames"] = frames
    made = pipe(prompt=prompt, negative_prompt=negative, height=size[0], width=size[1], num_inference_steps=steps, guidance_scale=scale,
                generator=torch.Generator().manual_seed(seed), output_type=output, **more)
    return made.frames[0].float() if "num_frames" in more else made.images[0].float()[:, None] if output == "latent" else made.images


def apart(a, b):
    "Largest difference, in standard deviations."
    return ((a - b).abs().max() / b.std()).item()


@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_equal_to_the_stock_pipeline(name, tmp_path):
    parts = saved(COSMOS, name, tmp_path)
    pipe = getattr(diffusers, parts.pipeline).from_pretrained(tmp_path, safety_checker=PassThrough())
    image = picture() if parts.task == "i2v" else None
    z, x = ours(parts, image=image)
    assert apart(z, theirs(pipe, image=image)) < 1e-4
    frames = theirs(pipe, image=image, output="pt")
    assert x.shape == frames.shape and -1e-4 < (x - frames).min() and (x - frames).max() < 1 / 255 + 1e-4 and frames.std() > 0.01


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("more", [dict(scale=1.0), dict(negative="a blue star"), dict(steps=1), dict(steps=12), dict(frames=1), dict(frames=17, size=(48, 64)), dict(seed=123)], ids=str)
def test_equal_to_the_stock_pipeline_in_every_setting(name, more):
    parts = tiny(name)
    more = more | ({"image": picture(*more.get("size", (64, 96))[::-1])} if parts.task == "i2v" else {})
    assert apart(ours(parts, **more)[0], theirs(stock(parts), **more)) < 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_comparison_can_fail(name):
    parts = tiny(name)
    image = picture() if parts.task == "i2v" else None
    z = theirs(stock(parts), image=image)
    assert apart(ours(parts, seed=8, image=image)[0], z) > 1e-2 and apart(ours(parts, "a blue star", image=image)[0], z) > 1e-3
    assert apart(ours(parts, image=image, scale=4.0)[0], z) > 1e-3
    assert image is None or apart(ours(parts, image=picture(seed=1))[0], z) > 1e-2


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_equals_the_stock_pipeline(name, tmp_path):
    parts = load_parts(COSMOS, save_parts(tiny(name), tmp_path), precision="bf16")
    image = picture() if parts.task == "i2v" else None
    for scale in (1.0, 3.0):
        z = ours(parts, image=image, scale=scale)[0]
        with float_answers(parts):
            assert apart(z, theirs(stock(parts), image=image, scale=scale)) < (0.02 if scale == 1 else 0.2) and torch.isfinite(z).all()


def test_a_user_gets_the_same_clip_and_its_record_says_that_no_checker_ran(tmp_path):
    for name in (V2W, STILL):
        save_parts(tiny(name), tmp_path / name)
        gen = registry.load(tmp_path / name)
        image = picture() if gen.parts.task == "i2v" else None
        clip, = gen.generate("a red circle", image, seed=7, num_frames=9 if image else 1, num_inference_steps=3)
        pipe = getattr(diffusers, gen.parts.pipeline).from_pretrained(tmp_path / name, safety_checker=PassThrough())
        frames = theirs(pipe, steps=3, scale=7.0, image=image, output="pt").permute(0, 2, 3, 1).numpy()
        assert np.abs(clip.frames / 255 - frames).max() < 1.5 / 255
        assert clip.made["safety_checker"].startswith("off") and "NVIDIA" in clip.made["safety_checker"] and clip.made["guidance_scale"] == 7.0
    assert "safety_checker" not in family("wan").facts(None)


@pytest.mark.parametrize("name", KINDS)
def test_a_clip_does_not_depend_on_its_batch(name):
    assert company(tiny(name), frames=1 if name == STILL else 9) <= 1


def test_embeddings_beyond_the_prompt_are_zero_and_equal_to_the_reference():
    parts = tiny()
    for prompt in ("a red circle", "", "a red star " * 400):
        text = COSMOS.encode_prompt(parts, [prompt])
        assert torch.allclose(text.embeds_BLD, stock(parts)._get_t5_prompt_embeds(prompt), atol=1e-6) and (text.embeds_BLD[0, text.tokens[0]:] == 0).all()
    assert text.tokens[0] > 512 and "512" in text.notes[0][0]


def test_a_scale_is_added_to_the_prompts_answer():
    parts = tiny()
    assert COSMOS.guidance(parts, 7.0) == (8.0, None) and COSMOS.guidance(parts, 1.0) == (1.0, None)
    sizes = []
    parts.transformer.register_forward_pre_hook(lambda m, a, k: sizes.append(len(k["hidden_states"])), with_kwargs=True)
    ours(parts, scale=1.0, steps=2)
    ours(parts, scale=2.0, steps=2)
    assert sizes == [1, 1, 2, 2]


@pytest.mark.parametrize("name, fps", [(T2W, 30), (V2W, 30), (NEW, 16), (STILL, None)])
def test_what_the_transformer_is_told(name, fps):
    parts, seen = tiny(name), []
    parts.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    ours(parts, image=picture() if parts.task == "i2v" else None, steps=2, scale=1.0)
    told = seen[0]
    assert told.get("fps") == fps and told["padding_mask"].shape == (1, 1, 64, 96) and not told["padding_mask"].any()
    if parts.task == "i2v":
        assert (told["condition_mask"][:, :, 0] == 1).all() and not told["condition_mask"][:, :, 1:].any()
    if name in (T2W, V2W):
        assert told["timestep"].shape == (1,) and told["timestep"][0] == pytest.approx(0.25 * np.log(80))
    if name == NEW:
        assert told["timestep"].shape == (1, 1, 3, 1, 1) and told["timestep"][0, 0, 0] == pytest.approx(1e-4, rel=1e-3) and told["timestep"][0, 0, 1] == pytest.approx(80 / 81)


def test_the_given_frame_is_shown_with_fresh_noise_in_the_first_generation_and_clean_in_the_second():
    for name, fresh in ((V2W, True), (NEW, False)):
        parts, seen = tiny(name), []
        parts.transformer.register_forward_pre_hook(lambda m, a, k, seen=seen: seen.append(k["hidden_states"][:, :, 0]), with_kwargs=True)
        ours(parts, image=picture(), steps=2)
        assert torch.equal(*seen[0]) != fresh and torch.equal(seen[0][1], seen[1][1]) != fresh
        assert apart(seen[0], seen[1]) < 0.05


@pytest.mark.parametrize("name, follows", [(V2W, "grey"), (NEW, "the frame")])
def test_a_given_frame_is_encoded_as_the_beginning_of_a_whole_clip(name, follows, monkeypatch):
    parts, seen, encode = tiny(name), [], type(tiny(name).vae).encode
    monkeypatch.setattr(type(parts.vae), "encode", lambda vae, x, *a, **k: seen.append(x) or encode(vae, x, *a, **k))
    ours(parts, image=picture(), steps=1)
    theirs(stock(parts), image=picture(), steps=1)
    assert torch.equal(*seen) and seen[0].shape == (1, 3, 9, 64, 96)
    assert (not seen[0][:, :, 1:].any()) if follows == "grey" else torch.equal(seen[0][:, :, 0], seen[0][:, :, 8])


def test_spread_differs_from_frame_to_frame_in_the_first_generation():
    parts, z = tiny(), torch.randn(1, 4, 4, 8, 12)
    x = COSMOS.decode(parts, z, 25)
    raw = parts.vae.encode(x).latent_dist.mode().transpose(1, 2)
    mean, std = (torch.tensor(v).view(1, 4, 4, 1, 1).transpose(1, 2) for v in (parts.vae.config.latents_mean, parts.vae.config.latents_std))
    assert torch.allclose(COSMOS.encode_clip(parts, x), (raw - mean) * 0.5 / std, atol=1e-5)


def test_the_true_clip_undoes_the_noise():
    for name in (T2W, NEW):
        parts, z = tiny(name), torch.randn(1, 3, 4, 8, 12)
        walk, noisy = COSMOS.sampler(parts, 12, []), z + 80 * torch.randn(1, 3, 4, 8, 12)
        for i in range(12):
            noisy = walk.step(i, z, noisy)
        assert torch.allclose(noisy, z, atol=0.02) and walk.init_scale == 80


def test_the_weighted_loss_is_the_plain_error_of_the_network():
    for name in (T2W, NEW):
        parts, z, answers = tiny(name), torch.randn(2, 3, 4, 8, 12), []
        parts.transformer.register_forward_hook(lambda m, a, out, answers=answers: answers.append(out[0].transpose(1, 2)))
        given = COSMOS.encode_image(parts, torch.rand(2, 3, 64, 96), [torch.Generator()] * 2, 9) if name == NEW else None
        loss = COSMOS.training_loss(parts, z, COSMOS.encode_prompt(parts, ["a", "b"]).condition, generator=torch.Generator().manual_seed(3), image_B1CHW=given)
        g = torch.Generator().manual_seed(3)
        sigma, noise = torch.randn(2, generator=g).exp().view(2, 1, 1, 1, 1), torch.randn(z.shape, generator=g)
        t = sigma / (1 + sigma)
        root = (sigma**2 + 0.25) ** 0.5
        wanted = (noise - z) if name == NEW else (sigma / root * z - 0.25 / root * noise) / 0.5  # what the wrapped network must say
        wanted = ((1 - t) * (z + sigma * noise) - z) / t if name == NEW else wanted
        first = int(name == NEW)
        assert loss.item() == pytest.approx(((answers[0] - wanted)[:, first:] ** 2).mean().item(), rel=1e-3)


def test_training():
    for name in KINDS:
        image = torch.rand(2, 3, 64, 96) if name in (V2W, NEW) else None
        same, named, reached = learns(tiny(name), image, frames=1 if name == STILL else 9)
        assert same and len(named) == 2 * 8 and reached == named


def test_names_sizes_and_rules():
    named = registry.entries()
    for name, (frames, height, width, steps) in {T2W: (121, 704, 1280, 36), V2W: (121, 704, 1280, 36), NEW: (93, 704, 1280, 35), STILL: (1, 768, 1360, 35)}.items():
        e = named[name]
        assert (e.num_frames, e.height, e.width, e.num_inference_steps, e.guidance_scale, e.precision) == (frames, height, width, steps, 7.0, "bf16") and "NVIDIA" in e.licence
    assert {n for n in named if n.startswith("cosmos")} == set(TRANSFORMERS)
    real = tiny().configs
    real["vae"] |= {"latents_mean": [0.0] * 256, "latent_channels": 16}
    COSMOS.rules(real).check(121, 704, 1280)
    COSMOS.rules(tiny(NEW).configs).check(93, 704, 1280)
    with pytest.raises(ValueError, match="113 or 121"):
        COSMOS.rules(real).check(120, 704, 1280)
    with pytest.raises(ValueError, match="all: 1$"):
        COSMOS.rules(tiny(STILL).configs).check(5, 768, 1360)
    with pytest.raises(ValueError, match="nearest"):
        COSMOS.tiny("cosmos-1-7b")
