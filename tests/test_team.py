"""Several processes, started by torchrun with gloo: copies, slices, and both; validation that is dealt out; another number of processes at a resume."""
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from team_cases import alone, launched

import vidgen
from vidgen.train import lora, trainer
from vidgen.train.adapters import FILE
from vidgen.train.config import Recipe
from vidgen.train.loop import Shelf
from vidgen.train.team import dealt, grid

pytestmark = pytest.mark.timeout(600)
TINY = dict(data="world:8", held="world:3/held", steps=3, batch=2, rank=2, latents="mean", save_every=2, log_every=1, validate_every=2, prompts=0, noise_levels=2, warmup=2, seed=3, device="cpu", caption_dropout=0.0)
CASES = {
    "slices": dict(strategy="fsdp", prompts=3, inference_steps=2, metrics="oracle"),
    "full": dict(strategy="fsdp", method="full", lr=1e-4, accumulate=2),
    "fewer": dict(held="world:1/held", prompts=1, inference_steps=1, metrics="oracle"),
    "step": dict(strategy="fsdp", held="world:1/held", checkpointing="full"),
}


def numbers(run, *names):
    return [[row[name] for row in run.metrics() if name in row] for name in names]


def weights(run):
    return load_file(Shelf(run.path / "checkpoints", 2).last)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run of one process with all four clips of a step, and one that was stopped after its second step."
    facts, root = TINY | dict(batch=4), tmp_path_factory.mktemp("one")
    return {"whole": alone(facts, root), "stopped": alone(facts, root, stop=2)}


@pytest.fixture(scope="module")
def two(tmp_path_factory, whole):
    "Each case by two processes of two clips, one that is stopped after its second step, and the stopped run of one process, gone on with."
    cases = [{"name": name, "facts": TINY | more} for name, more in CASES.items()] + [{"name": "stopped", "facts": TINY, "stop": 2}]
    cases += [{"name": "resumed", "facts": TINY | dict(batch=4, strategy="fsdp"), "run": str(whole["stopped"].path)}]
    return launched(2, cases, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_are_one(two, tmp_path, name):
    "Losses, validation, sample clips' scores and checkpoints of two processes are those of one with all four clips, also where three held clips, or one, are dealt to two."
    one, names = alone(TINY | CASES[name] | dict(batch=4), tmp_path), ["train/loss", "train/grad_norm", "held/loss/mean", "after/loss/0.25", *(["after/oracle"] if "metrics" in CASES[name] else [])]
    for a, b in zip(numbers(one, *names), numbers(two[name], *names), strict=True):
        assert a and a == pytest.approx(b, rel=2e-3)
    assert sorted(p.name for p in (one.path / "samples").glob("*")) == sorted(p.name for p in (two[name].path / "samples").glob("*"))
    a, b = weights(one), weights(two[name])
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=2e-4, rtol=1e-2) for k in a if k.startswith(("model.", "ema.")))
    if "method" not in CASES[name]:
        a, b = load_file(one.path / "adapter" / FILE), load_file(two[name].path / "adapter" / FILE)
        assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)
    else:
        a, b = (vidgen.load(run.path / "model").parts.transformer.state_dict() for run in (one, two[name]))
        assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)


def test_a_run_goes_on_by_another_number_of_processes(two, whole, tmp_path):
    "One, then two with slices; two, then one: each step has the clips it would have had, and somebody is told."
    assert "was begun by 1 x batch 4, ddp, and goes on by 2 x batch 2, fsdp: equal to rounding" in two[""].replace("\n", " ")
    with pytest.warns(UserWarning, match="was begun by 2 x batch 2, ddp, and goes on by 1 x batch 4"):
        back = alone(TINY, tmp_path, two["stopped"].path)
    for run in (two["resumed"], back):
        for a, b in zip(numbers(whole["whole"], "train/loss", "after/loss/mean"), numbers(run, "train/loss", "after/loss/mean"), strict=True):
            assert len(a) == len(b) and a == pytest.approx(b, rel=1e-3)
        a, b = weights(whole["whole"]), weights(run)
        assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a if not k.startswith("optimizer."))


def test_a_number_of_processes_that_can_t_share_a_step_is_refused(whole, tmp_path):
    r = Recipe(**TINY | dict(batch=4))
    with pytest.raises(ValueError, match="4 clips, batch 4 on each of 1, and 3 processes can't share them evenly: go on with 1, 2, 4"):
        trainer.redealt(r, whole["whole"].path, 3)
    mixed = {"recipe": Recipe(**TINY | dict(batch=6, replay="world:4")).to_dict(), "processes": 1}
    (tmp_path / trainer.IDENTITY).write_text(json.dumps(mixed))
    with pytest.raises(ValueError, match="go on with 1, 3$"):  # 3 of 6 clips are replay: two processes would make them 4
        trainer.redealt(Recipe(**mixed["recipe"]), tmp_path, 2)


def test_every_clip_is_judged_once_or_in_step():
    for count, size in ((3, 2), (1, 4), (0, 2), (7, 3)):
        free, step = ([dealt(count, SimpleNamespace(rank=r, size=size, in_step=s)) for r in range(size)] for s in (False, True))
        assert sorted(sum(free, [])) == list(range(count)) and set(sum(step, [])) == set(range(count)) and len({len(d) for d in step}) == 1


def test_grids():
    assert [grid(4, "ddp"), grid(4, "fsdp"), grid(4, "hsdp"), grid(8, "hsdp", shards=4), grid(16, "hsdp", local=8)] == [(4, 1), (1, 4), (2, 2), (2, 4), (2, 8)]
    for wrong in (dict(size=4, shards=3), dict(size=4, shards=4), dict(size=3), dict(size=2)):
        with pytest.raises(ValueError, match="hsdp needs"):
            grid(strategy="hsdp", **wrong)


def test_attention_lets_every_weight_learn():
    "Fused projections are for inference: the weights they are made of get their gradients, and a single adapter on one of them is heard."
    for freeze, targets in ((True, ("attn1.to_v",)), (False, ())):
        parts = vidgen.load("shapes-t2v").parts
        mine = lora.add(parts, rank=2, targets=targets) if freeze else [p for n, p in parts.transformer.named_parameters() if lora.learn_all(parts) == []]
        z, text = torch.randn(1, 3, 16, 8, 12), torch.randn(1, 32, 64)
        parts.family.predict(parts, z, torch.tensor([500]), text, parts.family.extras(parts, tuple(z.shape[1:]), None)).sum().backward()
        assert mine and all(p.grad is not None for p in mine)


@pytest.mark.slow
def test_four_processes_in_two_copies_are_one(tmp_path):
    more = dict(strategy="hsdp", method="full", lr=1e-4, batch=1)
    four, one = launched(4, [{"name": "grid", "facts": TINY | more}], tmp_path / "four")["grid"], alone(TINY | more | dict(batch=4), tmp_path)
    for a, b in zip(numbers(one, "train/loss", "held/loss/mean"), numbers(four, "train/loss", "held/loss/mean"), strict=True):
        assert a and a == pytest.approx(b, rel=2e-3)
