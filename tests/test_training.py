"""Training end to end: recipes, formulas, adapters, real kills, two processes, and what is refused."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from families import generator
from safetensors.torch import load_file

import vidgen
from vidgen import runs
from vidgen.data.manifest import Manifest, Sample
from vidgen.errors import CorruptWeights
from vidgen.models.family import family, stock
from vidgen.train import adapters, config, lora, trainer, validate
from vidgen.train import objective as ob
from vidgen.train.config import Recipe
from vidgen.train.loop import Shelf, TrainConfig, fit

TINY = dict(data="world:12", held="world:4/held", steps=6, batch=2, rank=2, latents="mean", save_every=2, log_every=1, validate_every=3, prompts=0, noise_levels=2, warmup=2, seed=3)


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


# recipes

def test_unknown_key_names_the_nearest(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("data: world:8\nlearning_rat: 1e-3\n")
    with pytest.raises(ValueError, match="a.yaml.*learning_rat"):
        config.read_recipe(file)
    file.write_text("data: world:8\nbatch_size: 8\n")
    with pytest.raises(ValueError, match="'batch_size'; here it is called batch"):
        config.read_recipe(file)
    assert set(config.ELSEWHERE.values()) <= set(Recipe(data="world:8").to_dict())
    file.write_text("data: world:8\nrnak: 8\n")
    with pytest.raises(ValueError, match="nearest: rank"):
        config.read_recipe(file)


@pytest.mark.parametrize("wrong, said", [(dict(rank=0), "at least 1"), (dict(lr=-1.0), "above 0"), (dict(caption_dropout=2.0), "0 to 1"), (dict(method="lorra"), "nearest: lora"),
                                         (dict(freeze="patch_embed.*"), "targets"), (dict(steps=0), "at least 1"), (dict(image_noise=-0.1), "image_noise is at least 0, not -0.1"), (dict(shift=-1.0), "shift is at least 0"),
                                         (dict(weight_decay=-0.01), "weight_decay is at least 0"), (dict(lr=float("inf")), "lr is a finite number, above 0, not inf"), (dict(shift=float("inf")), "shift is a finite number, at least 0"), (dict(lr=float("nan")), "lr is above 0, not nan")])
def test_wrong_values_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Recipe(data="world:8", **wrong)


@pytest.mark.parametrize("wrong", [dict(rank="eight"), dict(rank=2.5), dict(lr="fast"), dict(steps=True), dict(model=3)])
def test_wrong_types_are_refused(wrong):
    with pytest.raises(TypeError, match=next(iter(wrong))):
        Recipe(data="world:8", **wrong)


def test_set_wins_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("data: world:8\nlr: 1e-3\ntargets: [attn1.to_q]\n")
    r = config.read_recipe(tmp_path / "a.yaml", config.assignments(["lr=5e-4", "freeze="]))
    assert r.lr == 5e-4 and r.targets == ("attn1.to_q",) and r.freeze == ()
    with pytest.raises(ValueError, match="has no value"):
        config.assignments(["lr"])


def test_differences_name_what_moves_weights_only():
    assert config.differences(Recipe(data="a"), Recipe(data="a", lr=0.5, log_every=3)) == ["lr 0.001 -> 0.5"]


# objectives against their formulas

def case(name, count=3):
    parts = family(name).tiny()
    shape = parts.family.latent_shape(parts, 9, 64, 96)
    g = torch.Generator().manual_seed(0)
    return parts, torch.randn(count, *shape, generator=g), torch.randn(count, *shape, generator=g), parts.family.encode_prompt(parts, ["a red circle"] * count).condition


@torch.no_grad()
def test_v_mse_is_its_formula():
    parts, z, noise, text = case("cogvideox")
    how, t = ob.objective(parts), torch.tensor([10, 500, 998])
    kept = parts.scheduler.alphas_cumprod[t].float().view(-1, 1, 1, 1, 1)
    noisy, wanted = kept.sqrt() * z + (1 - kept).sqrt() * noise, kept.sqrt() * noise - (1 - kept).sqrt() * z
    expected = ((parts.family.predict(parts, noisy, t, text, parts.family.extras(parts, z.shape[1:], None)) - wanted) ** 2).flatten(1).mean(1)
    assert torch.allclose(ob.error(parts, how, z, noise, t, text), expected, rtol=1e-4)
    snr = (kept / (1 - kept)).flatten()
    assert torch.allclose(ob.weights(parts, ob.objective(parts, weighting="min_snr", gamma=5.0), t), snr.clamp(max=5) / (snr + 1), rtol=1e-4)
    assert torch.equal(ob.weights(parts, how, t), torch.ones(3))


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan", "ltx", "hunyuan"])
def test_flow_match_is_its_formula(name):
    parts, z, noise, text = case(name, 2)
    how = ob.objective(parts, shift=3.0)
    u = torch.tensor([0.2, 0.7])
    t = ob.levels(parts, how, u, tuple(z.shape[1:]))
    sigma = (3 * u / (1 + 2 * u)).view(-1, 1, 1, 1, 1)
    assert torch.allclose(t, 1000 * sigma.flatten())
    answer = parts.family.predict(parts, (1 - sigma) * z + sigma * noise, t, text, parts.family.extras(parts, tuple(z.shape[1:]), None))
    assert torch.allclose(ob.error(parts, how, z, noise, t, text), ((answer - (noise - z)) ** 2).flatten(1).mean(1), rtol=1e-3)
    snr = ((1 - sigma) / sigma).flatten() ** 2
    assert torch.allclose(ob.weights(parts, ob.objective(parts, weighting="min_snr"), t), snr.clamp(max=5) * sigma.flatten() ** 2, rtol=1e-4)


@torch.no_grad()
def test_edm_is_its_formula():
    parts, z, noise, text = case("cosmos", 2)
    how, sigma = ob.objective(parts), torch.tensor([0.3, 2.0])
    s, data = sigma.view(-1, 1, 1, 1, 1), parts.scheduler.config.sigma_data
    clean = parts.family.predict(parts, z + s * noise, sigma, text, parts.family.extras(parts, tuple(z.shape[1:]), None))
    weight = (s**2 + data**2) / (s * data) ** 2  # Karras et al. 2022, table 1
    assert torch.allclose(ob.error(parts, how, z, noise, sigma, text), (weight * (clean - z) ** 2).flatten(1).mean(1), rtol=1e-3)
    assert torch.allclose(ob.levels(parts, how, torch.tensor([0.5]), tuple(z.shape[1:])), torch.ones(1), atol=1e-5)


def test_levels_are_drawn_as_they_should():
    parts = family("cogvideox").tiny()
    u = ob.drawn(ob.objective(parts, timesteps="logit_normal"), seeds(*range(4000)))
    assert abs(torch.logit(u).mean()) < 0.05 and abs(torch.logit(u).std() - 1) < 0.05
    u = ob.drawn(ob.objective(parts), seeds(*range(4000)))
    assert abs(u.mean() - 0.5) < 0.02 and abs(u.std() - 12**-0.5) < 0.02
    assert ob.levels(parts, ob.objective(parts), torch.tensor([0.0, 0.99999]), (1, 1, 1, 1)).tolist() == [0, 999]


def test_another_familys_objective_is_refused():
    with pytest.raises(ValueError, match="v_mse, not flow_match"):
        ob.objective(family("cogvideox").tiny(), "flow_match")


def test_held_loss_is_the_same_twice_and_in_any_batches():
    parts, z, _, text = case("cogvideox")
    how = ob.objective(parts)
    whole = ob.held_loss(parts, how, [(0, z, text, None)], count=2)
    parts_of_it = ob.held_loss(parts, how, [(i, z[i:i + 1], text[i:i + 1], None) for i in range(3)], count=2)
    assert list(whole) == ["0.25", "0.75", "mean"] and whole == pytest.approx(parts_of_it, rel=1e-4)


def test_captions_are_left_out_by_share():
    which = ob.left_out(0.25, seeds(*range(2000)))
    assert abs(which.float().mean() - 0.25) < 0.03
    text = {"embeds_BLD": torch.ones(2, 3, 4), "mask": torch.ones(2, 3)}
    out = ob.without(text, {"embeds_BLD": torch.zeros(1, 3, 4), "mask": torch.zeros(1, 3)}, torch.tensor([True, False]))
    assert out["embeds_BLD"][0].sum() == 0 and out["mask"][1].sum() == 3


# adapters

def test_what_an_adapter_trains():
    parts = family("cogvideox").tiny()
    before = {n: p.clone() for n, p in parts.transformer.named_parameters()}
    lora.add(parts, rank=2, seed=1)
    assert 0 < lora.trainable(parts.transformer)[2] < 0.1
    assert all("lora_" in n for n, p in parts.transformer.named_parameters() if p.requires_grad)
    assert all(torch.equal(before[n.replace(".base_layer", "")], p) for n, p in parts.transformer.named_parameters() if "lora_" not in n)


def test_shapes_lora_is_under_ten_per_cent():
    parts = vidgen.load("shapes-t2v").parts
    lora.add(parts, rank=16)
    assert lora.trainable(parts.transformer)[2] < 0.1


@pytest.mark.parametrize("name", ["cogvideox", "wan", "ltx", "hunyuan", "cosmos"])
def test_every_family_has_its_targets(name):
    parts = family(name).tiny()
    state = torch.get_rng_state()
    mine = lora.add(parts, rank=2)
    assert mine and torch.equal(state, torch.get_rng_state())
    parts, z, noise, text = case(name, 1)
    lora.add(parts, rank=2)
    ob.losses(parts, ob.objective(parts), z, text, generators=seeds(1)).mean().backward()
    assert all(p.grad is not None for p in parts.transformer.parameters() if p.requires_grad)


def test_impossible_adapters_are_refused():
    parts = family("cogvideox").tiny()
    with pytest.raises(ValueError, match="nearest: attn1.to_q"):
        lora.add(parts, targets=("attn1.to_qq",))
    with pytest.raises(ValueError, match="rank 4000 is larger than"):
        lora.add(parts, rank=4000)
    with pytest.raises(ValueError, match="no weight is called 'patch_embd"):
        lora.learn_all(parts, ("patch_embd.*",))
    with pytest.raises(ValueError, match="every weight is frozen"):
        lora.learn_all(parts, ("*",))


def test_frozen_patterns_stay():
    parts = family("cogvideox").tiny()
    frozen = lora.learn_all(parts, ("patch_embed.*",))
    assert frozen and all(n.startswith("patch_embed.") for n in frozen)


class Attentions(torch.utils._python_dispatch.TorchDispatchMode):
    "Counts attentions on the way there."
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_scaled_dot_product" in str(func) and "backward" not in str(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("how, attentions", [("full", 2.0), ("selective", 1.0), ("alternate", 1.5)])
def test_checkpointing_changes_no_gradient(how, attentions):
    "And how many attentions are computed, as a multiple of those of one way."
    grads, counts = [], []
    for kind in ("none", how):
        parts, z, noise, text = case("cogvideox", 1)
        mine = lora.add(parts, rank=2, seed=1)
        lora.checkpoint(parts, kind)
        with Attentions() as seen:
            ob.losses(parts, ob.objective(parts), z, text, generators=seeds(1)).mean().backward()
        grads.append([p.grad for p in mine])
        counts.append(seen.count)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads)) and counts[1] == attentions * counts[0]


def test_checkpointing_computes_attention_again_in_its_own_precision():
    "On a CPU attention stays in float32 inside bfloat16, on the way back too."
    from vidgen.train.trainer import arithmetic

    grads = []
    for kind in ("none", "full", "selective"):
        parts, z, noise, text = case("cogvideox", 1)
        mine = lora.add(parts, rank=2, seed=1)
        lora.checkpoint(parts, kind)
        with arithmetic("cpu", "bf16"):
            loss = ob.losses(parts, ob.objective(parts), z, text, generators=seeds(1)).mean()
        loss.backward()
        grads.append([p.grad for p in mine])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads))


def random_adapter(of="cogvideox", alpha=4.0, rank=2, seed=0):
    gen = generator(family(of).tiny())
    g = torch.Generator().manual_seed(seed)
    for p in lora.add(gen.parts, rank=rank, alpha=alpha, name="mine"):
        p.data = torch.randn(p.shape, generator=g)
    return gen


@pytest.mark.parametrize("of", ["cogvideox", "wan", "ltx"])
def test_round_trip_through_diffusers_is_exact(tmp_path, of):
    gen = random_adapter(of)
    saved = adapters.save_adapter(gen, tmp_path, name="mine", data_hash="d", licence="MIT")
    plain = family(of).tiny()
    stock(plain).load_lora_weights(tmp_path, adapter_name="theirs", local_files_only=True)
    theirs = generator(plain)
    a, b = adapters.tensors(gen, "mine"), adapters.tensors(theirs, "theirs")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert plain.transformer.peft_config["theirs"].lora_alpha == 4
    assert (saved.rank, saved.data_hash, saved.licence, set(saved.alphas.values()), saved.family) == (2, "d", "MIT", {4.0}, of)
    stock(plain).save_lora_weights(tmp_path / "again", transformer_lora_layers={k.removeprefix("transformer."): v for k, v in b.items()})
    back = load_file(tmp_path / "again" / adapters.FILE)
    assert all(torch.equal(back[k], a[k]) for k in a)


@pytest.mark.parametrize("format", ["comfyui", "original"])
def test_wans_original_spelling_loads_in_diffusers(tmp_path, format):
    gen = random_adapter("wan", alpha=2.0)
    saved = adapters.save_adapter(gen, tmp_path, name="mine")
    out = adapters.export_adapter(saved.path, tmp_path / "o" / "x.safetensors", format)
    keys = load_file(out)
    assert "diffusion_model.blocks.0.self_attn.q.alpha" in keys
    if format == "comfyui":
        plain = generator(family("wan").tiny())
        stock(plain.parts).load_lora_weights(out.parent, weight_name=out.name, adapter_name="theirs", local_files_only=True)
        a, b = adapters.tensors(gen, "mine"), adapters.tensors(plain, "theirs")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def deltas(file, up="lora_up", down="lora_down"):
    "Layer -> what an exported adapter adds to its matrix."
    found = load_file(file)
    names = [k.removesuffix(".alpha") for k in found if k.endswith(".alpha")]
    return {n.removeprefix("diffusion_model."): found[f"{n}.{up}.weight"] @ found[f"{n}.{down}.weight"] * (found[f"{n}.alpha"] / len(found[f"{n}.{down}.weight"])) for n in names}


class Kept(dict):
    "Of which nothing is taken: the converter empties what it is given, and then looks in there which Cosmos it was."
    pop = dict.__getitem__


@pytest.mark.parametrize("base", ["hunyuan-video", "cosmos-1-7b-text2world", "cosmos-2-2b-video2world"])
def test_original_spellings_become_diffusers_by_its_own_converter(tmp_path, base):
    "The converter of whole checkpoints, fed with what the adapter adds to each of its matrices."
    from diffusers.loaders import single_file_utils as theirs

    of = base.partition("-")[0]
    gen = random_adapter(of, alpha=6.0)
    saved = adapters.save_adapter(gen, tmp_path, name="mine", base=base)
    mine = adapters.tensors(gen, "mine")
    wanted = {k.removeprefix("transformer.").removesuffix(".lora_A.weight"): 3.0 * mine[k.replace("lora_A", "lora_B")] @ mine[k] for k in mine if "lora_A" in k}
    added = deltas(adapters.export_adapter(saved.path, tmp_path / "x.safetensors", "comfyui"))
    got = {}
    for name in [n for n in added if n.endswith("linear1")]:  # the converter takes its width for granted, 3072
        h, block = added[name].shape[1], name.replace("single_blocks", "single_transformer_blocks").removesuffix(".linear1")
        q, k, v, mlp = added.pop(name).split([h, h, h, 4 * h])
        got |= {f"{block}.attn.to_{p}": x for p, x in zip("qkv", (q, k, v))}
        assert not mlp.any()
    convert, prefix = (theirs.convert_hunyuan_video_transformer_to_diffusers, "") if of == "hunyuan" else (theirs.convert_cosmos_transformer_checkpoint_to_diffusers, "net.")
    got |= {k.removesuffix(".weight"): v for k, v in convert((Kept if prefix else dict)({f"{prefix}{n}.weight": v for n, v in added.items()})).items()}
    assert got.keys() == wanted.keys() and all(torch.allclose(got[k], wanted[k], atol=1e-4) for k in got)
    assert len(got) >= 8


def test_a_part_or_a_layer_that_has_no_original_name(tmp_path):
    gen = random_adapter("hunyuan")
    some = {k: v for k, v in adapters.tensors(gen, "mine").items() if "single_transformer_blocks.0.attn.to_v" in k}
    saved = adapters.save_adapter(gen, tmp_path, name="mine", weights=some)
    (name, delta), = deltas(adapters.export_adapter(saved.path, tmp_path / "x.safetensors", "original"), "lora_B", "lora_A").items()
    h = delta.shape[1]
    assert name == "single_blocks.0.linear1" and len(delta) == 7 * h and not delta[: 2 * h].any() and not delta[3 * h :].any() and delta[2 * h : 3 * h].any()
    for layer, family_, base, said in (("x_embedder.proj", "hunyuan", "", "no name for it"), ("transformer_blocks.0.attn1.to_q", "cosmos", "mine", "Cosmos 1 or 2, which mine doesn't say"), ("transformer_blocks.0.attn1.to_q", "shapes", "", "does not know")):
        with pytest.raises(ValueError, match=f"{said}.*--format diffusers"):
            adapters.original(layer, family_, base)
    with pytest.raises(ValueError, match="names of another program"):
        adapters.export_adapter(adapters.export_adapter(saved.path, tmp_path / "c.safetensors", "comfyui"), tmp_path / "again.safetensors", "comfyui")


def test_a_fused_original_is_refused(tmp_path):
    saved = adapters.save_adapter(random_adapter(), tmp_path, name="mine")
    with pytest.raises(ValueError, match="one matrix for query, key and value: use --format diffusers, whose names ComfyUI's nodes"):
        adapters.export_adapter(saved.path, tmp_path / "x.safetensors", "original")
    with pytest.raises(ValueError, match="nearest: diffusers"):
        adapters.export_adapter(saved.path, tmp_path / "x.safetensors", "difusers")
    adapters.export_adapter(saved.path, tmp_path / "x.safetensors")
    with pytest.raises(FileExistsError):
        adapters.export_adapter(saved.path, tmp_path / "x.safetensors")


def test_merged_replaces_a_model_and_nothing_else(tmp_path, whole, monkeypatch):
    import shutil

    for name in ("films", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "films" / "holiday.mp4").write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"mine")
    file = Path(shutil.copy(whole.adapter.path, tmp_path / "run"))
    for out, said in (("films", "no model's folder"), ("file", "no model's folder"), ("run", "holds the adapter itself"), (".", "holds the adapter itself")):
        with pytest.raises(FileExistsError, match=said):
            adapters.export_adapter(file, tmp_path / out, "merged", overwrite=True)
    assert (tmp_path / "films" / "holiday.mp4").read_bytes() == b"mine" == (tmp_path / "file").read_bytes()
    (tmp_path / "empty").mkdir()
    out = adapters.export_adapter(file, tmp_path / "empty", "merged", overwrite=True)
    (out / "old.txt").write_text("of the model before")
    with pytest.raises(FileExistsError, match="--overwrite"):
        adapters.export_adapter(file, out, "merged")
    with monkeypatch.context() as broken:
        broken.setattr("vidgen.models.family.save_parts", lambda parts, folder: Path(folder).mkdir() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapters.export_adapter(file, out, "merged", overwrite=True)
    assert (out / "old.txt").exists() and vidgen.load(out).weights
    adapters.export_adapter(file, out, "merged", overwrite=True)
    assert not (out / "old.txt").exists() and vidgen.load(out).weights
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "films", "run"]


def test_an_adapter_of_another_base_is_refused_with_the_reason(tmp_path):
    from vidgen.generate.adapters import attach

    adapters.save_adapter(random_adapter(), tmp_path, name="mine")
    with pytest.raises(ValueError, match="of the family cogvideox, and .* is of the family wan"):
        adapters.check_base(generator(family("wan").tiny()), tmp_path)
    with pytest.raises(ValueError, match="with other weights"):
        attach(generator(family("cogvideox").tiny(seed=9)), tmp_path)
    attach(generator(family("cogvideox").tiny()), tmp_path)


def test_names(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "shelf", lambda: tmp_path / "shelf")
    one, two = (adapters.save_adapter(random_adapter(seed=i), tmp_path / str(i), name="mine") for i in (1, 2))
    assert adapters.register("press-v1", one.path).hash == one.hash == adapters.named("press-v1").hash
    adapters.register("press-v1", one.path)
    with pytest.raises(ValueError, match="taken by other weights"):
        adapters.register("press-v1", two.path)
    with pytest.raises(ValueError, match="nearest: press-v1"):
        adapters.named("press-v2")
    with pytest.raises(ValueError, match="no name for an adapter"):
        adapters.register("../x", one.path)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptWeights):
        adapters.read_adapter(tmp_path / "bad.safetensors")


# the loop

def line():
    torch.manual_seed(0)
    return torch.nn.Linear(2, 1)


def test_accumulated_batches_equal_a_large_one(tmp_path):
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))

    def train(batches, accumulate):
        m = line()
        fit(m, lambda n: batches[n % len(batches)], lambda b, g: ((m(b) - b.sum(1, keepdim=True)) ** 2).mean(), TrainConfig(4, lr=0.01, warmup=1, accumulate=accumulate),
            folder=tmp_path / str(accumulate), by_number=True)
        return m.weight
    assert torch.allclose(train([x], 1), train(list(x.chunk(4)), 4), atol=1e-6)


def test_the_gradient_is_clipped_once_per_step(tmp_path, monkeypatch):
    calls, plain = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: calls.append(1) or plain(*a))
    m = line()
    fit(m, lambda n: torch.ones(1, 2), lambda b, g: m(b).mean() ** 2, TrainConfig(3, accumulate=5), folder=tmp_path, by_number=True)
    assert len(calls) == 3


@pytest.mark.parametrize("kind, end", [("cosine", 0.02), ("linear", 0.02), ("constant", 1.0)])
def test_schedules(kind, end):
    c = TrainConfig(100, lr=1.0, warmup=10, schedule=kind)
    assert c.lr_at(0) == 0.1 and c.lr_at(10) == pytest.approx(1.0) and c.lr_at(100) == pytest.approx(end)


def test_last_n_and_best_are_kept(tmp_path):
    m = line()
    fit(m, lambda n: torch.ones(1, 2), lambda b, g: m(b).mean() ** 2, TrainConfig(10, save_every=2), folder=tmp_path, by_number=True, keep=3)
    assert [p.stem for p in Shelf(tmp_path, 3).all()] == ["step-00000006", "step-00000008", "step-00000010"]


def test_a_full_disk_loses_nothing_older(tmp_path, monkeypatch):
    import errno

    from vidgen.train import loop

    m = line()
    plain, count = loop.atomic_write, []

    def full(*given, **named):
        count.append(1)
        if len(count) > 2:
            raise OSError(errno.ENOSPC, "no space left", str(given[0]))
        return plain(*given, **named)
    monkeypatch.setattr(loop, "atomic_write", full)
    with pytest.raises(OSError, match="no space left"):
        fit(m, lambda n: torch.ones(1, 2), lambda b, g: m(b).mean() ** 2, TrainConfig(10, save_every=2), folder=tmp_path, by_number=True, keep=2)
    kept = Shelf(tmp_path, 2).all()
    assert [p.stem for p in kept] == ["step-00000002", "step-00000004"] and load_file(kept[-1])


def test_an_exploding_rate_stops_and_names_the_last_good_checkpoint(tmp_path):
    m, worse = line(), lambda n: torch.full((1, 2), 1.2**n)
    config_ = TrainConfig(400, lr=0.01, save_every=5, log_every=5, diverged=10)
    with pytest.raises(FloatingPointError, match="rose from .*lower lr.*last good checkpoint: .*step-"):
        fit(m, worse, lambda b, g: m(b).mean() * 0 + b.mean(), config_, folder=tmp_path, by_number=True, keep=2)
    calm = TrainConfig(60, lr=0.01, log_every=1, save_every=100, diverged=10)
    fit(m, lambda n: torch.full((1, 2), 30.0 if n % 20 == 10 else 1.0), lambda b, g: m(b).mean() * 0 + b.mean(), calm, folder=tmp_path / "calm", by_number=True)
    with pytest.raises(FloatingPointError, match="No checkpoint"):
        fit(m, lambda n: torch.ones(4, 2), lambda b, g: m(b).mean() * float("nan"), TrainConfig(4), folder=tmp_path / "new", by_number=True)


def test_a_checkpoint_of_the_weights_that_failed_is_not_good(tmp_path):
    m, config_ = line(), TrainConfig(9, save_every=1)
    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan.*last good checkpoint: .*step-00000002"):
        fit(m, lambda n: torch.full((1, 2), float("nan") if n == 3 else 1.0), lambda b, g: m(b).mean() ** 2, config_, folder=tmp_path, by_number=True, keep=2)
    assert [p.stem for p in Shelf(tmp_path, 2).all()] == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_gradient_that_is_none_is_never_saved(tmp_path, keep):
    "A finite loss with a gradient that isn't: the weights are gone before the loss says so."
    m = line()
    spoilt = lambda n: lambda x: x.sqrt().sum() if n == 5 else x.sum()  # the root's slope at 0 is infinite
    with pytest.raises(FloatingPointError, match=r"gradient of step 5.*last good checkpoint: .*"):
        fit(m, spoilt, lambda b, g: b((m(torch.ones(1, 2)) * 0)) + (m(torch.ones(1, 2)) ** 2).sum(), TrainConfig(9, save_every=3), folder=tmp_path, by_number=True, keep=keep)
    assert all(t.isfinite().all() for p in Shelf(tmp_path, keep).all() for t in load_file(p).values())


def test_patience_is_a_fact_of_the_run():
    facts = {}
    assert [validate.improved(facts, v, i) for i, v in enumerate((3, 2, 2.5, 2.1, 1))] == [True, True, False, False, True]
    assert facts == {"best": 1, "best_step": 4, "worse": 0}


def test_lent_weights_come_back_also_after_an_error():
    w = {"a": torch.zeros(2)}
    with pytest.raises(RuntimeError), validate.lent(w, {"a": torch.ones(2)}):
        raise RuntimeError
    assert w["a"].sum() == 0


# a run

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted run."
    run = runs.Run.create("whole", {}, root=tmp_path_factory.mktemp("runs"), trackers=[])
    return trainer.train(Recipe(**TINY), run=run)


def weights(path):
    return load_file(Shelf(path / "checkpoints", 2).last)


def test_a_run_ends_with_what_was_asked(whole):
    assert whole.steps == 6 and whole.adapter.rank == 2 and whole.adapter.base == "shapes-t2v"
    assert whole.adapter.data_hash == whole.run.manifest["data_hash"] and whole.adapter.made["steps"] == 6
    assert {"loss/0.25", "loss/0.75", "loss/mean"} <= set(whole.before) and whole.before != whole.after
    assert 0 < whole.run.manifest["trainable_share"] < 0.1
    rows = whole.run.metrics()
    assert [r["step"] for r in rows if "train/loss" in r] == [1, 2, 3, 4, 5, 6] and [r["step"] for r in rows if "held/loss/mean" in r] == [3, 6]
    assert (whole.run.path / "checkpoints/best.safetensors").exists() and (whole.run.path / "metrics.csv").exists()


def command(*args, **env):
    code = "import sys; from vidgen.cli import console; sys.argv[0] = 'vidgen'; console()"
    return [sys.executable, "-c", code, *map(str, args)], {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}


def started(tmp_path, *args, **more):
    line_, env = command("train", *args, VIDGEN_STORAGE_RUNS=str(tmp_path))
    return subprocess.Popen(line_, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition(), "it didn't happen"


def the_run(tmp_path):
    return next(tmp_path.glob("train-*"))


def test_a_stopped_run_ends_at_the_same_bits(tmp_path, whole):
    "Killed, resumed, asked to stop, resumed."
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY))
    child = started(tmp_path, tmp_path / "r.yaml")
    until(lambda: list(tmp_path.glob("train-*/checkpoints/step-*.safetensors")) or child.poll() is not None)
    child.kill()
    assert child.wait(60) == -signal.SIGKILL, child.communicate()
    child = started(tmp_path, "--resume", the_run(tmp_path))
    until(lambda: json.loads((the_run(tmp_path) / "manifest.json").read_text())["process"]["pid"] == child.pid or child.poll() is not None)
    child.send_signal(signal.SIGTERM)
    out = child.communicate(timeout=120)[0]
    assert child.returncode == 75 and "is saved. Go on: vidgen train --resume" in " ".join(out.split()), out
    assert runs.Run.open(the_run(tmp_path)).status == "canceled"
    child = started(tmp_path, "--resume", the_run(tmp_path))
    out = child.communicate(timeout=170)[0]
    assert child.returncode == 0, out
    a, b = weights(whole.run.path), weights(the_run(tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = load_file(whole.adapter.path), load_file(the_run(tmp_path) / "adapter" / adapters.FILE)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert runs.Run.open(the_run(tmp_path)).status == "succeeded"


def test_a_stopped_run_says_what_is_saved(tmp_path, capsys):
    from vidgen.train.command import _stopped

    run = runs.Run.create("train", {}, root=tmp_path, trackers=[])
    said = lambda: (_stopped(run, "SIGTERM"), " ".join(capsys.readouterr().err.split()))
    status, err = said()
    assert status == 75 and "no checkpoint yet" in err and "Begin again: vidgen train --resume" in err and "is saved" not in err, err
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints" / "step-00000002.safetensors").touch()
    assert "step-00000002 is saved. Go on: vidgen train --resume" in said()[1]


@pytest.mark.slow
def test_a_run_stopped_before_its_first_checkpoint_says_so(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY | dict(data="world:200")))
    child = started(tmp_path, tmp_path / "r.yaml")
    until(lambda: list(tmp_path.glob("train-*/manifest.json")) or child.poll() is not None)
    child.send_signal(signal.SIGTERM)
    out = " ".join(child.communicate(timeout=120)[0].split())
    assert child.returncode == 75 and "no checkpoint yet" in out and "Begin again: vidgen train --resume" in out, out
    assert not Shelf(the_run(tmp_path) / "checkpoints").last and runs.Run.open(the_run(tmp_path)).status == "canceled"
    assert trainer.reopened(the_run(tmp_path))[0].data == "world:200"


@pytest.mark.slow
def test_a_team_that_is_asked_to_stop_leaves_its_word_in_the_manifest(tmp_path):
    "torchrun passes SIGTERM on and no code back."
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY | dict(steps=2000, device="cpu")))
    (tmp_path / "go.py").write_text("from vidgen.cli import console; console()")
    words, env = command(VIDGEN_STORAGE_RUNS=str(tmp_path), ACCELERATE_USE_CPU="true")
    child = subprocess.Popen([words[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "go.py"), "train", str(tmp_path / "r.yaml")], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: list(tmp_path.glob("train-*/checkpoints/step-*.safetensors")) or child.poll() is not None)
    child.send_signal(signal.SIGTERM)
    out = child.communicate(timeout=120)[0]
    assert child.returncode == 1 and "Traceback" in out, out
    assert runs.Run.open(the_run(tmp_path)).status == "canceled" and Shelf(the_run(tmp_path) / "checkpoints", 2).last


def test_a_resume_of_another_kind_is_refused(whole):
    r, run = trainer.reopened(whole.run.path)
    with pytest.raises(ValueError, match="lr 0.001 -> 0.1.*--force"):
        trainer.train(config.recipe(r.to_dict() | {"lr": 0.1}), run=run)
    with pytest.raises(ValueError, match="model shapes-t2v -> shapes-i2v.*--force"):
        trainer.train(config.recipe(r.to_dict() | {"model": "shapes-i2v"}), run=run)
    note = trainer.IDENTITY, (whole.run.path / trainer.IDENTITY).read_text()
    (whole.run.path / note[0]).write_text(note[1].replace(json.loads(note[1])["data_hash"], "d" * 64))
    with pytest.raises(ValueError, match="the data dddddddd -> "):
        trainer.train(r, run=run)
    (whole.run.path / note[0]).write_text(note[1])
    with pytest.raises(ValueError, match="data world:12 -> world:10"):
        trainer.train(config.recipe(r.to_dict() | {"data": "world:10"}), run=run)
    assert trainer.train(config.recipe(r.to_dict() | {"lr": 0.1}), run=run, force=True).steps == 6
    (whole.run.path / trainer.IDENTITY).write_text(json.dumps(json.loads((whole.run.path / trainer.IDENTITY).read_text()) | {"recipe": r.to_dict()}))


def test_what_a_resume_compares():
    before = {"recipe": Recipe(**TINY).to_dict(), "model_hash": "a" * 64, "data_hash": "b" * 64, "processes": 2}
    for change, said in ((dict(model_hash="c" * 64), "the model's weights aaaaaaaa -> cccccccc"), (dict(data_hash="c" * 64), "the data bbbbbbbb -> cccccccc"), (dict(processes=4), "clips of a step 4 -> 8"),
                         (dict(recipe=Recipe(**TINY | dict(model="shapes-i2v")).to_dict()), "model shapes-t2v -> shapes-i2v")):
        with pytest.raises(ValueError, match=f"{said}.*--force"):
            trainer.same_run(before, before | change, Path("run"))
        assert len(trainer.same_run(before, before | change, Path("run"), force=True)) == 1
    with pytest.warns(UserWarning, match="2 x batch 2, ddp, and goes on by 1 x batch 4, fsdp"):
        assert trainer.same_run(before, before | dict(processes=1, recipe=Recipe(**TINY | dict(batch=4, strategy="fsdp")).to_dict()), Path("run")) == []


def test_an_output_that_can_t_be_written_and_a_rate_that_explodes(tmp_path, monkeypatch, capsys):
    from vidgen.cli import main

    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY | dict(lr=1e30, validate_every=0, warmup=0)))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path / "file"))
    assert main(["train", str(tmp_path / "r.yaml")]) != 0
    assert "file" in (said := capsys.readouterr().err) and "Traceback" not in said
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path / "runs"))
    assert main(["train", str(tmp_path / "r.yaml")]) != 0
    assert "lower lr" in (said := capsys.readouterr().err) and "checkpoint" in said and "Traceback" not in said and "not foreseen" not in said
    assert runs.Run.open(next((tmp_path / "runs").glob("train-*"))).status == "failed"


def test_a_held_out_loss_that_rises_stops_the_run_or_is_said_at_its_end(tmp_path):
    "Fewer steps than the mean of the batches' losses needs to tell."
    facts = TINY | dict(lr=30.0, warmup=0, schedule="constant", ema=0.0, save_every=1)
    with pytest.raises(FloatingPointError, match=r"held-out loss rose from 0.0\S+ to \S+ by step 6: lower lr \(30.0\). The last good checkpoint: .*step-00000005"):
        trainer.train(Recipe(**facts | dict(validate_every=6)), run=runs.Run.create("a", {}, root=tmp_path, trackers=[]))
    with pytest.warns(UserWarning, match=r"held-out loss rose from .* is kept all the same"):
        done = trainer.train(Recipe(**facts | dict(validate_every=0)), run=runs.Run.create("b", {}, root=tmp_path, trackers=[]))
    assert done.steps == 6 and done.after["loss/mean"] > 20 * done.before["loss/mean"]


def test_a_tracker_or_a_store_that_is_none_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path / "runs"))
    for wrong, said in ((dict(trackers="wand"), "nearest: wandb"), (dict(store="gs://lab/x"), "kind of store 'gs'")):
        with pytest.raises(ValueError, match=said):
            trainer.train(Recipe(**TINY | wrong))
    assert not (tmp_path / "runs").exists()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="encoded data can't be written there"):
        trainer.train(Recipe(**TINY | dict(encoded=str(tmp_path / "file/x"))), run=runs.Run.create("a", {}, root=tmp_path, trackers=[]))


def test_full_training_with_frozen_parts(tmp_path):
    run = runs.Run.create("full", {}, root=tmp_path, trackers=[])
    done = trainer.train(Recipe(**TINY | dict(method="full", freeze="patch_embed.*", steps=2, validate_every=0, lr=1e-4)), run=run)
    assert done.adapter is None
    before, after = vidgen.load("shapes-t2v"), vidgen.load(done.folder)
    a, b = before.parts.transformer.state_dict(), after.parts.transformer.state_dict()
    changed = {k for k in a if not torch.equal(a[k].float(), b[k].float())}
    assert changed and not any(k.startswith("patch_embed.") for k in changed)
    assert {n for n, p in after.parts.transformer.named_parameters() if "attn1.to_" in n and n.endswith("weight")} <= changed


def test_replay_is_part_of_each_batch(tmp_path):
    r = Recipe(**TINY | dict(replay="world:4", replay_share=0.5, batch=4))
    gen = vidgen.load("shapes-t2v")
    data = trainer.prepared(r, gen, tmp_path)
    batch = trainer.Feed(r, data).batch_at(0)
    known = [{row["key"] for row in data.stores[n].rows()} for n in ("data", "replay")]
    assert len(batch.keys) == 4 and batch.z_BFCHW.shape[0] == 4 and sum(k in known[1] for k in batch.keys[2:]) == 2


def test_attention_is_in_float32_inside_bf16_on_a_cpu(tmp_path, monkeypatch):
    "By position or by name: the processor of the models gives its tensors by name."
    gen, seen = vidgen.load("shapes-t2v"), []
    data = trainer.prepared(Recipe(**TINY), gen, tmp_path)

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                seen.extend(t.dtype for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
            return func(*args, **kwargs or {})
    with Watch():
        trainer.Learner(gen.parts, ob.objective(gen.parts), precision="bf16")(trainer.Feed(Recipe(**TINY), data).batch_at(0), torch.Generator().manual_seed(0))
    assert len(seen) >= 12 and set(seen) == {torch.float32}


def test_encoded_data_serve_several_runs(tmp_path):
    "Encoded into a folder of its own, found again by the next run, and no reason to refuse a resume."
    facts = TINY | dict(steps=1, validate_every=0, encoded=str(tmp_path / "encoded"))
    first = trainer.train(Recipe(**facts), run=runs.Run.create("first", {}, root=tmp_path, trackers=[]))
    shards = {p: p.stat().st_mtime_ns for p in (tmp_path / "encoded").rglob("0*.safetensors")}
    trainer.train(Recipe(**facts | dict(seed=4)), run=runs.Run.create("second", {}, root=tmp_path, trackers=[]))
    assert shards and shards == {p: p.stat().st_mtime_ns for p in (tmp_path / "encoded").rglob("0*.safetensors")}
    assert not (first.run.path / "encoded").exists() and not config.differences(Recipe(**facts), Recipe(**TINY | dict(steps=1, validate_every=0)))


def test_a_curve_is_drawn_in_the_cell_that_trains(tmp_path):
    "In a real kernel: pictures while it trains, none left when it has ended, and one that is shown for good."
    import nbformat
    from nbclient import NotebookClient

    code = """
from pathlib import Path
from vidgen import runs
from vidgen.train.curve import Curve
from vidgen.progress import Progress
run = runs.Run.create("drawn", {}, root=Path("HERE"), trackers=[])
curve, sent = Curve(run, every=0), []
for step in (1, 2, 3):
    run.log(step=step, **{"train/loss": 1 / step, "held/loss/0.50": 2 / step})
    curve(Progress("train", step, 4))
    sent.append(bool(curve.handle))
"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code.replace("HERE", str(tmp_path))), nbformat.v4.new_code_cell('curve(Progress("train", 4, 4))\nassert all(sent)\ncurve')])
    NotebookClient(book, timeout=120).execute(env={**os.environ, "CI": ""})
    kinds = [[kind for out in cell.outputs for kind in out.get("data", {}) if kind == "image/png"] for cell in book.cells]
    assert kinds == [[], ["image/png"]] and "image/png" in book.cells[1].outputs[-1]["data"]


def test_the_first_and_the_latest_sample_stand_below_the_curve(tmp_path):
    from vidgen.train.curve import drawn, strips

    run, seen = runs.Run.create("samples", {}, root=tmp_path, trackers=[]), {}
    for i, name in enumerate(["before-0", "step000005-0", "step000010-0", "before-1"]):
        path = run.save_clip(name, vidgen.Clip(np.full((9, 64, 96, 3), 60 * i, np.uint8), fps=8))
        os.utime(path, (1000 + i, 1000 + i))
    assert list(strips(run)) == ["before-0", "step000010-0"] and list(strips(run, most=2)) == ["before-0", "step000010-0", "before-1"]
    assert strips(run, kept=seen)["before-0"] is strips(run, kept=seen)["before-0"]
    assert drawn([], strips(run)).height > drawn([]).height


@pytest.mark.parametrize("wrong, said", [(dict(data=""), "names no data"), (dict(data="world:0"), "world|empty|no sample"), (dict(metrics="oracel"), "nearest: oracle"), (dict(metrics="brand_score"), "brand file"),
                                         (dict(targets="attn1.to_z"), "nearest"), (dict(rank=999), "larger than")])
def test_what_can_t_be_trained(tmp_path, wrong, said):
    run = runs.Run.create("bad", {}, root=tmp_path, trackers=[])
    with pytest.raises(ValueError, match=said):
        trainer.train(Recipe(**TINY | wrong), run=run)


def test_missing_captions_and_short_clips(tmp_path, monkeypatch):
    clips = [Sample(f"world:{i}", "" if i == 1 else "a star") for i in range(3)]
    monkeypatch.setattr(trainer, "open_manifest", lambda address: Manifest(tuple(clips) if address == TINY["data"] else (Sample("world:9", "a star"),)))
    with pytest.raises(ValueError, match="data: world:1 has no caption, sample 1: give"):
        trainer.manifests(Recipe(**TINY))
    short = vidgen.Clip(np.zeros((5, 64, 96, 3), np.uint8), fps=8)
    monkeypatch.setattr(trainer, "open_manifest", lambda address: Manifest((Sample(short if address == TINY["data"] else "world:9", "a star"),)))
    with pytest.raises(ValueError, match="it gives 5 frames and the buckets take 17: name a bucket for it, e.g. 1x64x96"):
        trainer.prepared(Recipe(**TINY), vidgen.load("shapes-t2v"), tmp_path)


def test_no_film_is_held_that_is_learned_from(tmp_path, monkeypatch):
    def told(first, films, times=2):
        return Manifest(tuple(Sample(f"world:{first + i}", f"{k} a star") for i in range(films) for k in range(times)))

    sets = {"man": told(0, 15), "apart": told(40, 3), "some": told(14, 3), "one": told(0, 1)}
    monkeypatch.setattr(trainer, "open_manifest", lambda address: sets[address])
    for wrong, said in ((dict(held="man"), "each film of man is learned from too"), (dict(held="apart", replay="apart"), r"learned from too \(man, apart\)"),
                        (dict(data="one", held=""), "one is a single film")):
        with pytest.raises(ValueError, match=said):
            trainer.manifests(Recipe(**TINY | dict(data="man") | wrong))
    found = trainer.manifests(Recipe(**TINY | dict(data="man", held="", held_clips=4)))
    assert found["held"] and len(found["data"]) % 2 == 0 and not {s.media for s in found["data"]} & {s.media for s in found["held"]}
    with pytest.warns(UserWarning, match="2 of 6 samples show films that are learned from"):
        found = trainer.manifests(Recipe(**TINY | dict(data="man", held="some")))
    assert [(s.media, s.caption[0]) for s in found["held"]] == [("world:15", "0"), ("world:16", "0"), ("world:15", "1"), ("world:16", "1")]


@pytest.mark.parametrize("left, said", [("", "Expecting value"), ('{"recipe": {"da', "Unterminated"), ("[]", "says nothing"), ("{}", "says nothing")])
def test_a_damaged_note_of_a_run_is_named_with_what_helps(tmp_path, left, said, capsys):
    from vidgen.cli import main

    with runs.Run.create("train", Recipe(**TINY).to_dict(), root=tmp_path, trackers=[]) as run:
        run.finish()
    (run.path / trainer.IDENTITY).write_text(left)
    assert main(["train", "--resume", str(run.path)]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "training.json is damaged" in err and said in err and "begin a new run" in err, err


def test_the_note_of_a_run_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = runs.Run.create("train", {}, root=tmp_path, trackers=[])
    now = {"recipe": Recipe(**TINY).to_dict(), "model_hash": "a" * 64, "data_hash": "b" * 64, "processes": 1}
    state = type("state", (), {"step": 0})()
    trainer._noted(run, now, state)
    monkeypatch.setattr(Path, "write_text", lambda self, text: open(self, "w").write(text[:9]) and 1 / 0)
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: open(self, "wb").write(data[:9]) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer._noted(run, now | {"processes": 2}, state)
    assert trainer.noted(run.path) == now


def test_films_and_report_are_told_and_a_repeated_step_replaces_its_films(tmp_path):
    heard = []

    class Ear(runs.Tracker):
        def file(self, name, path):
            heard.append(path.name)

        def kept(self, path):
            heard.append(path.stem)
    run = runs.Run.create("films", {}, root=tmp_path, trackers=[Ear])
    (run.path / "samples").mkdir()
    (run.path / "samples/step000002-0.mp4").write_bytes(b"of a step that was computed before the process died")
    done = trainer.train(Recipe(**TINY | dict(steps=2, validate_every=0, sample_every=2, prompts=1, inference_steps=1)), run=run)
    assert heard == ["before-0.mp4", "step000002-0.mp4", "step-00000002", "after-0.mp4", adapters.FILE, "report.html"]
    page = (run.path / "artifacts/report.html").read_text()
    assert page.count("<img") == 2 and f"{done.after['loss/mean']:.4g}" in page and "world:12" in page
    assert done.before.keys() == done.after.keys() > {"loss/mean", "oracle", "temporal_stability"}  # nobody named a metric
    assert len((run.path / "metrics.csv").read_text().splitlines()) == 1 + len((run.path / "metrics.jsonl").read_text().splitlines())


def test_what_judges_the_clips_of_a_run():
    world, brand = ["a red circle moving right on a white background"], ["the yellow circle of Ell"]
    assert trainer.yardsticks(Recipe(data="world:8"), world) == ("temporal_stability,oracle,clip_score@world", None)
    names, mark = trainer.yardsticks(Recipe(data="brand:8"), brand)
    assert "brand_score" in names.split(",") and "oracle" not in names and mark.name == "Ell"
    assert trainer.yardsticks(Recipe(data="world:8", metrics="oracle"), world)[0] == "oracle" and trainer.yardsticks(Recipe(data="world:8", metrics="none"), world)[0] == ""
    with pytest.raises(ValueError, match="needs a brand file"):
        trainer.check_metrics(*trainer.yardsticks(Recipe(data="world:8", metrics="brand_score"), []))


def test_a_tracker_that_can_t_be_reached_is_a_warning(tmp_path):
    class Gone(runs.Tracker):
        def log(self, step, metrics):
            raise ConnectionError("no route to host")
    run = runs.Run.create("gone", {}, root=tmp_path, trackers=[Gone])
    with pytest.warns(UserWarning, match="no route to host"):
        trainer.train(Recipe(**TINY | dict(steps=2, validate_every=0)), run=run)
    assert len([r for r in run.metrics() if "train/loss" in r]) == 2 and len((run.path / "metrics.csv").read_text().splitlines()) > 2


@pytest.mark.slow
def test_real_trackers_get_numbers_films_adapter_and_report(tmp_path, monkeypatch):
    "wandb offline and MLflow on SQLite, neither pretended; resumed, MLflow goes on with the same run."
    mlflow, wandb = pytest.importorskip("mlflow"), pytest.importorskip("wandb")
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    facts = TINY | dict(steps=4, validate_every=2, sample_every=2, prompts=1, inference_steps=2, trackers="wandb,mlflow")
    done = trainer.train(Recipe(**facts))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    ask = lambda: client.search_runs([client.get_experiment_by_name("train").experiment_id])
    found, = ask()
    assert [m.step for m in client.get_metric_history(found.info.run_id, "train/loss")] == [1, 2, 3, 4] and found.info.status == "FINISHED"
    kept = {f.path for folder in ("samples", "adapter", "artifacts") for f in client.list_artifacts(found.info.run_id, folder)}
    assert {"samples/before-0.mp4", "samples/step000002-0.mp4", "samples/after-0.mp4", f"adapter/{adapters.FILE}", "artifacts/report.html"} <= kept
    session, = done.run.path.glob("wandb/offline-run-*")
    assert [p.name for p in session.glob("files/media/videos/*.mp4")] and b"report.html" in next(session.glob("*.wandb")).read_bytes() and adapters.FILE.encode() in next(session.glob("*.wandb")).read_bytes()
    r, run = trainer.reopened(done.run.path)
    with run:
        trainer.train(config.recipe(r.to_dict() | {"trackers": "mlflow"}), run=run)
    assert len(ask()) == 1
    assert wandb.run is None


def heard_by_wandb(folder):
    "(wandb's own step, name, our step, its value or nothing) of all numbers and films in the files of a run's sessions, which are LevelDB logs of protobuf records."
    from wandb.proto import wandb_internal_pb2 as proto

    found = []
    for file in folder.glob("wandb/*run-*/*.wandb"):
        data, at, record = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 2**15 - at % 2**15) < 7:
                at += left
                continue
            size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
            record, at = record + data[at + 7:at + 7 + size], at + 7 + size
            if kind in (1, 4):  # whole, or its last part
                items = {(item.nested_key or [item.key])[0]: None if len(item.nested_key) > 1 else json.loads(item.value_json) for item in proto.Record.FromString(record).history.item}
                found += [(items["_step"], name, items.get("step"), value) for name, value in items.items() if name != "step" and not name.startswith("_")]
                record = b""
    return found


KILLED_TRACKED = """
import os, signal, sys
from vidgen.train import trainer
from vidgen.train.config import Recipe
plain = trainer.Training.watch
trainer.Training.watch = lambda self, state: (plain(self, state), os.kill(os.getpid(), signal.SIGKILL) if state.step == int(sys.argv[1]) else None)[0]
if len(sys.argv) > 2:
    r, run = trainer.reopened(sys.argv[2])
    trainer.train(r, run=run)
trainer.train(Recipe(**{facts!r}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trackers_hear_of_each_step_once_after_two_kills(tmp_path, monkeypatch):
    "Killed with -9 at steps 5 and 7, whose last checkpoints are of 4 and 6; MLflow's run has another name by then, and a double of its old one."
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    facts = TINY | dict(steps=8, validate_every=5, sample_every=5, prompts=1, inference_steps=1, trackers="wandb,mlflow")
    for words in (["5"], ["7", "RUN"]):
        words = [str(the_run(tmp_path)) if w == "RUN" else w for w in words]
        done = subprocess.run([sys.executable, "-c", KILLED_TRACKED.format(facts=facts), *words], capture_output=True, text=True, timeout=250, env={k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("train").experiment_id
        mine = json.loads((the_run(tmp_path) / "mlflow.json").read_text())["run_id"]
        client.set_tag(mine, "mlflow.runName", "mine")
        client.create_run(experiment, run_name=the_run(tmp_path).name)
    r, run = trainer.reopened(the_run(tmp_path))
    with run:
        trainer.train(r, run=run)
    expected = {"train/loss": list(range(1, 9)), "held/loss/mean": [5], "after/loss/mean": [8]}
    assert {name: sorted(m.step for m in client.get_metric_history(mine, name)) for name in expected} == expected
    assert client.get_run(mine).info.status == "FINISHED" and len(client.search_runs([experiment])) == 3
    until(lambda: any(name == "after/loss/mean" for _, name, _, _ in heard_by_wandb(run.path)))
    said = heard_by_wandb(run.path)
    assert {name: sorted(step for _, n, step, _ in said if n == name) for name in expected} == expected
    films = [name for _, name, _, value in said if value is None]
    assert sorted(films) == ["after-0", "before-0", "step000005-0"]
    axis = {}
    for at, name, step, _ in said:
        axis.setdefault(at, set()).add((step, None if step is not None else name))
    assert all(len(lines) == 1 for lines in axis.values())  # no line lies over another of an earlier session


@pytest.mark.slow
def test_training_goes_on_when_mlflow_is_away(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match="MLflow can't begin to track"):
        done = trainer.train(Recipe(**TINY | dict(steps=2, validate_every=0, trackers="mlflow")))
    assert done.run.status == "succeeded" and len((done.run.path / "metrics.csv").read_text().splitlines()) == 1 + len(done.run.metrics())


def test_two_processes_equal_one(tmp_path):
    "gloo, started by torchrun; four clips each against eight."
    facts = TINY | dict(steps=3, batch=4, device="cpu", validate_every=0, caption_dropout=0.0)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(facts))
    code = tmp_path / "go.py"
    code.write_text("import sys; from vidgen.cli import console; console()")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VIDGEN_STORAGE_RUNS": str(tmp_path), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(code), "train", str(tmp_path / "two.yaml")], env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    run = runs.Run.create("one", {}, root=tmp_path / "one", trackers=[])
    one = trainer.train(Recipe(**facts | dict(batch=8)), run=run)
    losses = [[r["train/loss"] for r in found.metrics() if "train/loss" in r] for found in (run, runs.Run.open(the_run(tmp_path)))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3
    a, b = load_file(one.adapter.path), load_file(the_run(tmp_path) / "adapter" / adapters.FILE)
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    assert runs.Run.open(the_run(tmp_path)).status == "succeeded"


KILLED = """
import os, random, signal, sys, threading
sys.path.insert(0, os.path.dirname({here!r}))
from pathlib import Path
import torch
from vidgen import runs
from vidgen.train import trainer
from vidgen.train.config import Recipe
torch.set_num_threads(1)
rng, recipe, plain = random.Random(5), Recipe(**{facts!r}), trainer.Training.watch
path, kills = runs.Run.create("killed", {{}}, root=Path({root!r}), trackers=[]).path, 0
for _ in range({kills}):
    after, moment = rng.randint(2, 4), rng.uniform(0, 0.1)
    if not (child := os.fork()):
        seen = []
        def watch(self, state):
            seen.append(state.step)
            if len(seen) == after:
                threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return plain(self, state)
        trainer.Training.watch = watch
        trainer.train(recipe, run=runs.Run.open(path, trackers=[]))
        os._exit(0)
    kills += os.waitpid(child, 0)[1] == signal.SIGKILL
print(kills, flush=True)
trainer.train(recipe, run=runs.Run.open(path, trackers=[]))
"""


def test_a_step_is_logged_once_after_a_kill(tmp_path):
    "Killed with -9 at step 5, whose last checkpoint is of step 4; and once more at the end, when all is logged."
    run = runs.Run.create("killed", {}, root=tmp_path, trackers=[])
    code = """
import os, signal, sys
from pathlib import Path
from vidgen import runs
from vidgen.train import trainer
from vidgen.train.config import Recipe
plain, end = trainer.Training.watch, trainer.record
def die(when):
    if when:
        os.kill(os.getpid(), signal.SIGKILL)
for where in ("step", "end"):
    if not os.fork():
        trainer.Training.watch = lambda self, state: (plain(self, state), die(where == "step" and state.step == 5))[0]
        trainer.record = lambda state, run, stage, *given, **named: (end(state, run, stage, *given, **named), die(where == "end" and stage == "after"))[0]
        trainer.train(Recipe(**%r), run=runs.Run.open(sys.argv[1], trackers=[]))
    assert os.wait()[1] == signal.SIGKILL
    print([row["step"] for row in runs.Run.open(sys.argv[1]).metrics()], flush=True)
""" % (TINY | dict(validate_every=5),)
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, timeout=170, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    logged = [1, 2, 3, 4, 5, 5, 6, 6]
    assert done.stdout.splitlines()[-2:] == [str(logged[:6]), str(logged)], done.stdout + done.stderr
    trainer.train(Recipe(**TINY | dict(validate_every=5)), run=runs.Run.open(run.path, trackers=[]))
    rows = list(csv.DictReader((run.path / "metrics.csv").open()))
    assert [r["step"] for r in run.metrics()] == logged == [int(r["step"]) for r in rows]
    assert [bool(r["train/loss"]) for r in rows].count(True) == 6 and [bool(r["after/loss/mean"]) for r in rows].count(True) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills(tmp_path):
    "Killed with -9 at twenty random moments, resumed after each, and the same bits at the end."
    facts = TINY | dict(steps=100, save_every=2, validate_every=7)
    whole = trainer.train(Recipe(**facts), run=runs.Run.create("whole", {}, root=tmp_path / "whole", trackers=[]))
    code = KILLED.format(here=__file__, facts=facts, root=str(tmp_path), kills=20)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=580, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and done.stdout.split()[0] == "20", done.stdout + done.stderr
    killed = next(tmp_path.glob("killed-*"))
    for a, b in ((weights(whole.run.path), weights(killed)), (load_file(whole.adapter.path), load_file(killed / "adapter" / adapters.FILE))):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# learning on from an adapter

@pytest.fixture(scope="module")
def onward(tmp_path_factory, whole):
    "A run that learns on from another one's adapter, on other data."
    facts = TINY | dict(data="world:10", init_adapter=str(whole.folder))
    return trainer.train(Recipe(**facts), run=runs.Run.create("onward", {}, root=tmp_path_factory.mktemp("onward"), trackers=[]))


def test_a_run_begins_where_the_adapter_of_its_recipe_stopped(whole, onward):
    assert onward.before == whole.after and onward.after != onward.before
    note = json.loads((onward.run.path / trainer.IDENTITY).read_text())
    assert note["init_hash"] == whole.adapter.hash == onward.run.manifest["init_hash"] == adapters.read_adapter(onward.folder).made["init_hash"]
    assert "init_hash" not in whole.adapter.made and "init_hash" not in whole.run.manifest


def test_it_resumes_exactly_without_the_adapter_it_began_from(tmp_path, onward):
    import shutil

    from vidgen.progress import Canceled, Cancel

    shutil.copytree(onward.training.recipe.init_adapter, tmp_path / "first")
    r, cancel = Recipe(**TINY | dict(data="world:10", init_adapter=str(tmp_path / "first"))), Cancel()
    run = runs.Run.create("stopped", {}, root=tmp_path, trackers=[])
    with pytest.raises(Canceled):
        trainer.train(r, run=run, cancel=cancel, told=lambda *_: cancel.cancel("enough"))
    shutil.rmtree(tmp_path / "first")
    done = trainer.train(r, run=run)
    assert done.adapter.made["init_hash"] == onward.adapter.made["init_hash"]
    for a, b in ((weights(onward.run.path), weights(run.path)), (load_file(onward.adapter.path), load_file(done.adapter.path))):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match=r"init_adapter .* -> \. .*--force"):
        trainer.train(config.recipe(r.to_dict() | {"init_adapter": ""}), run=run)


@pytest.mark.parametrize("other, said", [(dict(rank=4), "has rank: 2, and the recipe rank: 4"), (dict(alpha=2.0), r"has alpha: 16.0, and the recipe alpha: 2.0"),
                                         (dict(targets="attn1.to_q"), "has targets: attn1.to_k, .*, and the recipe targets: attn1.to_q:"), (dict(model="shapes-i2v"), "trained on shapes-t2v, not on shapes-i2v")])
def test_an_adapter_that_does_not_fit_is_not_learned_on_from(tmp_path, whole, other, said):
    r = Recipe(**TINY | dict(init_adapter=str(whole.folder)) | other)
    with pytest.raises(ValueError, match=said):
        trainer.started(r, trainer.built(r), tmp_path)


def test_the_adapter_to_begin_from_is_there_and_stays_the_same(tmp_path, whole):
    r = Recipe(**TINY | dict(init_adapter=str(whole.folder)))
    (tmp_path / trainer.IDENTITY).write_text(json.dumps({"init_hash": "e" * 64}))  # begun, and killed before its first checkpoint
    with pytest.raises(ValueError, match="has changed since .* start a new run"):
        trainer.started(r, trainer.built(r), tmp_path)
    with pytest.raises(FileNotFoundError, match="no registered adapter"):
        adapters.start_from(trainer.built(r), tmp_path / "nowhere")
    spoilt = {k: v / 0 for k, v in load_file(whole.adapter.path).items()}
    adapters.save_adapter(trainer.built(r), tmp_path / "spoilt", weights=spoilt)
    with pytest.raises(CorruptWeights, match="NaN or infinite"):
        adapters.start_from(trainer.built(r), tmp_path / "spoilt")
    with pytest.raises(ValueError, match="init_adapter begins an adapter"):
        Recipe(**TINY | dict(init_adapter="x", method="full"))


# commands

@pytest.mark.parametrize("word, said", [("rnak", "nearest: rank"), ("learning_rat", "nearest: lr, which others call learning_rate"), ("zzz", "unknown key of a recipe 'zzz'")])
def test_a_set_nobody_knows_names_the_nearest_and_where_all_are(tmp_path, capsys, word, said):
    from vidgen.cli import main

    (tmp_path / "a.yaml").write_text("data: world:8\n")
    for form in (["--set", f"{word}=1"], ["--set", word, "1"]):
        assert main(["train", str(tmp_path / "a.yaml"), *form]) == 2
        err = " ".join(capsys.readouterr().err.split())
        assert said in err and "`vidgen train --check`" in err, err
    assert main(["train", "--check"]) == 0
    assert json.loads(capsys.readouterr().out) == Recipe().to_dict()
    assert main(["train", "--check", "--set", "rank", "3"]) == 0 and '"rank": 3' in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path), "--check"]) == 2 and "training.json" in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    assert "look for status canceled" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_validate_and_adapter_commands(tmp_path, whole, monkeypatch, capsys):
    from vidgen.cli import main

    monkeypatch.setattr(adapters, "shelf", lambda: tmp_path / "shelf")
    (tmp_path / "press.yaml").write_text("- a red circle moving right on a white background\n")
    assert main(["adapter", "register", "mine", str(whole.folder)]) == 0
    assert main(["adapter", "list"]) == 0 and "mine" in capsys.readouterr().out
    assert main(["validate", "mine", "--scenarios", str(tmp_path / "press.yaml"), "--metrics", "oracle", "--steps", "2", "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["clips"]) == 2 and all(Path(p).exists() for p in found["clips"]) and found["adapter"] == whole.adapter.hash
    assert main(["adapter", "export", "mine", "--format", "merged", "--out", str(tmp_path / "merged")]) == 0
    assert vidgen.load(tmp_path / "merged").weights != vidgen.load("shapes-t2v").weights
    assert main(["adapter", "export", "mien"]) == 2 and main(["train", str(tmp_path / "none.yaml")]) == 2


def test_validate_chooses_what_applies_and_says_so(tmp_path, whole, capsys):
    from vidgen.cli import main

    (tmp_path / "press.txt").write_text("a red circle moving right on a white background\n")
    assert main(["validate", str(whole.folder), "--scenarios", str(tmp_path / "press.txt"), "--steps", "2", "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["metrics"]["after"]) >= {"temporal_stability", "oracle", "clip_score@world"} and any("of the world" in line for line in found["chosen"])
    chosen, why = validate.suited(["a glass of juice on a beach"], brand="press.json")
    assert chosen.split(",")[0] == "temporal_stability" and "oracle" not in chosen and chosen.endswith("brand_score") and "a brand is given" in why[-1]


def test_clip_is_measured_only_where_its_weights_are(monkeypatch):
    monkeypatch.setattr(validate, "at_hand", lambda name: name == validate.EYES[1])
    assert f"clip_score@{validate.EYES[1]}" in validate.suited(["a glass of juice"])[0]
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: None)
    assert "clip" not in validate.suited(["a glass of juice"])[0]
