"""One clip on several processes: the same clip, and a reason when a process dies. Real gloo processes, one world per size."""
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from vidgen.generate import parallel, sequence
from vidgen.generate.launch import _leave as leave
from vidgen.generate.launch import launch, why
from vidgen.generate.sequence import Split, check, shares, spans, splits
from vidgen.progress import Cancel, Progress

WAYS = {2: [{"ulysses": 2}, {"ring": 2}, {"cfg": 2}],
        4: [{"ulysses": 4}, {"ring": 4}, {"ulysses": 2, "ring": 2}, {"cfg": 2, "ulysses": 2}, {"cfg": 2, "ring": 2}]}
CLOSE = 1e-5


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    "What the processes of each world found: of two, then of four."
    folders = {size: tmp_path_factory.mktemp(f"world{size}") for size in WAYS}
    for size, folder in folders.items():
        leave(folder / "work", ("parallel_cases:everything", {"splits": WAYS[size]}, {"rank": 0, "size": size, "backend": "gloo", "timeout": 60.0, "folder": ""}))
    done = subprocess.run([sys.executable, "-c", f"import parallel_cases; parallel_cases.worlds({list(map(str, folders.values()))!r})"],
                          stdin=os.pipe()[0], env=env(), capture_output=True, text=True, timeout=160)
    assert done.returncode == 0, done.stderr
    for size, folder in folders.items():
        assert not list(folder.glob("error-*")), why([1] * size, folder)
    return {size: [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(size)] for size, folder in folders.items()}


@pytest.fixture(params=WAYS)
def world(request, worlds):
    return request.param, worlds[request.param]


def env():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def far(found, what):
    "The cases whose latents differ from those of one process, by process."
    return {(rank, case): d for rank, process in enumerate(found) for case, d in process[what].items() if not d < CLOSE}


@pytest.mark.timeout(170)
def test_the_same_clip(world):
    size, found = world
    assert all(len(process["equal"]) == 6 * len(WAYS[size]) for process in found)
    assert not far(found, "equal")


@pytest.mark.timeout(170)
def test_together_with_a_step_cache_fused_projections_and_no_guidance(world):
    assert not far(world[1], "company")


@pytest.mark.timeout(170)
def test_tiles_by_several_processes_are_diffusers_tiles(world):
    for process in world[1]:
        for name, (from_tiles, from_whole, first) in process["decoded"].items():
            assert from_tiles < CLOSE < from_whole and first < CLOSE, name


@pytest.mark.timeout(170)
def test_bytes_sent_are_those_of_the_model(world):
    from vidgen.generate.traffic import communication

    size, found = world
    for split in WAYS[size]:
        wanted = communication(72, 48, 2, **split, batch=2, bytes_per_value=4, answer=16)
        sent = {process["traffic"][str(Split(**split))] for process in found}
        assert sent == {wanted}, split


@pytest.mark.timeout(170)
def test_too_few_tokens_are_refused_by_every_process(world):
    size, found = world
    assert {process["refused"] for process in found} == {f"1 tokens can't be shared by {size} processes: ask for a larger clip or for fewer processes"}


@pytest.mark.parametrize(("how", "says"), [("killed", "process 1 of 2 was ended by SIGKILL"), ("fails", "process 1 of 2 failed: OSError: the disk of process one is full"),
                                           pytest.param("hangs", "process 0 of 2 failed", marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_all_and_says_why(how, says):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=says) as err:
        launch("parallel_cases:dies", how, processes=2, timeout=4 if how == "hangs" else 300)
    assert time.monotonic() - start < 100
    if how == "fails":
        assert "parallel_cases.py" in str(err.value), "where in the code"


def test_nobody_is_left_behind():
    cancel = Cancel()
    cancel.cancel("enough")
    before = set(_children())
    with pytest.raises(Exception, match="enough"):
        launch("parallel_cases:dies", "hangs", processes=2, cancel=cancel)
    assert set(_children()) == before


def _children():
    import psutil

    return [p.pid for p in psutil.Process().children(recursive=True)]


def test_shares_and_spans():
    for tokens in (1, 7, 30, 226, 17_550):
        for parts in (1, 2, 3, 4, 8):
            sizes = shares(tokens, parts)
            assert sum(sizes) == tokens and max(sizes) - min(sizes) <= 1
            assert [i for s in spans(sizes) for i in range(tokens)[s]] == list(range(tokens))


@pytest.mark.parametrize(("heads", "processes"), [(12, 8), (30, 12), (48, 8), (40, 6), (4, 4), (7, 5)])
def test_every_offered_split_is_valid_and_every_valid_one_offered(heads, processes):
    offered = splits(heads, processes)
    assert len(offered) == len(set(offered))
    for split in offered:
        check(split, heads, processes=processes)
    for u in range(1, processes + 1):
        for r in range(1, processes + 1):
            for c in (1, 2):
                valid = u * r * c == processes and heads % u == 0
                assert (Split(u, r, c) in offered) == valid


def test_teams_cover_everyone_once():
    for split in (Split(2, 2, 2), Split(4, 1, 2), Split(1, 3), Split(3, 2)):
        for kind, groups in sequence.teams(split).items():
            assert sorted(r for g in groups for r in g) == list(range(split.processes)), kind
            size = {"ulysses": split.ulysses, "ring": split.ring, "cfg": split.cfg, "clip": split.shares, "everyone": split.processes}[kind]
            assert {len(g) for g in groups} == {size}


@pytest.mark.parametrize(("asked", "says"), [
    (dict(ulysses=8), "12 heads can't be shared by ulysses=8.*cfg 2 x ulysses 4.*ulysses 4 x ring 2.*ring 8"), (dict(ulysses=3, processes=8), "needs 3 processes and there are 8"),
    (dict(cfg=3), "1 or 2"), (dict(ring=0), "ring=0 must be a whole number"), (dict(ulysses=2.0), "must be a whole number"), (dict(processes=True), "processes=True"),
    (dict(cfg=2, guided=False), "nothing to share")])
def test_a_wrong_split_is_refused_with_the_right_ones(asked, says):
    with pytest.raises(ValueError, match=says):
        parallel.choose(12, **{"processes": None, "ulysses": 1, "ring": 1, "cfg": 1} | asked)


def test_what_cannot_be_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="option 'num_inference_step'; nearest: num_inference_steps"):
        parallel.run_parallel("shapes-t2v", "a", processes=2, num_inference_step=3)
    with pytest.raises(ValueError, match="backend 'glo'; nearest: gloo"):
        parallel.run_parallel("shapes-t2v", "a", processes=2, backend="glo")
    with pytest.raises(ValueError, match="2 processes need as many GPUs"):
        parallel.run_parallel("shapes-t2v", "a", processes=2, device="cuda")
    with pytest.raises(ValueError, match="4 heads can't be shared by ulysses=3"):
        parallel.run_parallel("shapes-t2v", "a", ulysses=3)
    with pytest.raises(ValueError, match="nothing to share"):
        parallel.run_parallel("shapes-t2v", "a", cfg=2, guidance_scale=1)


def test_the_cache_and_the_gate_of_a_plan_are_looked_at_too():
    "What a loaded generator brings along is refused like what a request asks, and so is what `auto` means."
    from families import generator

    from vidgen.generate.sequence import Split
    from vidgen.models.family import family

    gen, ask = generator(family("cogvideox").tiny()), [{"prompt": "a", "num_inference_steps": 2}]
    for plan, split, says in (({"cache": "firstblock:0.1"}, Split(2, 1, 1), "firstblock"), ({"cache": "steps:0", "gate": 0.5}, Split(1, 1, 2), "gate below 1"), ({"cache": "steps:0", "gate": 0.0}, Split(1, 1, 2), "gate below 1")):
        gen.plan = replace(gen.plan, **({"cache": "", "gate": 1.0} | plan))
        with pytest.raises(ValueError, match=says):
            parallel.check_together(parallel._as_run(gen, ask[0]), split)
        parallel.check_together(parallel._as_run(gen, ask[0] | {"cache": "", "gate": 1.0}), split)


@pytest.mark.slow
def test_a_model_that_cannot_be_split_is_named(tmp_path):
    from families import WORDS

    from vidgen.models import ltx
    from vidgen.models.family import save_parts

    with pytest.raises(ValueError, match="LTXVideoTransformer3DModel, which can't be split.*vidgen batch --devices"):
        parallel.run_parallel(save_parts(ltx.tiny(words=WORDS), tmp_path), "a", processes=2)


@pytest.mark.slow
def test_run_parallel_makes_the_clip_of_one_process():
    import vidgen

    asked = dict(seed=[7, 3], num_inference_steps=3)
    prompts, seen = ["a red circle moving right on a white background", "a blue star moving left on a black background"], []
    alone = vidgen.load("shapes-t2v").generate(prompts, **asked)
    together = parallel.run_parallel("shapes-t2v", prompts, processes=4, progress=seen.append, **asked)
    assert max(int(abs(a.frames.astype(int) - b.frames).max()) for a, b in zip(alone, together, strict=True)) <= 1
    assert together[0].made["split"] == {"ulysses": 2, "ring": 1, "cfg": 2} and Progress("denoise", 6, 6) in seen


def test_the_kernel_that_was_asked_for_computes_the_shares():
    "In the attention of a split clip, where no processor of the model hears of it."
    import torch
    from torch.nn.attention import sdpa_kernel
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.__name__.split(".")[0])
            return func(*args, **kwargs or {})

    mesh, found = sequence.Mesh(sequence.Split()), {}
    q, k, v = torch.randn(3, 2, 20, 4, 32).unbind()
    for kernel in ("auto", "math"):
        seen, deal = set(), parallel.Deal(mesh, kernel)
        deal.tokens(20)
        with torch.no_grad(), sdpa_kernel([torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION]), Watch():
            found[kernel] = deal.attention(q, k, v), any("flash_attention" in name for name in seen)
    assert torch.allclose(found["auto"][0], found["math"][0], atol=1e-5) and found["auto"][1] and not found["math"][1]


def test_a_plan_is_made_once_for_the_memory_each_process_has(monkeypatch):
    from vidgen.errors import DoesNotFit
    from vidgen.models import plan

    monkeypatch.setattr(plan, "free_memory", lambda device: 8 * 2**30)
    ask = dict(device="cpu", precision="auto", force=False, how={"compile": True}, options={"num_inference_steps": 2, "seed": 3})
    made = parallel.planned("shapes-t2v", sequence.Split(2, 1, 2), "auto", **ask)
    assert made.free_gib == 2 and made.compile and made.ulysses == made.cfg == 1 and parallel.planned("shapes-t2v", sequence.Split(2), None, **ask) is None
    monkeypatch.setattr(plan, "free_memory", lambda device: 2**20)
    with pytest.raises(DoesNotFit):
        parallel.planned("shapes-t2v", sequence.Split(2), "auto", **ask)


@pytest.mark.slow
def test_a_split_clip_by_a_plan_and_a_kernel_is_the_same_clip():
    import vidgen

    prompt, asked = "a red circle moving right on a white background", dict(seed=7, num_inference_steps=2)
    alone, = vidgen.load("shapes-t2v").generate(prompt, **asked)
    together, = parallel.run_parallel("shapes-t2v", prompt, ulysses=2, plan="auto", attention="math", **asked)
    assert int(abs(alone.frames.astype(int) - together.frames).max()) <= 1 and any("math" in said for said in together.made["carried_out"])


@pytest.mark.slow
def test_torchrun(tmp_path):
    asked = ["-m", "vidgen.generate.parallel", "--prompt", "a red circle", "--steps", "2", "--out", "clip.mp4", "--device", "cpu", "--plan", "auto"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *asked, "--ring", "2"], cwd=tmp_path, env=env(), capture_output=True, text=True, timeout=150)
    assert done.returncode == 0 and (tmp_path / "clip.mp4").stat().st_size and done.stdout.count("ring 2") == 1, done.stderr
    done = subprocess.run([sys.executable, *asked, "--ulysses", "3", "--overwrite"], cwd=tmp_path, env=env(), capture_output=True, text=True, timeout=150)
    assert done.returncode == 1 and "4 heads can't be shared by ulysses=3" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words,said", [
    (["--steps", "0"], "--steps 0 must be a whole number"), (["--frames", "10"], "--frames 10 can't be made"), (["--precision", "fb16"], "unknown precision"), (["--device", "gpu"], "unknown device"),
    (["--guidance", "0"], "--guidance 0"), (["--cache", "tecache:1"], "nearest: teacache"), (["--cache", "firstblock:0.05"], "firstblock"), (["--model", "shapes-t2w"], "nearest: shapes-t2v"),
    (["--cfg", "2", "--guidance", "1"], "--cfg 2, but this model computes one answer"), (["--attention", "flsh"], "nearest: flash"), (["--ring", "2", "--attention", "math"], "--attention 'math' with --ring 2"),
    (["--plan", "atuo"], "nearest: auto")])
def test_a_wrong_request_is_one_sentence_before_any_process_starts(words, said, monkeypatch, capsys, tmp_path):
    from vidgen.generate import launch as module
    from vidgen.generate.parallel_command import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_start", lambda *_: pytest.fail("processes were started"))
    monkeypatch.setattr(sys, "argv", ["parallel", "--prompt", "a red circle", "--processes", "2", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and err.startswith("error: ") and said in err and len(err.splitlines()) == 1


def test_damaged_weights_and_a_failed_process_are_one_sentence(monkeypatch, capsys, tmp_path):
    import shutil

    from vidgen.errors import DoesNotFit
    from vidgen.generate import parallel_command as module
    from vidgen.models.registry import find

    folder = shutil.copytree(find("shapes-t2v"), tmp_path / "cut")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.chdir(tmp_path)

    def said(*words):
        monkeypatch.setattr(sys, "argv", ["parallel", "--prompt", "a red circle", "--processes", "2", *words])
        with pytest.raises(SystemExit):
            module.main()
        return capsys.readouterr().err

    assert "cut short" in (err := said("--model", str(folder))) and len(err.splitlines()) == 1
    for raised, shown in ((DoesNotFit("it does not fit: force=True, on the command line --force"), "error: it does not fit: --force"),
                          (RuntimeError("process 1 of 2 failed: num_frames=10\nTraceback"), "error: process 1 of 2 failed: --frames 10; --debug shows where")):
        monkeypatch.setattr(module, "run_parallel", lambda *_, raised=raised, **__: (_ for _ in ()).throw(raised))
        assert said() == shown + "\n"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "efficient", "math"])
def test_kernels_on_a_gpu(name):
    import torch

    q, k, v = (torch.randn(2, 6, n, 64, device="cuda", dtype=torch.float32 if name == "efficient" else torch.bfloat16) for n in (100, 77, 77))
    o, lse = sequence.attend(q, k, v, name)
    scores = q.double() @ k.double().transpose(-1, -2) / 8
    assert name == "math" or sequence.kernel(q) == name
    assert (o - scores.softmax(-1) @ v.double()).abs().max() < 2e-2 and (lse - scores.logsumexp(-1)).abs().max() < 1e-2
