"""Checkpoints on disk, whole and broken; where they are looked for; plans that refuse early."""
import json
import math
import shutil
import struct
import time

import numpy as np
import pytest
import torch

from vidgen.errors import CorruptWeights, DoesNotFit, WeightsMissing
from vidgen.models import plan as plans
from vidgen.models import registry
from vidgen.models.cogvideox import TRANSFORMERS
from vidgen.models.family import family, load_parts, read_configs, save_parts, stock, unknown_words

COG = family("cogvideox")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.set_num_threads(1)
    return save_parts(COG.tiny("cogvideox-2b", words=["red", "circle"]), tmp_path_factory.mktemp("tiny") / "mine")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "mine")


@pytest.fixture(autouse=True)
def empty_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VIDGEN_MODEL_PATHS", str(tmp_path / "models"))


def same_weights(a, b):
    return all(torch.equal(x.float(), y.float()) for n in a.modules() for x, y in zip(a.modules()[n].state_dict().values(), b.modules()[n].state_dict().values(), strict=True))


@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_every_variant_saves_and_loads_as_plain_diffusers(name, tmp_path):
    from diffusers import DiffusionPipeline

    tiny = COG.tiny(name)
    back = load_parts(COG, save_parts(tiny, tmp_path / name))
    assert same_weights(tiny, back) and back.pipeline == tiny.pipeline
    plain = DiffusionPipeline.from_pretrained(tmp_path / name)
    assert type(plain).__name__ == tiny.pipeline and type(plain.scheduler) is type(back.scheduler)
    assert not list((tmp_path / name).rglob("*.bin"))
    assert read_configs(tmp_path / name)["transformer"]["in_channels"] == back.configs["transformer"]["in_channels"]


def test_tiny_depends_on_its_seed_alone():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    a, b, c = COG.tiny(seed=1), COG.tiny(seed=1), COG.tiny(seed=2)
    assert same_weights(a, b) and not same_weights(a, c) and torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("config_dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_text_encoder_has_the_dtype_of_the_rest(folder, config_dtype, precision):
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": config_dtype}))
    parts = load_parts(COG, folder, precision=precision)
    assert {p.dtype for m in parts.modules().values() for p in m.parameters()} == {parts.dtype}


def test_half_files_are_computed_in_float32_when_asked(folder):
    parts = load_parts(COG, folder)
    for module in parts.modules().values():
        module.half()
    save_parts(parts, folder)
    assert plans.weights(folder)["transformer"].dtypes == ("F16",)
    gen = registry.load(folder)
    assert gen.parts.precision == "fp32" and gen.parts.transformer.dtype == gen.parts.text_encoder.dtype == torch.float32
    assert gen.generate("a red circle", num_inference_steps=1)[0].made["precision"] == "fp32"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_asked_precision_is_used(folder, precision):
    gen = registry.load(folder, precision=precision)
    assert gen.parts.transformer.dtype == gen.parts.dtype and gen.plan.precision == precision and gen.plan.batch == 1
    assert gen.generate("a red circle", num_inference_steps=2)[0].frames.std() > 0
    with pytest.raises(ValueError, match="nearest: .*fp16"):
        registry.load(folder, precision="fp61")


# Finding


def test_a_name_is_found_in_model_paths_under_any_of_its_names(saved, tmp_path):
    for inside in ("cogvideox-2b", "CogVideoX-2b", "zai-org/CogVideoX-2b"):
        place = shutil.copytree(saved, tmp_path / "models" / inside)
        assert registry.find("cogvideox-2b") == registry.find("THUDM/CogVideoX-2b") == place
        shutil.rmtree(tmp_path / "models")


def test_a_name_is_found_when_model_paths_names_the_folder_itself(saved, tmp_path, monkeypatch):
    place = shutil.copytree(saved, tmp_path / "elsewhere" / "CogVideoX-2b")
    monkeypatch.setenv("VIDGEN_MODEL_PATHS", str(place))
    assert registry.find("cogvideox-2b") == place


def test_the_hub_cache_is_read_and_the_current_snapshot_wins(saved, tmp_path):
    base = tmp_path / "cache" / "models--THUDM--CogVideoX-2b"
    new, old = (shutil.copytree(saved, base / "snapshots" / commit) for commit in ("aaaa", "bbbb"))
    assert registry.find("cogvideox-2b") in (new, old)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("aaaa\n")
    assert registry.find("cogvideox-2b") == new
    gen = registry.load("cogvideox-2b", precision="fp32")
    assert gen.entry.num_frames == 49 and (gen.entry.height, gen.entry.width) == (480, 720)


def test_links_as_the_hub_makes_them_work(saved, tmp_path):
    base = tmp_path / "cache" / "models--zai-org--CogVideoX-2b"
    snapshot = base / "snapshots" / "cccc"
    for i, file in enumerate(p for p in saved.rglob("*") if p.is_file()):
        blob, link = base / "blobs" / str(i), snapshot / file.relative_to(saved)
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    registry.check(*registry.resolve("cogvideox-2b"))
    assert registry.load("cogvideox-2b", precision="fp32").generate("a red circle", num_frames=9, height=64, width=96, num_inference_steps=1)


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v"])
def test_absent_weights_say_file_places_and_command(name, tmp_path):
    with pytest.raises(WeightsMissing) as caught:
        registry.load(name)
    text, entry = str(caught.value), registry.entries()[name]
    assert "model_index.json" in text and f"hf download {entry.repo}" in text
    assert str(tmp_path / "models" / name) in text and str(tmp_path / "cache") in text
    assert isinstance(caught.value, FileNotFoundError)


def test_unknown_names_and_places():
    for word, near in {"shapes-t2": "shapes-t2v", "cogvideo-2b": "cogvideox-2b", "CogVideoX-5B": "cogvideox-5b"}.items():
        with pytest.raises(ValueError, match=f"nearest: .*{near}"):
            registry.load(word)
    with pytest.raises(WeightsMissing, match="no model folder"):
        registry.load("./here")


def test_defaults_of_the_named_models():
    named = registry.entries()
    for name, precision, guidance, scheduler in [("cogvideox-2b", "fp16", "constant", ""), ("cogvideox-5b", "bf16", "dynamic", "dpm"), ("cogvideox-5b-i2v", "bf16", "dynamic", "dpm")]:
        e = named[name]
        assert (e.num_frames, e.width, e.height, e.fps, e.guidance_scale, e.num_inference_steps) == (49, 720, 480, 8, 6.0, 50)
        assert (e.precision, e.guidance, e.scheduler) == (precision, guidance, scheduler)
    for name in ("shapes-t2v", "shapes-i2v"):
        e = named[name]
        assert (e.num_frames, e.width, e.height, e.fps, e.num_inference_steps, e.precision) == (17, 96, 64, 8, 25, "fp32")


def test_the_5b_entries_run_dpm_whatever_the_folder_says_and_keep_its_numbers(tmp_path):
    tiny = COG.tiny("cogvideox-5b", scheduler="ddim")
    tiny.components["scheduler"] = COG.make_scheduler("ddim", dict(tiny.scheduler.config) | {"snr_shift_scale": 1.25})
    save_parts(tiny, tmp_path / "models" / "cogvideox-5b")
    gen = registry.load("cogvideox-5b", precision="fp32")
    assert type(gen.parts.scheduler).__name__ == "CogVideoXDPMScheduler" and gen.parts.scheduler.config.snr_shift_scale == 1.25


def test_a_folder_of_a_published_size_gets_that_models_defaults():
    from vidgen.models.cogvideox import transformer_config

    vae = {"block_out_channels": (128, 256, 256, 512)}
    for name, task in [("cogvideox-2b", "t2v"), ("cogvideox-5b", "t2v"), ("cogvideox-5b-i2v", "i2v")]:
        named, found = registry.entries()[name], COG.describe({"vae": vae, "transformer": transformer_config(name)}, "tuned", task)
        for field in ("precision", "guidance", "scheduler", "num_frames", "height", "width", "num_inference_steps", "guidance_scale"):
            assert getattr(found, field) == getattr(named, field)
    newer = COG.describe({"vae": vae, "transformer": transformer_config("cogvideox1.5-5b") | {"num_attention_heads": 48, "attention_head_dim": 64}}, "new", "t2v")
    assert (newer.num_frames, newer.width, newer.height, newer.fps, newer.precision) == (81, 1360, 768, 16, "bf16")


def test_an_unnamed_folder_takes_its_defaults_from_its_configuration(folder):
    gen = registry.load(folder)
    e = gen.entry
    assert (e.name, e.task, e.num_frames, e.height, e.width) == ("mine", "t2v", 9, 64, 96)
    clip = gen.generate("a red circle", seed=7, num_inference_steps=3)[0]
    theirs = stock(gen.parts)("a red circle", num_frames=9, height=64, width=96, num_inference_steps=3, guidance_scale=e.guidance_scale, max_sequence_length=32,
                              generator=torch.Generator().manual_seed(7), output_type="np").frames[0]
    assert np.abs(clip.frames / 255 - theirs).max() < 1.5 / 255


def test_the_table_shows_what_is_here_and_what_is_not(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "models" / "my-finetune")
    (tmp_path / "models" / "other").mkdir()
    (tmp_path / "models" / "other" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    rows = {r["name"]: r for r in registry.models()}
    assert {"shapes-t2v", "shapes-i2v", "cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "my-finetune"} <= set(rows) and "other" not in rows
    assert "hf download" in rows["cogvideox-5b"]["where"] and rows["my-finetune"]["on disk"]
    assert registry.load("my-finetune").name == "my-finetune"
    assert "<td>" in registry.models()._repr_html_() and "my-finetune" in repr(registry.models())


# Broken folders


def files(folder):
    return [p for p in sorted(folder.rglob("*")) if p.is_file()]


def test_every_promised_file_is_missed(saved, tmp_path):
    entry = registry.local(saved)[0]
    for file, *_ in registry.promised(saved):
        broken, inside = shutil.copytree(saved, tmp_path / "broken"), file.relative_to(saved).as_posix()
        (broken / inside).unlink()
        with pytest.raises(WeightsMissing, match=inside):
            registry.check(entry, broken)
        shutil.rmtree(broken)
    assert len(registry.promised(saved)) == 9


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.999])
def test_a_cut_weights_file_is_named(folder, keep):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(CorruptWeights, match="transformer/diffusion_pytorch_model.safetensors.*[Ff]etch it again"):
        registry.load(folder)


@pytest.mark.parametrize("junk", [b"<html>404</html>" * 100, struct.pack("<Q", 2**63) + b"x" * 50, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": {}}'])
def test_something_else_in_place_of_weights_is_named(folder, junk):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(junk)
    with pytest.raises(CorruptWeights, match="vae/diffusion_pytorch_model.safetensors"):
        registry.load(folder)


def test_weights_that_lack_a_tensor_do_not_stay_random(folder):
    from safetensors.torch import load_file, save_file

    for part in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        file = folder / f"{part}.safetensors"
        whole = load_file(file)
        lost = next(k for k in whole if k.endswith(("proj_out.weight", "wi_0.weight")))
        save_file({k: v for k, v in whole.items() if k != lost}, file, metadata={"format": "pt"})
        with pytest.raises(CorruptWeights, match=lost):
            registry.load(folder)
        save_file(whole, file, metadata={"format": "pt"})
    assert registry.load(folder)


def test_a_tensor_of_another_shape_is_corrupt(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 4}))
    with pytest.raises(CorruptWeights):
        registry.load(folder)


def test_shards_are_counted(folder):
    parts = load_parts(COG, folder)
    parts.transformer.save_pretrained(folder / "transformer", max_shard_size="30KB")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    shards = sorted((folder / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1 and same_weights(registry.load(folder).parts, parts)
    shards[0].unlink()
    with pytest.raises(WeightsMissing, match=shards[0].name):
        registry.load(folder)


def test_pickles_are_refused(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(WeightsMissing, match="safetensors only"):
        registry.load(folder)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_broken_json_is_named(folder, file, text):
    (folder / file).write_text(text)
    with pytest.raises(CorruptWeights, match=file):
        registry.load(folder)


def test_other_pipelines_and_foreign_classes_are_refused(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ValueError, match="StableDiffusionPipeline.*CogVideoXPipeline"):
        registry.load(folder)
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["os", "system"]}))
    with pytest.raises(ValueError, match="os.system"):
        registry.load(folder)


def test_the_wrong_task_in_a_named_folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "models" / "cogvideox-5b-i2v")
    with pytest.raises(ValueError, match="i2v.*right folder"):
        registry.load("cogvideox-5b-i2v")


# Plans


def big_folder(saved, target, billions):
    "A checkpoint whose transformer file claims `billions` of bf16 weights: a hole in the file, no bytes on disk."
    folder = shutil.copytree(saved, target)
    side = int(billions * 1e9)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [side], "data_offsets": [0, 2 * side]}}).encode()
    with (folder / "transformer" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * side)
    return folder


def test_what_cannot_fit_is_refused_before_loading(saved, tmp_path, monkeypatch):
    big_folder(saved, tmp_path / "models" / "cogvideox-2b", 10)
    monkeypatch.setattr(plans, "free_memory", lambda device: 16 * plans.GIB)
    start = time.perf_counter()
    with pytest.raises(DoesNotFit, match=r"18\.\d GiB for weights in fp16.*16\.0 GiB free.*force=True.*--force") as caught:
        registry.load("cogvideox-2b", device="cpu")
    assert time.perf_counter() - start < 5
    assert caught.value.plan.model == "cogvideox-2b" and not caught.value.plan.fits
    entry, folder = registry.resolve("cogvideox-2b")
    assert registry.plan_for(entry, folder, device="cpu", precision="fp16", force=True).forced


def test_force_loads_all_the_same(folder, monkeypatch):
    monkeypatch.setattr(plans, "free_memory", lambda device: 2**20)
    with pytest.raises(DoesNotFit):
        registry.load(folder)
    made = registry.load(folder, force=True).generate("a red circle", num_inference_steps=1)[0].made
    assert made["plan"]["forced"] and not made["plan"]["fits"]


def test_a_request_too_large_for_the_memory_left(folder, monkeypatch):
    gen = registry.load(folder)
    monkeypatch.setattr(plans, "free_memory", lambda device: 100 * 2**20)
    with pytest.raises(DoesNotFit, match="fewer frames or a smaller size"):
        gen.generate("a red circle", height=1024, width=1024)
    assert gen.generate("a red circle", num_inference_steps=1)


def test_files_beside_the_ones_that_are_read_do_not_count(folder):
    before = plans.weights(folder)
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert plans.weights(folder) == before
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsMissing, match=r"there: .*fp16\.safetensors"):
        registry.load(folder)


def test_batches_shrink_with_memory():
    assert [plans.clips_at_once("fp32", 1.0, room) for room in (0.5, 3, 5, 100)] == [1, 2, 4, plans.MOST_AT_ONCE]
    assert plans.clips_at_once("bf16", 0.1, 100) == 1


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="no CUDA device"):
        plans.pick_device("cuda")
    assert plans.pick_device("auto") == "cpu"


def test_estimated_sizes_of_the_published_models():
    from diffusers import CogVideoXTransformer3DModel

    from vidgen.models.cogvideox import transformer_config

    with torch.device("meta"):
        count = {n: sum(p.numel() for p in CogVideoXTransformer3DModel(**transformer_config(n)).parameters()) for n in ("cogvideox-2b", "cogvideox-5b-i2v", "cogvideox1.5-5b")}
    assert math.isclose(count["cogvideox-2b"], 1.69e9, rel_tol=0.02) and math.isclose(count["cogvideox-5b-i2v"], 5.6e9, rel_tol=0.02)


# Text and training


def test_large_vocabularies_know_no_unknown_words():
    class Large:
        def get_vocab(self):
            return {"▁red": 1}

        def __len__(self):
            return 32_100

    assert unknown_words(Large(), "whatever zebra") == []


def test_capitals_are_read_in_lower_case_where_the_vocabulary_has_none():
    from transformers import T5Tokenizer

    parts = COG.tiny()
    letters = [(c, -6.0) for c in "abcdefghijklmnopqrstuvwxyz"]
    parts.components["tokenizer"] = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters, ("▁red", -3.0)], extra_ids=0)
    large, small = COG.encode_prompt(parts, ["RED"]), COG.encode_prompt(parts, ["red"])
    assert torch.equal(large.embeds_BLD, small.embeds_BLD) and large.tokens == (2,) and large.notes == ((),)
    assert not torch.equal(*(COG.encode_prompt(COG.tiny(), [p]).embeds_BLD for p in ("RED", "red")))


def test_training_target_is_what_the_sampler_undoes():
    parts = COG.tiny("cogvideox-5b", scheduler="ddim")
    z, noise, t = torch.randn(2, 3, 4, 8, 12), torch.randn(2, 3, 4, 8, 12), torch.tensor([300, 300])
    noisy, v = COG.target(parts, z, noise, t)
    sampler = COG.sampler(parts, 1000, [])
    index = sampler.timesteps.tolist().index(300)
    for i in range(index, 1000):  # with the true velocity at every step, noise is undone exactly
        now = COG.target(parts, z, noise, sampler.timesteps[i].expand(2))[1]
        noisy = sampler.step(i, now, noisy)
    assert torch.allclose(noisy, z, atol=2e-2)


def test_training_loss_learns_and_repeats():
    parts = COG.tiny("cogvideox-5b-i2v")
    parts.transformer.requires_grad_(True)
    z, image = torch.randn(2, 3, 4, 8, 12), torch.randn(2, 1, 4, 8, 12)
    text = COG.encode_prompt(parts, ["a", "b"]).embeds_BLD
    losses = [COG.training_loss(parts, z, text, generator=torch.Generator().manual_seed(0), image_B1CHW=image) for _ in range(2)]
    assert torch.equal(losses[0], losses[1])
    losses[0].backward()
    assert all(p.grad is not None for n, p in parts.transformer.named_parameters() if n.endswith(COG.adapter_targets))
