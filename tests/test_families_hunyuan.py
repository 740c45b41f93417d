"""HunyuanVideo against the stock pipelines, and what its reference does that is easily forgotten."""
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families import WORDS, company, float_answers, learns, ours, picture, saved, theirs
from PIL import Image

from vidgen.models import registry
from vidgen.models.family import family, load_parts, save_parts, stock
from vidgen.models.hunyuan import LENGTH, TRANSFORMERS, request

HY = family("hunyuan")
T2V, REPLACE, CONCAT = TRANSFORMERS


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny(name=T2V, **kw):
    return HY.tiny(name, words=WORDS, **kw)


def reference(pipe, prompt, *, name, frames=9, scale=3.0, negative="", **more):
    "The stock clip: where the model isn't distilled, true guidance, and the frames it drops asked for on top."
    if name == CONCAT:
        return theirs(pipe, prompt, frames=frames + 4, scale=1.0, true_cfg_scale=scale, negative=negative, **more)
    return theirs(pipe, prompt, frames=frames, scale=scale, negative=None, **more)


@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_equal_to_the_stock_pipeline(name, tmp_path):
    parts = saved(HY, name, tmp_path)
    image = picture() if parts.task == "i2v" else None
    a = ours(parts, "a red circle moving right", image=image)
    b = reference(DiffusionPipeline.from_pretrained(tmp_path), "a red circle moving right", name=name, image=image)
    assert a.shape == b.shape == (9, 3, 64, 96)
    assert (a - b).abs().max() < 1e-4 and b.std() > 0.01


@pytest.mark.parametrize("name", list(TRANSFORMERS))
@pytest.mark.parametrize("more", [dict(scale=1.0), dict(steps=1), dict(steps=10), dict(frames=1), dict(frames=21, size=(48, 64)), dict(seed=123)], ids=str)
def test_equal_to_the_stock_pipeline_in_every_setting(name, more):
    parts = tiny(name)
    more = more | ({"image": picture(*more.get("size", (64, 96))[::-1])} if parts.task == "i2v" else {})
    assert (ours(parts, "a red circle", **more) - reference(stock(parts), "a red circle", name=name, **more)).abs().max() < 1e-4


def test_a_negative_prompt_is_read_where_the_model_does_not_guide_itself():
    parts, image = tiny(CONCAT), picture()
    a, b = ours(parts, "a red circle", negative="a blue star", image=image), ours(parts, "a red circle", image=image)
    assert (a - reference(stock(parts), "a red circle", name=CONCAT, negative="a blue star", image=image)).abs().max() < 1e-4
    assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_comparison_can_fail(name):
    parts, image = tiny(name), None if name == T2V else picture()
    clip = reference(stock(parts), "a red circle", name=name, image=image)
    assert (ours(parts, "a red circle", seed=8, image=image) - clip).abs().max() > 1e-2
    assert (ours(parts, "a blue star", image=image) - clip).abs().max() > 2e-4
    assert (ours(parts, "a red circle", scale=6.0, image=image) - clip).abs().max() > 2e-4
    assert name == T2V or (ours(parts, "a red circle", image=picture(seed=1)) - clip).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_half_precision_equals_the_stock_pipeline(name, tmp_path):
    image = None if name == T2V else picture()
    parts = load_parts(HY, save_parts(tiny(name), tmp_path), precision="bf16")
    for scale, most, mean in ((1.0, 4e-3, 1e-3), (3.0, 0.1, 5e-3)):  # two answers from one pass are rounded otherwise than from two
        a = ours(parts, "a red circle", image=image, scale=scale)
        with float_answers(parts):
            b = reference(stock(parts), "a red circle", name=name, image=image, scale=scale)
        assert (a - b).abs().max() < most and (a - b).abs().mean() < mean


def test_a_user_gets_the_same_clip_and_hears_that_a_negative_prompt_is_not_read(tmp_path):
    save_parts(tiny(REPLACE), tmp_path / "mine")
    gen = registry.load(tmp_path / "mine")
    with pytest.warns(UserWarning, match="reads no negative prompt"):
        clip, = gen.generate("a red circle", picture(), seed=7, num_frames=9, num_inference_steps=3, negative_prompt="blurry")
    b = theirs(DiffusionPipeline.from_pretrained(tmp_path / "mine"), "a red circle", steps=3, scale=6.0, negative=None, image=picture())
    assert np.abs(clip.frames / 255 - b.permute(0, 2, 3, 1).numpy()).max() < 1.5 / 255
    assert (clip.made["family"], clip.made["guidance_scale"]) == ("hunyuan", 6.0)


@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_a_clip_does_not_depend_on_its_batch(name):
    assert company(tiny(name), frames=5) <= 1


@pytest.mark.parametrize("prompt", ["a red circle", "", "a red star " * 200])
def test_the_request_is_cut_away_and_the_rest_is_the_references(prompt):
    parts = tiny()
    embeds, pooled, mask = stock(parts).encode_prompt(prompt)
    text = HY.encode_prompt(parts, [prompt])
    assert torch.allclose(text.embeds_BLD, embeds, atol=1e-6) and torch.equal(text.more["mask_BL"], mask.float()) and torch.allclose(text.more["pooled_BD"], pooled, atol=1e-6)
    assert text.embeds_BLD.shape == (1, LENGTH, 32) and text.more["mask_BL"].sum() == min(text.tokens[0], LENGTH)
    assert bool(text.notes[0]) == (text.tokens[0] > LENGTH)


def test_the_tiny_tokenizer_cuts_the_requests_as_llama_does():
    for name, crop in ((T2V, 95), (REPLACE, 103)):
        parts = tiny(name)
        template, stands = request(parts.task)
        pieces = parts.tokenizer.convert_ids_to_tokens(parts.tokenizer(template.format("a red circle")).input_ids)
        assert stands == crop and pieces[crop:crop + 3] == ["a", " red", " circle"] and pieces[crop + 3] == "<|eot_id|>"
        assert ("<image>" in pieces) == (name == REPLACE) and (name == T2V or pieces[5] == "<image>")


@pytest.mark.parametrize("name, every", [(CONCAT, 2), (REPLACE, 4)])
@pytest.mark.parametrize("prompt", ["a red circle", "", "a red star " * 200])
def test_the_picture_is_read_with_the_prompt(name, every, prompt):
    parts, image = tiny(name), picture()
    embeds, pooled, mask = stock(parts).encode_prompt(image, prompt, image_embed_interleave=every)
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    text = HY.encode_prompt(parts, [prompt], x)
    assert torch.allclose(text.embeds_BLD, embeds, atol=1e-6) and torch.equal(text.more["mask_BL"], mask.float()) and text.embeds_BLD.shape[1] == mask.shape[1]
    assert torch.allclose(text.more["pooled_BD"], pooled, atol=1e-6)
    assert bool(text.notes[0]) == (prompt.count("star") > 1)
    black, _, _ = stock(parts).encode_prompt(Image.new("RGB", (96, 64)), prompt, image_embed_interleave=every)
    assert torch.allclose(HY.encode_prompt(parts, [prompt]).embeds_BLD, black, atol=1e-6) and not torch.allclose(black, embeds, atol=1e-4)


def test_padding_does_not_reach_the_answer_but_words_do():
    parts, z = tiny(), torch.randn(1, 3, 4, 8, 12)
    text = HY.encode_prompt(parts, ["a red circle"]).condition

    def answer(embeds):
        with torch.no_grad():
            return HY.predict(parts, z, 500.0, text | {"embeds_BLD": embeds}, {})

    plain, padding, word = answer(text["embeds_BLD"]), text["embeds_BLD"].clone(), text["embeds_BLD"].clone()
    padding[:, 5:] += 1
    word[:, 2] += 1
    assert torch.allclose(plain, answer(padding), atol=1e-6) and not torch.allclose(plain, answer(word), atol=1e-4)


def test_a_distilled_model_is_asked_once_and_told_a_thousand_times_the_scale():
    for name, sizes, told in ((T2V, [1], [6000.0]), (REPLACE, [1], [6000.0]), (CONCAT, [2], None)):
        parts, seen = tiny(name), []
        parts.transformer.register_forward_pre_hook(lambda m, a, k, seen=seen: seen.append((len(k["hidden_states"]), k["guidance"])), with_kwargs=True)
        ours(parts, "a red circle", steps=1, scale=6.0, image=None if name == T2V else picture())
        assert [n for n, _ in seen] == sizes and (seen[0][1] if told is None else seen[0][1].tolist()) == told


def test_the_first_frame_is_replaced_or_shown_beside():
    for name, channels in ((REPLACE, 4), (CONCAT, 9)):
        parts, seen = tiny(name), []
        parts.transformer.register_forward_pre_hook(lambda m, a, k, seen=seen: seen.append(k["hidden_states"]), with_kwargs=True)
        ours(parts, "a red circle", steps=3, scale=1.0, image=picture())
        assert all(z.shape[1] == channels for z in seen) and not torch.equal(seen[0][:, :4, 1:], seen[1][:, :4, 1:])
        if name == REPLACE:
            assert all(torch.equal(z[:, :, 0], seen[0][:, :, 0]) for z in seen)
        else:
            assert all((z[:, 8, 0] == 1).all() and (z[:, 4:, 1:] == 0).all() and torch.equal(z[:, 4:8, 0], seen[0][:, 4:8, 0]) for z in seen)


def test_training():
    for name in TRANSFORMERS:
        same, named, reached = learns(tiny(name), None if name == T2V else torch.rand(2, 3, 64, 96))
        assert same and reached == named and any("single_transformer_blocks" in n for n in named)


def test_names_sizes_and_rules():
    for name, task, scale in ((T2V, "t2v", 6.0), (REPLACE, "i2v", 6.0), (CONCAT, "i2v", 1.0)):
        e = registry.entries()[name]
        assert (e.task, e.num_frames, e.height, e.width, e.fps, e.precision, e.guidance_scale) == (task, 129, 720, 1280, 24, "bf16", scale) and "Hunyuan" in e.licence
        HY.rules(tiny(name).configs).check(e.num_frames, e.height, e.width)
    with pytest.raises(ValueError, match="125 or 129"):
        HY.rules(tiny().configs).check(126, 720, 1280)
    with pytest.raises(ValueError, match="nearest"):
        HY.tiny("hunyuan-video")
    assert HY.sampler(tiny(), 4, []).timesteps[1] == pytest.approx(1000 * 7 * 0.75 / (1 + 6 * 0.75))
