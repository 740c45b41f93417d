"""Eight bits: only the layers that may, all of those that should, and nothing half done when something is wrong."""
import sys

import pytest
import torch
from families import company, generator, ours

from vidgen.generate.quantised import KINDS, choose, quantise, quantised_layers, store_fp8, tensor_bytes, weight_bytes
from vidgen.models.family import family

ANYWHERE = [k for k in KINDS if k != "fp8-dynamic"]
JOINT = {f"attn1.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")}
BOTH = JOINT | {n.replace("attn1", "attn2") for n in JOINT}
TINY = {"cogvideox": "cogvideox-5b", "wan": "wan2.1-t2v-1.3b"}


def tiny(name):
    return family(name).tiny(TINY[name])


@pytest.mark.parametrize("kind", ANYWHERE)
@pytest.mark.parametrize("name", TINY)
def test_the_chosen_layers_and_no_others(name, kind):
    pytest.importorskip("torchao")
    parts, before = tiny(name), tiny(name)
    exact = ours(before, "a red circle")
    report = quantise(parts, kind, smallest=24)
    chosen, left = choose(before.transformer, smallest=24)
    assert {n.split(".", 2)[2] for n in chosen} == {"cogvideox": JOINT | {"ff.net.0.proj", "ff.net.2"}, "wan": BOTH | {"ffn.net.0.proj", "ffn.net.2"}}[name], "attention and feed-forward, no norm"
    assert quantised_layers(parts.transformer) == chosen and (report.layers, report.of) == (len(chosen), len(chosen) + left.total())
    same = {n: p for n, p in before.transformer.named_parameters() if n.removesuffix(".weight") not in chosen}
    assert all(torch.equal(parts.transformer.get_parameter(n), p) for n, p in same.items())
    assert report.bytes_before == weight_bytes(before.transformer) and report.bytes_after == weight_bytes(parts.transformer) < report.bytes_before
    assert 0 < (ours(parts, "a red circle") - exact).abs().max() < 0.1


def test_bytes_are_those_inside():
    ao = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Linear(64, 32, bias=False)
    ao.quantize_(layer, ao.Int8WeightOnlyConfig(set_inductor_config=False))
    assert layer.weight.dtype == torch.float32, "it calls itself float32"
    assert 64 * 32 < tensor_bytes(layer.weight) < 1.2 * 64 * 32


@pytest.mark.parametrize("kind", ["int8-dynamic", "int8-weight"])
def test_company_changes_no_clip(kind):
    pytest.importorskip("torchao")
    parts = tiny("cogvideox")
    quantise(parts, kind, smallest=24)
    assert company(parts, quantise=kind) <= 1


@pytest.mark.parametrize(("how", "says"), [
    (dict(kind="int9-weight"), "nearest: int8-weight"), (dict(kind="fp8-dynamic"), "capability 8.9"), (dict(kind="int8-weight", components=("transfomer",)), "nearest: transformer"),
    (dict(kind="int8-weight", components=("transformer", "tokenizer")), "unknown component"), (dict(kind="int8-weight", smallest=1000), "nothing to quantise"),
    (dict(kind="int8-weight", smallest=24, components=("transformer", "vae")), "the vae"),
])
def test_a_refusal_touches_nothing(how, says):
    pytest.importorskip("torchao")
    parts = tiny("cogvideox")
    with pytest.raises(ValueError, match=says):
        quantise(parts, **how)
    assert not quantised_layers(parts.transformer)


def test_twice_is_refused():
    pytest.importorskip("torchao")
    parts = tiny("cogvideox")
    quantise(parts, "int8-weight", smallest=24)
    with pytest.raises(ValueError, match="quantised already"):
        quantise(parts, "int8-dynamic", smallest=24)


def test_without_torchao_the_extra_is_named(monkeypatch):
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"vidgen\[quant\]"):
        quantise(tiny("cogvideox"), "int8-weight", smallest=24)


@pytest.mark.parametrize("name", TINY)
def test_fp8_storage(name):
    parts, before = tiny(name), tiny(name)
    report = store_fp8(parts)
    held = [p for p in parts.transformer.parameters() if p.dtype == torch.float8_e4m3fn]
    assert report.layers and held and all(p.dtype == torch.float32 for n, p in parts.transformer.named_parameters() if "norm" in n)
    assert report.bytes_before - report.bytes_after == 3 * sum(p.numel() for p in held)
    assert 0 < (ours(parts, "a star") - ours(before, "a star")).abs().max() < 0.1
    assert all(p.dtype == torch.float8_e4m3fn for p in held), "cast down again after use"
    with pytest.raises(ValueError, match="already"):
        store_fp8(parts)


def test_fp8_storage_computes_in_what_was_asked():
    parts, seen = tiny("cogvideox"), set()
    store_fp8(parts, "fp32")
    parts.transformer.transformer_blocks[0].attn1.to_q.register_forward_hook(lambda m, a, out: seen.add(out.dtype))
    generator(parts).generate("a star", num_frames=9, height=64, width=96, num_inference_steps=1)
    assert seen == {torch.float32}
