"""The ONNX generator beside torch: the same clip in float32, nearly the same in INT8, and a folder that is whole or not there."""
import json
import os
import shutil
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import WORDS, picture

from vidgen.errors import CorruptWeights, WeightsMissing
from vidgen.generate import graph, onnx, profiles
from vidgen.generate.generator import Generator
from vidgen.generate.onnx import export, load_onnx, read, trajectories
from vidgen.models.family import family
from vidgen.models.plan import Plan
from vidgen.progress import Cancel

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def tiny(name, of="cogvideox", frames=9):
    parts = family(of).tiny(name, words=WORDS)
    entry = replace(parts.family.describe(parts.configs, "tiny", parts.task), num_frames=frames, height=64, width=96, num_inference_steps=3)
    return Generator(parts, entry, Plan("tiny", "cpu", "fp32", 0.1, 0.1, 8.0, 2))


pytestmark = pytest.mark.timeout(600)   # tracing an autoencoder takes some 20 s of a processor that others may want


@pytest.fixture(scope="module")
def gen():
    return tiny("cogvideox-5b")


@pytest.fixture(scope="module")
def folder(gen, tmp_path_factory):
    place = tmp_path_factory.mktemp("onnx") / "tiny"
    export(gen, place)
    return place


@pytest.fixture(scope="module")
def int8(gen, folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("onnx8") / "tiny"
    export(gen, place, int8=True, prompts=["a red circle", "a blue star moving left"], steps=4, smallest=24, graphs=folder)
    return place


def latents(gen, prompt="a red circle moving right", **options):
    "Latents after every step, all batches in a row."
    seen = []
    gen.generate(prompt, callback=lambda i, t, z: seen.append(z), **options)
    return torch.cat(seen)


def test_float32_is_torch(gen, folder):
    other = load_onnx(folder)
    other.plan = replace(other.plan, batch=gen.plan.batch)
    for options in (dict(seed=3), dict(seed=9, negative_prompt="a star"), dict(seed=3, guidance_scale=1.0), dict(seed=4, num_videos_per_prompt=3), dict(seed=1, num_inference_steps=5, guidance="dynamic")):
        assert (latents(gen, **options) - latents(other, **options)).abs().max() < 1e-4, options
    a, b = (g.generate(["a red circle", "a blue star"], seed=[5, 2]) for g in (gen, other))
    assert max(np.abs(x.frames.astype(int) - y.frames).max() for x, y in zip(a, b, strict=True)) <= 1


def test_a_clip_owns_its_seed_whatever_the_batch(int8):
    one = load_onnx(int8)
    together = one.generate(["a red circle", "a blue star", "a star"], seed=7)
    alone = [one.generate(p, seed=7 + i)[0] for i, p in enumerate(["a red circle", "a blue star", "a star"])]
    assert max(np.abs(a.frames.astype(int) - b.frames).max() for a, b in zip(together, alone, strict=True)) <= 1
    assert together[0].hash != together[1].hash


def test_int8_is_near_and_counted(gen, int8):
    exact, rough = latents(gen, seed=3), latents(load_onnx(int8), seed=3)
    assert 0 < (exact - rough).norm() / exact.norm() < 0.05
    made = read(int8)
    assert made.int8["layers"] == 12
    run = graph.fused(int8 / "transformer/model.onnx")
    assert run["MatMulIntegerToFloat"] + run["QLinearMatMul"] + run["QGemm"] == 12, "what runs, not what was asked"


def test_the_record_says_what_ran(int8, folder):
    rough, exact = load_onnx(int8), load_onnx(folder)
    made = rough.generate("a red circle", seed=1)[0].made
    assert made["engine"].startswith("onnxruntime") and made["int8"]["layers"] == 12 and "ONNX INT8" in made["plan"]["model"]
    assert exact.generate("a red circle", seed=1)[0].made["int8"] is None
    assert rough.weights != exact.weights and exact.weights == read_facts(folder)["weights"]


def read_facts(folder):
    return json.loads((folder / "onnx.json").read_text())


def test_the_torch_weights_are_not_there(folder, int8):
    for place in (folder, int8):
        held = {p.relative_to(place).as_posix() for p in place.rglob("*.safetensors")}
        assert held == {"text_encoder/model.safetensors"}


@pytest.mark.parametrize(("options", "says"), [
    (dict(num_frames=17), "makes clips of 9 frames"), (dict(height=128), "export the model again"), (dict(width=64), "not of"), (dict(image=picture()), "can't use an image"),
    (dict(num_inference_steps=0), "from 1 up"), (dict(guidance="dynmic"), "dynamic"),
])
def test_what_it_cant_do_is_refused(folder, options, says):
    with pytest.raises(ValueError, match=says):
        load_onnx(folder).generate("a red circle", **options)


def test_calibration_sees_every_step_of_both_branches(gen):
    calls = trajectories(gen, ["a red circle", "a star"], steps=4)
    assert len(calls) == 8 and len({int(c["timestep"][0]) for c in calls}) == 4
    assert all(len(c["encoder_hidden_states"]) == 2 and not torch.equal(*c["encoder_hidden_states"]) for c in calls)
    clean, noisy = calls[3]["hidden_states"], calls[0]["hidden_states"]
    assert not torch.allclose(clean, noisy) and not gen.parts.transformer._forward_pre_hooks, "the hook is gone"


def test_a_bad_range_is_what_calibration_prevents(gen, folder, tmp_path):
    "Ranges from inputs a tenth as loud cut the rest off: the check that they matter at all."
    feeds = trajectories(gen, ["a red circle"], steps=4)
    faint = [{k: v * 0.05 if k == "hidden_states" else v for k, v in f.items()} for f in feeds]
    exact, far = graph.Graph(folder / "transformer/model.onnx"), {}
    for name, given in {"real": feeds, "faint": faint}.items():
        graph.to_int8(folder / "transformer/model.onnx", tmp_path / f"{name}.onnx", given, smallest=24)
        far[name] = max(float((graph.Graph(tmp_path / f"{name}.onnx")(**f) - exact(**f)).norm()) for f in feeds)
    assert far["faint"] > 1.5 * far["real"]


def test_a_folder_is_whole_or_not_there(gen, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(onnx, "_save_rest", broken)
    monkeypatch.setattr(onnx, "_graphs", lambda *a: {"nodes": {}, "difference": {}})
    with pytest.raises(OSError, match="full"):
        export(gen, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_graphs_of_something_else_are_not_taken_over(gen, folder, int8, tmp_path):
    other = tiny("cogvideox-5b")
    other.parts.transformer.proj_out.bias += 1
    for who, source, more in ((other, folder, {}), (gen, int8, {}), (gen, folder, dict(num_frames=17))):
        with pytest.raises(ValueError, match="another model, size or kind"):
            export(who, tmp_path / "x", graphs=source, **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("there", "overwrite", "says"), [("someones.txt", False, "something else"), ("someones.txt", True, "something else"), ("onnx.json", False, "--overwrite")])
def test_nothing_is_replaced_unasked(gen, tmp_path, there, overwrite, says):
    (tmp_path / there).write_text("{}")
    with pytest.raises(FileExistsError, match=says):
        export(gen, tmp_path, overwrite=overwrite)
    assert (tmp_path / there).read_text() == "{}"


def test_damage_is_named(folder, tmp_path):
    whole = shutil.copytree(folder, tmp_path / "x")
    (whole / "vae/decoder.onnx").write_bytes((whole / "vae/decoder.onnx").read_bytes()[:-100])
    with pytest.raises(CorruptWeights, match="decoder.onnx"):
        load_onnx(whole)
    (whole / "transformer/model.onnx").unlink()
    with pytest.raises(WeightsMissing, match="model.onnx is missing"):
        load_onnx(whole)
    with pytest.raises(WeightsMissing, match="vidgen export"):
        load_onnx(tmp_path)


@pytest.mark.parametrize(("change", "says"), [(lambda g: g.parts.transformer.to(torch.bfloat16), "bfloat16"), (lambda g: setattr(g.parts, "device", "cuda"), "on cuda")])
def test_only_what_was_trained_is_exported(tmp_path, change, says):
    other = tiny("cogvideox-5b")
    change(other)
    with pytest.raises(ValueError, match=says):
        export(other, tmp_path / "x")


def test_an_export_is_not_exported_again(folder, tmp_path):
    with pytest.raises(ValueError, match="runs from ONNX already"):
        export(load_onnx(folder), tmp_path / "x")


def test_the_model_is_as_before(gen, folder):
    "Exporting borrows the processors and convolutions of the model and gives them back."
    assert {type(b.attn1.processor).__name__ for b in gen.parts.transformer.transformer_blocks} == {"CogVideoXAttnProcessor2_0"}
    assert not any("forward" in vars(m) for part in (gen.parts.transformer, gen.parts.vae) for m in part.modules())


def test_without_onnx_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"vidgen\[onnx\]"):
        load_onnx(folder)


def test_a_larger_graph_keeps_its_weights_outside(gen, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "ONE_FILE", 0)
    size, path = (9, 64, 96), tmp_path / "model.onnx"
    graph.to_onnx(gen.parts, "transformer", size, path)
    assert (tmp_path / "model.onnx.data").is_file()
    feed = graph.split(graph.asked(gen.parts, "transformer", size), graph.asked(gen.parts, "transformer", size, batch=3))[0]
    graph.to_int8(path, tmp_path / "int8.onnx", [feed], smallest=24)
    assert (graph.Graph(path)(**feed) - graph.Graph(tmp_path / "int8.onnx")(**feed)).abs().max() < 0.1


def test_threads_share_a_session(int8):
    one, made = load_onnx(int8), {}
    alone = [one.generate("a red circle", seed=s)[0].hash for s in (1, 2)]
    work = [threading.Thread(target=lambda s=s: made.update({s: one.generate("a red circle", seed=s)[0].hash})) for s in (1, 2)]
    for t in work:
        t.start()
    for t in work:
        t.join()
    assert [made[1], made[2]] == alone


def test_cancel_stops_between_steps(folder):
    from vidgen.errors import Canceled

    stop, seen = Cancel(), []
    with pytest.raises(Canceled):
        load_onnx(folder).generate("a red circle", cancel=stop, callback=lambda i, t, z: (seen.append(i), stop.cancel()))
    assert seen == [0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("of", "name", "frames"), [("cogvideox", "cogvideox-2b", 9), ("cogvideox", "cogvideox1.5-5b-i2v", 17), ("cogvideox", "cogvideox-5b-i2v", 9),
                                                    ("wan", "wan2.1-t2v-1.3b", 9), ("wan", "wan2.1-i2v-14b-480p", 9)])
def test_every_kind_of_the_two_families(of, name, frames, tmp_path):
    first = tiny(name, of, frames)
    asks = dict(image=picture(), seed=2) if first.entry.task == "i2v" else dict(seed=2)
    export(first, tmp_path / "x")
    assert (latents(first, **asks) - latents(load_onnx(tmp_path / "x"), **asks)).abs().max() < 1e-4
    export(first, tmp_path / "y", int8=True, graphs=tmp_path / "x", prompts=["a red circle"], images=[picture()] if "image" in asks else None, steps=3, smallest=24)
    assert (latents(first, **asks) - latents(load_onnx(tmp_path / "y"), **asks)).norm() / latents(first, **asks).norm() < 0.1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are bound to cores on Linux alone")
def test_a_profile_of_one_thread_has_one_core():
    "Frames are decoded beside the next clip; without the binding that took a second core from a profile of one thread."
    found = profiles.measured(replace(profiles.cpu(threads=1), num_inference_steps=1), "shapes-t2v", {}, ["a red circle"], latencies=1)
    assert found["status"] == "measured" and found["cores"] == 1, found
