"A plan carried out: kernels, texts kept, decoding beside, memory that runs out."
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import vidgen
from families import generator, picture, saved
from vidgen.generate import fast
from vidgen.models import attention
from vidgen.models.convolution import by_frames, conv3d
from vidgen.models.family import FAMILIES, family, load_parts, save_parts
from vidgen.models.registry import find


def ask(parts, z, txt, t=500):
    with torch.no_grad():
        return parts.family.predict(parts, z, t, txt, parts.family.extras(parts, tuple(z.shape[1:])))


@contextmanager
def watched(of, name, note):
    "The calls of one of a family's functions, each noted, meanwhile."
    really = getattr(of, name)
    object.__setattr__(of, name, lambda *given: (note(*given), really(*given))[1])
    try:
        yield
    finally:
        object.__setattr__(of, name, really)


@pytest.mark.parametrize("model", ["cogvideox-2b", "cogvideox-5b", "cogvideox1.5-5b"])
@pytest.mark.parametrize("backend", ["sdpa", "math", "flash"])
def test_every_kernel_gives_the_same_answer(model, backend):
    cog = family("cogvideox")
    stock, own = cog.tiny(model), cog.tiny(model)
    z, txt = torch.randn(2, *cog.latent_shape(stock, 9, 64, 96)), torch.randn(2, 32, 32)
    calls, really = [], attention.attend
    attention.select(own, backend)
    assert all(isinstance(b.attn1.processor, attention.Joint) and b.attn1.processor.backend == backend for b in own.transformer.transformer_blocks)
    attention.attend = lambda q, k, v, name: (calls.append(name), really(q, k, v, name))[1]
    try:
        assert torch.allclose(ask(own, z, txt), ask(stock, z, txt), atol=1e-5)
    finally:
        attention.attend = really
    assert calls == [backend] * 2


def test_the_fused_projection_is_the_one_that_is_used(tmp_path):
    "Zeroing one of the views changes the answer, an adapter in its place is asked, and saving and moving lose nothing."
    cog = family("cogvideox")
    parts, other = cog.tiny("cogvideox-5b"), cog.tiny("cogvideox-5b")
    z, txt = torch.randn(1, *cog.latent_shape(parts, 9, 64, 96)), torch.randn(1, 32, 32)
    attention.joint(parts, "sdpa")
    layer = parts.transformer.transformer_blocks[0].attn1
    block, stored = layer.one[1], sum(p.numel() for p in parts.transformer.parameters())
    assert layer.to_v.weight.data_ptr() == block[2 * len(block) // 3 :].data_ptr() and stored == sum(p.numel() for p in other.transformer.parameters())
    back = load_parts(cog, save_parts(parts, tmp_path / "saved"))
    assert torch.allclose(ask(back, z, txt), ask(parts, z, txt), atol=1e-6)
    for p in (parts, other):
        p.transformer.transformer_blocks[0].attn1.to_v.weight.data.zero_()
    assert torch.allclose(ask(parts, z, txt), ask(other, z, txt), atol=1e-5)
    from peft import LoraConfig

    for p in (parts, other):
        torch.manual_seed(0)
        p.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    assert torch.allclose(ask(parts, z, txt), ask(other, z, txt), atol=1e-5) and not torch.allclose(ask(parts, z, txt), ask(back, z, txt), atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_kernel_is_used_or_refused(name):
    parts = family(name).tiny()
    attention.select(parts)
    if name == "cosmos":
        with pytest.raises(ValueError, match="can't be chosen"):
            attention.select(parts, "math")
    else:
        assert attention.select(parts, "math") == "math"
    with pytest.raises(ValueError, match="sageattention|sdpa"):
        attention.select(parts, "sage")
    with pytest.raises(ValueError, match="flash"):
        attention.select(parts, "flahs")


def test_the_kernel_of_one_model_is_not_that_of_the_next():
    "diffusers' switch also sets a default of the process; LTX masks its text, which torch's FlashAttention refuses."
    attention.select(family("wan").tiny(), "flash")
    ltx = family("ltx").tiny()
    text = ltx.family.encode_prompt(ltx, ["a circle"], None).condition
    z = torch.randn(1, *ltx.family.latent_shape(ltx, ltx.family.rules(ltx.configs).frames[1], 64, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ltx.family.predict(ltx, z, 500.0, text, ltx.family.extras(ltx, z.shape[1:], None))


@pytest.mark.parametrize("shape", [(1, 3, 3, 5, 7), (2, 4, 9, 16, 8), (1, 8, 4, 33, 20)])
def test_convolution_by_frames(shape):
    conv = torch.nn.Conv3d(shape[1], 5, 3, padding=(0, 1, 1))
    x = torch.randn(shape)
    assert torch.allclose(conv3d(x, conv.weight, conv.bias, padding=(1, 1)), conv(x), atol=1e-5)
    with by_frames(conv):
        assert torch.allclose(conv(x).sum(), conv3d(x, conv.weight, conv.bias, padding=(1, 1)).sum(), atol=1e-3) and "_conv_forward" in vars(conv)
        assert conv(x.double().float()).dtype == torch.float32
    assert "_conv_forward" not in vars(conv)


@pytest.mark.parametrize("kwargs", [dict(stride=2), dict(dilation=2), dict(padding=1), dict(padding="same"), dict(kernel_size=1), dict(padding_mode="replicate", padding=(0, 1, 1))])
def test_other_convolutions_are_left_to_torch(kwargs):
    conv = torch.nn.Conv3d(4, 4, **({"kernel_size": 3} | kwargs))
    with by_frames(conv):
        assert "_conv_forward" not in vars(conv)


def test_two_clips_are_decoded_as_one_by_one():
    parts = family("cogvideox").tiny()
    z = torch.randn(2, *parts.family.latent_shape(parts, 17, 64, 96))
    with torch.no_grad():
        both, apart = parts.family.decode(parts, z, 17), torch.cat([parts.family.decode(parts, z[i : i + 1], 17) for i in range(2)])
    assert torch.allclose(both, apart, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_encoded_once_and_are_the_same(name):
    of = family(name)
    parts = of.tiny()
    direct, texts = of.encode_prompt(parts, ["a red circle", "a star", "a red circle"]), fast.Texts()
    calls = []
    with watched(of, "encode_prompt", lambda p, prompts, x=None: calls.append(list(prompts))):
        first, again = (texts(parts, ["a red circle", "a star", "a red circle"]) for _ in range(2))
    assert calls == [["a red circle", "a star"]]
    for found in (first, again):
        assert torch.equal(found.embeds_BLD, direct.embeds_BLD) and found.tokens == direct.tokens and found.notes == direct.notes
        assert all(torch.equal(v, direct.more[k]) for k, v in found.more.items()) and set(found.more) == set(direct.more)


def test_a_text_read_with_its_picture_is_kept_with_its_picture(tmp_path):
    hun = family("hunyuan")
    parts = hun.tiny("hunyuanvideo-i2v")
    texts, x = fast.Texts(), torch.rand(2, 3, 64, 96) * 2 - 1
    found = texts(parts, ["a star", "a star"], x)
    right = hun.encode_prompt(parts, ["a star", "a star"], x)
    assert torch.allclose(found.embeds_BLD, right.embeds_BLD, atol=1e-5) and not torch.equal(found.embeds_BLD[0], found.embeds_BLD[1])
    assert len(texts.kept) == 2 and torch.equal(texts(parts, ["a star"], x[1:]).embeds_BLD, found.embeds_BLD[1:])


def test_clips_of_many_batches_are_the_clips_of_one(tmp_path):
    "The frames of one batch are decoded beside the next: same clips, in order, in another thread."
    parts = saved(family("cogvideox"), "cogvideox-5b", tmp_path / "m")
    one, many, threads = generator(parts, 8), generator(parts, 2), []
    asked = dict(num_frames=9, height=64, width=96, num_inference_steps=2)
    whole = one.generate(["a red circle", "a star"], num_videos_per_prompt=3, **asked)
    with watched(parts.family, "decode", lambda *given: threads.append(threading.current_thread().name)):
        parts_of = many.generate(["a red circle", "a star"], num_videos_per_prompt=3, **asked)
    assert [c.made["seed"] for c in parts_of] == [c.made["seed"] for c in whole] and len(threads) == 6
    assert sum(t.startswith("vidgen-decode") for t in threads) == 4 and threads.count("MainThread") == 2
    assert all(np.abs(a.frames.astype(int) - b.frames).max() <= 1 for a, b in zip(whole, parts_of, strict=True))
    assert many.timings["decode"] > 0 and set(many.timings) >= {"load", "text", "denoise", "decode", "per_step"}


def test_an_error_while_decoding_beside_is_told(tmp_path):
    parts = saved(family("cogvideox"), "cogvideox-5b", tmp_path / "m")
    with watched(parts.family, "decode", lambda *given: 1 / 0), pytest.raises(ZeroDivisionError):
        generator(parts, 1).generate("a star", num_videos_per_prompt=3, num_frames=9, height=64, width=96, num_inference_steps=1)


def test_group_offload_changes_nothing():
    "diffusers' groups, fetched to the CPU where there is no GPU: the blocks still run under a step cache."
    from test_cache import batch_for, run

    from vidgen.generate.cache import Memory

    parts, chosen = family("cogvideox").tiny("cogvideox-5b"), (True, False, True, True, False, True)
    exact = run(parts, batch_for(parts), memory=Memory(chosen))
    parts.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(run(parts, batch_for(parts), memory=Memory(chosen)), exact)


LITTLE = """
import dataclasses, resource, warnings
from diffusers import CogVideoXTransformer3DModel
import torch, vidgen
from test_generate import generator
from vidgen.models.attention import select
torch.set_num_threads(1)
warnings.simplefilter("ignore")
gen = generator("cogvideox-2b")
parts = gen.parts
parts.transformer = CogVideoXTransformer3DModel.from_config({**parts.transformer.config, "num_attention_heads": 16, "num_layers": 1}).eval()
parts.configs["transformer"] = dict(parts.transformer.config)
select(parts, "math")
ask = dict(prompt="a red circle", num_inference_steps=1, num_frames=1, height=512, width=512)
eight = gen.plan = dataclasses.replace(gen.plan, batch=8)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for room, retry in (30, True), (900, True), (900, False):
    gen.plan, gen.notes = eight, ()
    resource.setrlimit(resource.RLIMIT_AS, (used + room * 2**20, resource.RLIM_INFINITY))
    try:
        clips = gen.generate(**ask, num_videos_per_prompt=8, retry=retry)
        print("made", len(clips), "batch", gen.plan.batch, *clips[-1].made["warnings"][:1], flush=True)
    except vidgen.errors.DoesNotFit as err:
        print("DoesNotFit:", err, flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_memory_that_really_runs_out():
    "The process may take only so many MiB more. Eight clips at once need 2,500 for the scores of their attention, one needs 400: with 30 nothing fits, with 900 one at a time."
    done = subprocess.run([sys.executable, "-c", LITTLE], capture_output=True, text=True, timeout=170, env=os.environ | {"MALLOC_ARENA_MAX": "1"}, cwd=Path(__file__).parent)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3, done.stdout + done.stderr[-2000:]
    nothing, one, refused = lines
    assert nothing.startswith("DoesNotFit: cogvideox-2b ran out of memory on cpu twice"), nothing
    assert one.startswith("made 8 batch 1 memory ran out"), one
    assert refused.startswith("DoesNotFit: cogvideox-2b ran out of memory on cpu (") and "A cheaper one was not allowed" in refused, refused


@pytest.mark.parametrize("wrong, says", [(dict(atention="sdpa"), "attention"), (dict(offload="model"), "host's memory"), (dict(quantise="int7"), "quantise"), (dict(plan="best"), "auto"),
                                         (dict(gate=2), "gate"), (dict(cache="teacache"), "needs a value"), (dict(ulysses=2), "run_parallel")])
def test_a_wrong_way_to_run_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        vidgen.load("shapes-t2v", **wrong).generate("a red circle", num_inference_steps=1)


def test_a_plan_is_taken_as_it_is():
    plan = replace(vidgen.load("shapes-t2v").plan, precision="bf16", batch=3, cache="steps:0-3,6", attention="math", tiling=True)
    gen = vidgen.load("shapes-t2v", plan=plan)
    clip = gen.generate("a red circle moving right on a white background", num_inference_steps=8)[0]
    assert gen.plan == plan and gen.parts.transformer.dtype == torch.bfloat16 and hasattr(gen.parts, "tiles") and clip.frames.shape == (17, 64, 96, 3)
    assert clip.made["plan"]["cache"] == "steps:0-3,6" and clip.made["computed_steps"] == "0-3,6" and "attention: math" in clip.made["carried_out"]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_clip():
    plain, fast_ = vidgen.load("shapes-t2v"), vidgen.load("shapes-t2v", compile=True)
    asked = dict(num_inference_steps=6, cache="steps:0-2,5", gate=0.5, seed=3)
    a, b = (g.generate("a red circle moving right on a white background", **asked)[0] for g in (plain, fast_))
    assert np.abs(a.frames.astype(int) - b.frames).max() <= 1


BARE = """
import sys
for name in ("av", "cv2", "rich", "typer", "papermill", "IPython", "jupyter", "nbdev", "open_clip", "psutil"):
    sys.modules[name] = None  # as on a GPU host that has torch, transformers and diffusers only
import runpy
sys.argv = ["benchmark", "cogvideox-5b", "wan2.1-t2v-1.3b", "--small", "--device", "cpu", "--precision", "fp32", "--steps", "4", "--rounds", "1", "--ways", "stock,exact,masked", "--out", sys.argv[1]]
runpy.run_module("vidgen.generate.benchmark", run_name="__main__", alter_sys=True)
"""


def test_the_benchmark_runs_on_a_bare_host(tmp_path):
    done = subprocess.run([sys.executable, "-c", BARE, str(tmp_path / "t.json")], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    models = json.loads((tmp_path / "t.json").read_text())["models"]
    assert [m["model"] for m in models] == ["cogvideox-5b", "wan2.1-t2v-1.3b"]
    for model in models:
        assert set(model["rows"]) == {"stock", "exact", "masked"} and all(row["whole_run"] > 0 for row in model["rows"].values()), model
        assert model["rows"]["masked"]["computed_steps"] <= 2


@pytest.mark.parametrize("of, model", [("cogvideox", "cogvideox-5b"), ("wan", "wan2.1-t2v-1.3b"), ("wan", "wan2.1-i2v-14b-480p")])
def test_an_autoencoder_with_a_memory_does_one_thing_at_a_time(tmp_path, of, model):
    "Clip by clip, decoding beside: what Wan's autoencoder keeps between frames is not another clip's."
    parts = saved(family(of), model, tmp_path / "m")
    asked = dict(num_frames=9, height=64, width=96, num_inference_steps=1)
    images = [picture(seed=i) for i in range(4)] if "i2v" in model else None
    together = generator(parts, 1).generate(["a star"] * 4, images, seed=[1, 2, 3, 4], **asked)
    alone = [generator(parts, 1).generate("a star", images and images[i], seed=i + 1, **asked)[0] for i in range(4)]
    assert all(np.abs(a.frames.astype(int) - b.frames).max() <= 1 for a, b in zip(together, alone, strict=True))


def test_guidance_that_begins_late_computes_what_is_not_remembered():
    "At the first steps of the dynamic schedule the scale is 1 and one answer is asked; later two are."
    gen = vidgen.load("shapes-t2v")
    clips = gen.generate(["a red circle", "a blue star"], guidance="dynamic", num_inference_steps=50, cache="steps:0,20")
    computed = clips[0].made["computed_steps"]
    assert computed.startswith("0,") and computed != "0,20" and len(computed.split(",")) == 3


def test_another_precision_is_adopted_with_its_own_texts():
    gen = vidgen.load("shapes-t2v")
    ask = dict(prompt="a red circle moving right on a white background", num_inference_steps=3)
    before = gen.generate(**ask)[0]
    fast.adopt(gen, replace(gen.plan, precision="bf16", tiling=True))
    after = gen.generate(**ask)[0]
    assert after.made["precision"] == "bf16" and fast.TILES in after.made["carried_out"] and np.abs(after.frames.astype(int) - before.frames).mean() < 8
    fast.adopt(gen, replace(gen.plan, tiling=False))
    assert "carried_out" not in gen.generate(**ask)[0].made and not hasattr(gen.parts, "tiles")


def test_a_plan_that_cannot_be_adopted_leaves_the_generator_alive():
    gen = vidgen.load("shapes-t2v")
    with pytest.raises(ValueError):
        fast.adopt(gen, replace(gen.plan, attention="sage"))
    assert gen.generate("a red circle", num_inference_steps=1)[0].made["precision"] == "fp32" and gen.plan.attention == "auto"


@pytest.mark.parametrize("wrong, says", [(dict(cache="typo:1"), "step cache"), (dict(cache="teacache:0.1,3"), "not a number"), (dict(cache="steps:0,5-3"), "backwards"), (dict(precision="bf16", plan="given"), "contradicts")])
def test_load_refuses_at_once(wrong, says):
    plan = {"plan": vidgen.load("shapes-t2v").plan} if wrong.get("plan") == "given" else {}
    with pytest.raises(ValueError, match=says):
        gen = vidgen.load("shapes-t2v", **(wrong | plan))
        gen.generate("a red circle", num_inference_steps=8)


def test_the_plan_auto_is_carried_out():
    gen = vidgen.load("shapes-t2v", plan="auto")
    assert gen.plan.memory and gen.plan.seconds and gen.generate("a red circle", num_inference_steps=1)


def test_a_fused_adapter_follows_to_weights_in_eight_bits(tmp_path):
    "The ladder of memory that runs out comes to fp8 storage: there the adapter stays attached, where it would be rounded away in the weights."
    from safetensors.torch import save_file

    from vidgen.generate import adapters

    gen, ask = vidgen.load("shapes-t2v"), dict(prompt="a red circle moving right on a white background", num_inference_steps=2, num_frames=9)
    torch.manual_seed(0)
    layers = {n: m for n, m in gen.parts.transformer.named_modules() if n.endswith((".to_q", ".to_v"))}
    save_file({f"transformer.{n}.lora_{x}.weight": 0.05 * torch.randn(*((2, m.in_features) if x == "A" else (m.out_features, 2))) for n, m in layers.items() for x in "AB"}, tmp_path / "fox.safetensors")
    adapters.attach(gen, tmp_path / "fox.safetensors")
    adapters.fuse(gen)
    before = gen.generate(**ask)[0]
    fast.adopt(gen, replace(gen.plan, storage="fp8"))
    small = gen.generate(**ask)[0]
    assert before.made["adapters"]["fox"]["fused"] and "fused" not in small.made["adapters"]["fox"] and small.made["plan"]["storage"] == "fp8"
    adapters.detach(gen)
    assert (gen.generate(**ask)[0].frames != small.frames).any()


def test_a_plan_for_another_model_is_refused():
    plan, folder = vidgen.estimate("shapes-t2v"), find("shapes-t2v")
    with pytest.raises(ValueError, match="this plan is for shapes-t2v.*estimate\\('shapes-i2v'\\)"):
        vidgen.load("shapes-i2v", plan=plan)
    for name, own in (("shapes-t2v", plan), ("shapes-t2v", replace(plan, model="")), (folder, vidgen.estimate(folder)), (str(folder), plan)):
        assert vidgen.load(name, plan=own).plan == own


def test_a_large_model_gets_the_threads_back(monkeypatch):
    from vidgen.models import registry

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(registry, "_lowered", {})
    small, large, own = replace(vidgen.estimate("shapes-t2v"), device="cpu", weight_gib=0.1), replace(vidgen.estimate("shapes-t2v"), device="cpu", weight_gib=9.0), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = [(registry.set_threads(plan), torch.get_num_threads())[1] for plan in (large, small, small, large, small, large)]
        assert found == [3, 1, 1, 3, 1, 3]
        registry.set_threads(small)
        torch.set_num_threads(2)   # somebody else's word
        assert [(registry.set_threads(plan), torch.get_num_threads())[1] for plan in (large, small, large)] == [2, 1, 2]
    finally:
        torch.set_num_threads(own)
