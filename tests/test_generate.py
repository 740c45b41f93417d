"""The denoising loop against the stock pipelines, clips that own their seed, cancellation, and everything a person can get wrong."""
import gc
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from vidgen.clip import Clip
from vidgen.errors import Canceled
from vidgen.generate import baseline
from vidgen.generate.generator import Generator, first_frame, peak_gib
from vidgen.generate.guidance import SCHEDULES, dynamic, dynamic_diffusers, schedule
from vidgen.models import registry
from vidgen.models.family import family, stock
from vidgen.models.plan import Plan
from vidgen.progress import Cancel

COG = family("cogvideox")
WORDS = "a red blue circle star moving right left on white black background".split()
VARIANTS = {"cogvideox-2b": 17, "cogvideox-5b": 17, "cogvideox-5b-i2v": 9, "cogvideox1.5-5b": 17, "cogvideox1.5-5b-i2v": 33}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny(name="cogvideox-2b", scheduler=""):
    return COG.tiny(name, words=WORDS, scheduler=scheduler)


def generator(name="cogvideox-2b", batch=1, **kw):
    parts = tiny(name, **kw)
    return Generator(parts, COG.describe(parts.configs, name, parts.task), Plan(name, "cpu", "fp32", 0.1, 0.1, 8.0, batch))


def picture(width=96, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ours(parts, prompt, *, seed=7, frames=17, steps=5, scale=3.0, guidance="constant", negative="", image=None):
    x = None if image is None else first_frame(image, 96, 64)[0][None]
    batch = baseline.Batch((prompt,), (negative,), (seed,), frames, 64, 96, steps, schedule(guidance, scale), x)
    return (baseline.run(parts, batch, baseline.Watch())[0][0].permute(1, 0, 2, 3) / 2 + 0.5).clamp(0, 1)


def theirs(parts, prompt, *, seed=7, frames=17, steps=5, scale=3.0, dynamic=False, negative="", image=None):
    more = {} if image is None else {"image": image}
    return stock(parts)(prompt=prompt, negative_prompt=negative, num_frames=frames, height=64, width=96, num_inference_steps=steps, guidance_scale=scale,
                        use_dynamic_cfg=dynamic, generator=torch.Generator().manual_seed(seed), output_type="pt",
                        max_sequence_length=parts.transformer.config.max_text_seq_length, **more).frames[0]


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_equal_to_the_stock_pipeline(name, scheduler):
    parts, frames = tiny(name, scheduler), VARIANTS[name]
    image = picture() if parts.task == "i2v" else None
    a = ours(parts, "a red circle moving right", frames=frames, image=image)
    b = theirs(parts, "a red circle moving right", frames=frames, image=image)
    assert a.shape == b.shape == (frames, 3, 64, 96)
    assert (a - b).abs().max() < 1e-4
    assert b.std() > 0.01


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("more", [dict(scale=1.0), dict(negative="a blue star"), dict(steps=1), dict(steps=25), dict(frames=1), dict(seed=123)], ids=str)
def test_equal_to_the_stock_pipeline_in_every_setting(scheduler, more):
    parts = tiny("cogvideox-5b", scheduler)
    assert (ours(parts, "a red circle", **more) - theirs(parts, "a red circle", **more)).abs().max() < 1e-4


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_the_stock_dynamic_guidance_is_there_to_compare_with(scheduler):
    parts = tiny("cogvideox-5b", scheduler)
    stock_frames = theirs(parts, "a red circle", dynamic=True)
    assert (ours(parts, "a red circle", guidance="dynamic-diffusers") - stock_frames).abs().max() < 1e-4
    assert (ours(parts, "a red circle", guidance="dynamic") - stock_frames).abs().max() > 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_equals_the_stock_pipeline(precision, tmp_path):
    from vidgen.models.family import load_parts, save_parts

    parts = load_parts(COG, save_parts(tiny("cogvideox-5b"), tmp_path), precision=precision)
    a, b = ours(parts, "a red circle"), theirs(parts, "a red circle").float()
    assert (a - b).abs().max() < 2e-2 and torch.isfinite(a).all()


def test_comparison_can_fail():
    parts = tiny("cogvideox-5b", "dpm")
    assert (ours(parts, "a red circle", seed=8) - theirs(parts, "a red circle", seed=7)).abs().max() > 1e-2
    assert (ours(parts, "a blue star") - theirs(parts, "a red circle")).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["shapes-t2v", "shapes-i2v"])
def test_shipped_models_equal_the_stock_pipeline(name):
    from diffusers import DiffusionPipeline

    gen = registry.load(name)
    pipe = DiffusionPipeline.from_pretrained(gen.folder)  # as anyone would
    pipe.set_progress_bar_config(disable=True)
    prompt, image = "a red circle moving right on a white background", picture() if gen.parts.task == "i2v" else None
    clip = gen.generate(prompt, image, seed=7, num_inference_steps=5)[0]
    e, more = gen.entry, {} if image is None else {"image": image}
    b = pipe(prompt=prompt, num_frames=e.num_frames, height=e.height, width=e.width, num_inference_steps=5, guidance_scale=e.guidance_scale, output_type="np",
             generator=torch.Generator().manual_seed(7), max_sequence_length=gen.parts.transformer.config.max_text_seq_length, **more).frames[0]
    assert np.abs(clip.frames / 255 - b).max() < 1.5 / 255
    pair = gen.generate(["a blue star moving up on a black background", prompt], image, seed=[3, 7], num_inference_steps=5)
    assert np.abs(pair[1].frames.astype(int) - clip.frames).max() <= 1


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v"])
def test_a_clip_does_not_depend_on_its_batch(name):
    prompts = ["a red circle", "a blue star moving left", "a red star", "a blue circle", "a red circle moving right"]
    one, many = generator(name), generator(name, batch=3)
    images = [picture(seed=i) for i in range(5)] if one.parts.task == "i2v" else None
    together = many.generate(prompts, images, seed=[5, 9, 2, 9, 0], num_inference_steps=4, num_frames=9)
    for i, (prompt, seed) in enumerate(zip(prompts, [5, 9, 2, 9, 0])):
        alone = one.generate(prompt, images and images[i], seed=seed, num_inference_steps=4, num_frames=9)[0]
        assert np.abs(together[i].frames.astype(int) - alone.frames).max() <= 1
        assert (together[i].made["prompt"], together[i].made["seed"]) == (prompt, seed)


def test_seeds_count_up_and_repeat():
    gen = generator(batch=2)
    clips = gen.generate(["a red circle", "a blue star"], seed=3, num_videos_per_prompt=2, num_inference_steps=2)
    assert [c.made["seed"] for c in clips] == [3, 4, 5, 6]
    assert [c.made["prompt"] for c in clips] == ["a red circle"] * 2 + ["a blue star"] * 2
    assert clips[1].hash == gen.generate("a red circle", seed=4, num_inference_steps=2)[0].hash or \
        np.abs(clips[1].frames.astype(int) - gen.generate("a red circle", seed=4, num_inference_steps=2)[0].frames).max() <= 1
    assert clips[0].hash != clips[1].hash


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(1)
    gen = generator()
    before = torch.random.get_rng_state()
    a = gen.generate("a red circle", seed=1, num_inference_steps=2)[0]
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert gen.generate("a red circle", seed=1, num_inference_steps=2)[0].hash == a.hash


def count_passes(parts):
    sizes = []
    handle = parts.transformer.register_forward_pre_hook(lambda m, a, k: sizes.append(k["hidden_states"].shape[0]), with_kwargs=True)
    return sizes, handle


def test_guidance_asks_twice_only_where_it_matters():
    gen = generator()
    sizes, handle = count_passes(gen.parts)
    gen.generate("a red circle", guidance_scale=1.0, num_inference_steps=3)
    assert sizes == [1, 1, 1]
    gen.generate("a red circle", guidance_scale=3.0, num_inference_steps=2)
    assert sizes[3:] == [2, 2]
    gen.generate("a red circle", guidance_scale=3.0, guidance="dynamic", num_inference_steps=2)
    assert sizes[5:] == [1, 2]
    handle.remove()


def test_guidance_schedules():
    smooth, raw = dynamic(6.0), dynamic_diffusers(6.0)
    values = [smooth(i, 50, 0) for i in range(50)]
    assert values[0] == 1 and values == sorted(values) and 6 < values[-1] <= 7
    assert raw(0, 50, 999) == pytest.approx(1 + 6 * (1 - np.cos(np.pi * ((50 - 999) / 50) ** 5)) / 2)
    assert all(schedule(name, 1.0) for name in SCHEDULES)


def test_everything_that_made_a_clip_is_on_it(tmp_path):
    gen = generator("cogvideox-5b-i2v", scheduler="dpm")
    clip = gen.generate("a red circle", picture(200, 200), seed=11, negative_prompt="a blue star", num_inference_steps=2)[0]
    made = clip.made
    expected = {"prompt": "a red circle", "negative_prompt": "a blue star", "seed": 11, "model": "cogvideox-5b-i2v", "family": "cogvideox", "num_inference_steps": 2,
                "guidance": "constant", "scheduler": "CogVideoXDPMScheduler", "num_frames": 9, "height": 64, "width": 96, "fps": 8, "precision": "fp32", "device": "cpu"}
    assert {k: made[k] for k in expected} == expected
    assert {"load", "text", "image", "denoise", "per_step", "decode"} <= set(made["seconds"]) and all(s >= 0 for s in made["seconds"].values())
    assert made["peak_gib"]["host"] > 0.1 and made["frames_per_second"] > 0 and made["versions"]["torch"] and made["plan"]["fits"]
    assert len(made["weights"]) >= 16 and made["weights"] == gen.weights != generator("cogvideox-2b").weights
    assert "200x200" in made["image"] and gen.timings["denoise"] > 0
    saved = Clip.open(clip.save(tmp_path / "clip.mp4"))
    assert saved.made["weights"] == made["weights"] and saved.made["plan"] == made["plan"]


def test_progress_covers_every_stage_in_order():
    events = []
    generator(batch=2).generate(["a red circle"] * 5, num_inference_steps=3, progress=events.append)
    stages = list(dict.fromkeys(e.stage for e in events))
    assert stages == ["text", "denoise", "decode"]
    for stage in stages:
        done = [e.done for e in events if e.stage == stage]
        assert done == sorted(done) and done[-1] == [e for e in events if e.stage == stage][-1].total
    assert {e.total for e in events if e.stage == "denoise"} == {9}


def test_callback_sees_the_latents_of_each_step():
    seen = []
    generator().generate("a red circle", num_inference_steps=4, callback=lambda step, t, z: seen.append((step, t, tuple(z.shape))))
    assert [s for s, _, _ in seen] == [0, 1, 2, 3] and [t for _, t, _ in seen] == [999, 749, 499, 249]
    assert seen[0][2] == (1, 3, 4, 8, 12)


@pytest.mark.parametrize("batch", [1, 3])
def test_cancelling_stops_before_the_next_step_and_frees_memory(batch):
    gen, stop, seen = generator(batch=batch), Cancel(), []

    def watch(step, t, z):
        seen.append(weakref.ref(z))
        if step == 1:
            stop.cancel("enough")

    with pytest.raises(Canceled, match="enough") as caught:
        gen.generate(["a red circle"] * batch, num_inference_steps=10, cancel=stop, callback=watch)
    gc.collect()
    assert len(seen) == 2 and all(ref() is None for ref in seen)  # although `caught` still holds the traceback
    assert caught.value.__context__ is None
    gen.generate("a red circle", num_inference_steps=1)  # still usable


def test_cancelled_before_it_began():
    stop = Cancel()
    stop.cancel()
    seen = []
    with pytest.raises(Canceled):
        generator().generate("a red circle", cancel=stop, callback=lambda *a: seen.append(a))
    assert not seen


@pytest.mark.parametrize(("wrong", "says"), [
    (dict(prompt=""), "empty"), (dict(prompt="  \n"), "empty"), (dict(prompt=[]), "empty"), (dict(prompt=["a", ""]), "empty"),
    (dict(num_frames=20), "17 or 25"), (dict(num_frames=0), "1 or 9"), (dict(num_frames=50), "41 or 49"), (dict(num_frames=-1), "1 or 9"),
    (dict(width=100), "96 or 112"), (dict(height=0), "16"), (dict(height=-64), "16"), (dict(width=96.0), "whole"),
    (dict(num_inference_steps=0), "from 1 up"), (dict(num_inference_steps=-3), "from 1 up"), (dict(num_inference_steps=2.5), "from 1 up"), (dict(num_inference_steps=1001), "1000"),
    (dict(guidance="dynamc"), "nearest: dynamic"), (dict(guidance_scale=0.0), "from 1 up"), (dict(guidance_scale=float("nan")), "from 1 up"),
    (dict(seed=-1), "0 to"), (dict(seed=[1, 2]), "2 seeds for 1"), (dict(seed=1.5), "whole"), (dict(num_videos_per_prompt=0), "from 1 up"),
    (dict(negative_prompt=["a", "b"]), "2 entries"), (dict(image="x.png"), "cogvideox-5b-i2v"),
], ids=str)
def test_wrong_input_names_what_is_right(wrong, says):
    gen = generator()
    sizes, _ = count_passes(gen.parts)
    prompt = wrong.pop("prompt", "a red circle")
    with pytest.raises(ValueError, match=says):
        gen.generate(prompt, **wrong)
    assert not sizes  # refused before any work


def test_numbers_of_numpy_are_numbers():
    made = generator().generate("a red circle", seed=np.int64(3), num_frames=np.int32(9), height=np.int64(64), num_inference_steps=np.int64(1), guidance_scale=np.float32(2))[0].made
    assert (made["seed"], made["num_frames"], made["num_inference_steps"], made["guidance_scale"]) == (3, 9, 1, 2.0)


def test_text_must_be_text():
    for wrong in (7, None, [1], {"a": 1}):
        with pytest.raises(TypeError, match="text"):
            generator().generate(wrong)


def test_image_model_without_picture_and_sizes_it_never_learned():
    gen = generator("cogvideox-5b-i2v")
    with pytest.raises(ValueError, match="image=.*cogvideox-5b$"):
        gen.generate("a red circle")
    with pytest.raises(ValueError, match="learned positions.*9 frames"):
        gen.generate("a red circle", picture(), num_frames=17)
    with pytest.raises((ValueError, FileNotFoundError)):
        gen.generate("a red circle", "no/such/picture.png")


def test_unreadable_pictures_are_refused(tmp_path):
    gen = generator("cogvideox-5b-i2v")
    (tmp_path / "text.png").write_text("not a picture")
    picture().save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name in ("text.png", "half.png"):
        with pytest.raises(ValueError):
            gen.generate("a red circle", tmp_path / name)


def test_a_long_prompt_is_cut_and_said():
    prompt = ("a red circle moving right " * 400)[:10_000]
    with pytest.warns(UserWarning, match="tokens and the model reads 32"):
        clip = generator().generate(prompt, num_inference_steps=1)[0]
    said = next(w for w in clip.made["warnings"] if "tokens" in w)
    tokens = len(tiny().tokenizer(prompt, verbose=False).input_ids)
    assert str(tokens) in said and str(tokens - 32) in said and clip.made["prompt"] == prompt


def test_unknown_words_are_named_and_known_ones_are_not():
    gen = generator()
    with pytest.warns(UserWarning, match="zebra, galloping"):
        gen.generate("a red zebra galloping right.", num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gen.generate("a red circle, moving right.", num_inference_steps=1, num_frames=9)


def test_another_size_than_trained_is_noted():
    with pytest.warns(UserWarning, match="trained on 9 frames"):
        clip = generator().generate("a red circle", num_frames=17, num_inference_steps=1)[0]
    assert clip.num_frames == 17


@pytest.mark.parametrize(("size", "kept"), [((192, 128), None), ((300, 64), "96x64"), ((50, 400), "50x33"), ((97, 64), "96x64"), ((1, 1), None)])
def test_pictures_cover_the_frame(size, kept):
    x, note = first_frame(picture(*size), 96, 64)
    assert x.shape == (3, 64, 96) and -1 <= x.min() and x.max() <= 1 and f"{size[0]}x{size[1]}" in note
    assert (kept is None) == ("kept" not in note) and (kept is None or kept in note)


def test_the_middle_of_a_wide_picture_stays():
    wide = np.zeros((64, 288, 3), np.uint8)
    wide[:, 96:192] = (255, 0, 0)
    x, _ = first_frame(wide, 96, 64)
    assert (x[0] > 0.9).float().mean() > 0.97 and (x[1] < -0.9).all()


def test_counts_for_which_the_stock_schedule_breaks():
    parts = tiny()
    for steps in (61, 121, 998, 1000):
        times = COG.sampler(parts, steps, []).timesteps
        assert len(times) == steps and times.min() >= 0 and times[0] == 999


def test_settings_are_the_defaults(monkeypatch):
    monkeypatch.setenv("VIDGEN_GENERATE_SEED", "5")
    monkeypatch.setenv("VIDGEN_GENERATE_NUM_INFERENCE_STEPS", "2")
    monkeypatch.setenv("VIDGEN_GENERATE_GUIDANCE_SCALE", "2.5")
    made = generator().generate("a red circle")[0].made
    assert (made["seed"], made["num_inference_steps"], made["guidance_scale"]) == (5, 2, 2.5)
    assert generator().generate("a red circle", seed=1, num_inference_steps=1)[0].made["seed"] == 1


def test_frames_beyond_black_and_white_are_cut_and_nan_is_refused():
    gen = generator()
    decoder = gen.parts.vae.decoder.conv_out.conv
    decoder.weight.data *= 1000
    frames = gen.generate("a red circle", num_inference_steps=1)[0].frames
    assert (frames == 255).any() and (frames == 0).any()
    decoder.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        gen.generate("a red circle", num_inference_steps=1)


def test_one_frame_is_a_picture(tmp_path):
    clip = generator().generate("a red circle", num_frames=1, num_inference_steps=2)[0]
    assert clip.num_frames == 1
    assert Image.open(clip.save(tmp_path / "one.png")).size == (96, 64)


@pytest.mark.parametrize(("word", "right"), [("steps", "num_inference_steps"), ("frames", "num_frames"), ("cfg", "guidance_scale"), ("guidance_scal", "nearest: guidance_scale")])
def test_a_word_that_is_no_keyword_is_told_the_right_one(word, right):
    with pytest.raises(TypeError, match=right):
        generator().generate("a red circle", **{word: 8})


@pytest.mark.parametrize(("asked", "says"), [({"guidance": 6}, "the number is guidance_scale"), ({"num_inference_steps": 0}, "num_inference_steps=0"), ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
                                             ({"guidance_scale": float("nan")}, "guidance_scale=nan"), ({"guidance_scale": -1}, "guidance_scale=-1"), ({"guidance_scale": 0}, "guidance_scale=0")])
def test_zero_is_a_word_and_no_default(asked, says):
    with pytest.raises(ValueError, match=says):
        generator().generate("a red circle", **asked)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells a process the peak of what started it")
def test_a_child_has_a_peak_of_its_own():
    held = np.ones(2**27)  # 1 GiB
    del held
    child = subprocess.run([sys.executable, "-c", "from vidgen.generate.generator import peak_gib; print(peak_gib('cpu')['host'])"], capture_output=True, text=True, check=True)
    assert float(child.stdout) < peak_gib("cpu")["host"] - 0.2
