"""What the processes of tests/test_parallel.py do: tiny models asked alone and together, and the differences."""
import os
import pickle
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from vidgen.generate import baseline, parallel
from vidgen.generate.guidance import schedule
from vidgen.generate.launch import serve
from vidgen.generate.sequence import Split, agree, join, shares
from vidgen.models import cogvideox, wan

EVEN, UNEVEN = (9, 64, 96), (5, 48, 80)   # 72 video tokens, and 30, which neither 4 nor 4 x 30 words divide
MODELS = {"cogvideox-2b": EVEN, "cogvideox-5b": UNEVEN, "cogvideox-5b-i2v": EVEN, "cogvideox1.5-5b-i2v": (17, 48, 80), "wan2.1-t2v-1.3b": UNEVEN, "wan2.1-i2v-14b-480p": EVEN}
ALONE = {}


def tiny(name):
    "A tiny model with four heads, so that four processes can share them."
    from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel

    of = wan if name.startswith("wan") else cogvideox
    parts = of.tiny(name, words=("red", "circle"))
    config = of.transformer_config(name, small=True) | {"num_attention_heads": 4}
    config |= {"added_kv_proj_dim": 48} if config.get("added_kv_proj_dim") else {"max_text_seq_length": 30} if of is cogvideox else {}
    torch.manual_seed(1)
    net = (WanTransformer3DModel if of is wan else CogVideoXTransformer3DModel)(**config)
    parts.components["transformer"] = net.eval().requires_grad_(False)
    if of is cogvideox:
        parts.vae.enable_tiling(32, 48, 1 / 2, 1 / 3)  # tiles that diffusers and we cut alike
        parts.vae.disable_tiling()
    else:
        parts.vae.tile_sample_min_height, parts.vae.tile_sample_min_width, parts.vae.tile_sample_stride_height, parts.vae.tile_sample_stride_width = 32, 48, 24, 32
    return parts


def prepared(parts, size, scale=3.0):
    "The arguments of `baseline.denoise` for two steps, in one function that gives the latents."
    frames, height, width = size
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1 if parts.task == "i2v" else None
    batch = baseline.Batch(("red circle",), ("",), (7,), frames, height, width, 2, schedule("constant", scale), image)
    text, empty = (parts.family.encode_prompt(parts, [p]).condition for p in ("red circle", ""))
    given = None if image is None else parts.family.encode_image(parts, image, batch.generators(), frames)

    @torch.no_grad()
    def latents():
        return baseline.denoise(parts, batch, text, empty, given, batch.generators(), baseline.Watch())

    return latents


def hooks(parts):
    "Everything a split could leave behind."
    modules = [m for part in (parts.transformer, parts.vae) for m in part.modules()]
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules] + [m.processor for m in modules if hasattr(m, "processor")] + [sorted(parts.vae.__dict__)]


def apart(a, b):
    "The largest difference."
    assert a.shape == b.shape and float(a.abs().max()) > 0.1, "a difference from nothing says nothing"
    return float((a - b).abs().max())


def asked_alone():
    "{model: (its parts, a function that denoises, what it gives in one process)}, made once before the processes part."
    with torch.no_grad():
        return {name: ((parts := tiny(name)), (latents := prepared(parts, size)), latents()) for name, size in MODELS.items()}


def equal(payload, world):
    "For every split and model: the largest difference from one process; does the model come out as it went in?"
    found = {}
    before = {name: hooks(parts) for name, (parts, *_) in ALONE.items()}
    for split in payload:
        mesh = join(Split(**split), timeout=world.timeout)
        for name, (parts, latents, alone) in ALONE.items():
            with parallel.split(parts, mesh):
                found[f"{name}, {mesh.split}"] = apart(alone, latents())
    assert before == {name: hooks(parts) for name, (parts, *_) in ALONE.items()}
    return found


@contextmanager
def one_block(net, name):
    "The transformer's blocks behind one module meanwhile, as a step cache has them; it notes what passes."
    blocks, seen = getattr(net, name), []

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks

        def forward(self, hidden_states, *args, **kwargs):
            seen.append(hidden_states.shape[1])
            if args:
                for block in self.blocks:
                    hidden_states = block(hidden_states, *args)
                return hidden_states
            for block in self.blocks:
                hidden_states, kwargs["encoder_hidden_states"] = block(hidden_states, **kwargs)
            return hidden_states, kwargs["encoder_hidden_states"]

    setattr(net, name, nn.ModuleList([Body()]))
    try:
        yield seen
    finally:
        setattr(net, name, blocks)


def company(payload, world):
    "A split among a step cache's replacement of the blocks, either outside; compiled blocks, fused projections; one pass without guidance."
    found, mesh = {}, join(Split(ulysses=2, ring=world.size // 2), timeout=world.timeout)
    halves = join(Split(cfg=2, ulysses=world.size // 2), timeout=world.timeout)
    for name, blocks in (("cogvideox-5b", "transformer_blocks"), ("wan2.1-t2v-1.3b", "blocks")):
        parts, latents, alone = ALONE[name]
        with parallel.split(parts, mesh), one_block(parts.transformer, blocks) as seen:
            found[f"{name}, split then block"] = apart(alone, latents())
        with one_block(parts.transformer, blocks), parallel.split(parts, mesh):
            found[f"{name}, block then split"] = apart(alone, latents())
        assert seen == [shares(30, world.size)[world.rank]] * 2, seen
        unguided = prepared(parts, UNEVEN, scale=1.0)
        one_pass = unguided()
        with parallel.split(parts, halves):
            found[f"{name}, without guidance"] = apart(one_pass, unguided())
        if world.size == 2:
            [b.compile(backend="eager") for b in getattr(parts.transformer, blocks)]
            with parallel.split(parts, mesh):
                found[f"{name}, compiled"] = apart(alone, latents())
            [setattr(b, "_compiled_call_impl", None) for b in getattr(parts.transformer, blocks)]
        [b.attn1.fuse_projections() for b in getattr(parts.transformer, blocks)]
        with parallel.split(parts, mesh):
            found[f"{name}, fused"] = apart(alone, latents())
    assert agree(world.rank, mesh) == (world.size - 1) / 2
    return found


def decoded(payload, world):
    "Frames by several processes, for each family: the difference of tiles from diffusers' tiles by one, of tiles from one piece, of one piece from one piece."
    found, mesh = {}, join(Split(ring=world.size), timeout=world.timeout)
    for name in ("cogvideox-2b", "wan2.1-t2v-1.3b"):
        parts = ALONE[name][0]
        z = torch.randn(2, 3, 4, 12, 18, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            whole = parts.family.decode(parts, z, 9)
            parts.vae.use_tiling = True
            alone = parts.family.decode(parts, z, 9)
            parts.vae.use_tiling = False
            with parallel.split(parts, mesh, tiling=True):
                x = parts.family.decode(parts, z, 9)
            with parallel.split(parts, mesh):
                first = parts.family.decode(parts, z, 9)
        assert x.shape == first.shape == alone.shape and (mesh.first or not x.any() and not first.any())
        found[name] = (apart(alone, x), apart(whole, x), apart(whole, first)) if mesh.first else (0.0, 1.0, 0.0)
    return found


def traffic(payload, world):
    "Bytes that this process sent in one pass of tiny Wan (72 video tokens, width 48, 2 layers), for each split; by Ulysses with four heads."
    found, parts = {}, ALONE["wan2.1-t2v-1.3b"][0]
    for split in payload:
        mesh = join(Split(**split), timeout=world.timeout)
        z = torch.randn(2, 3, 4, 8, 12)
        with torch.no_grad(), parallel.split(parts, mesh):
            parts.family.predict(parts, z, 500, torch.zeros(2, 512, 32), {})
        found[str(mesh.split)] = mesh.sent
    return found


def refused(payload, world):
    "What the split says to a clip with fewer tokens than processes, in a world that is otherwise fine."
    parts, mesh = ALONE["wan2.1-t2v-1.3b"][0], join(Split(ring=world.size), timeout=world.timeout)
    try:
        with torch.no_grad(), parallel.split(parts, mesh):
            parts.family.predict(parts, torch.randn(1, 1, 4, 2, 2), 500, torch.zeros(1, 512, 32), {})
    except ValueError as err:
        return str(err)


def everything(payload, world):
    "All of the above in one world: starting one takes longer than the work."
    return {"equal": equal(payload["splits"], world), "company": company(None, world), "decoded": decoded(None, world),
            "traffic": traffic(payload["splits"], world), "refused": refused(None, world)}


def worlds(folders):
    "One world for each folder, one after the other, their processes forked from this one: diffusers takes longer to import than all the work."
    torch.set_num_threads(1)
    ALONE.update(asked_alone())
    for folder in folders:
        size = pickle.loads((Path(folder) / "work").read_bytes())[2]["size"]
        children = []
        for rank in range(size):
            if not (child := os.fork()):
                serve(folder, rank)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


def dies(payload, world):
    "One process is killed, fails or hangs while the other waits for it."
    import torch.distributed as dist

    if world.rank == 1:
        if payload == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if payload == "fails":
            raise OSError("the disk of process one is full")
        time.sleep(600)
    dist.barrier()

