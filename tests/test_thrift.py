"""What a small GPU needs, as far as a CPU can tell: scaled losses, weights in eight bits, optimizers in eight bits or on the host, compiled blocks. Each resumes exactly."""
import pytest
import torch
from team_cases import alone
from test_train import line, points, squared
from test_training import TINY, case, seeds, weights

from vidgen.errors import Canceled
from vidgen.models.family import family
from vidgen.progress import Cancel
from vidgen.train import lora, thrift
from vidgen.train import objective as ob
from vidgen.train.config import Recipe
from vidgen.train.loop import State, TrainConfig, fit, update


def wide():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 96), torch.nn.Tanh(), torch.nn.Linear(96, 96), torch.nn.Tanh(), torch.nn.Linear(96, 96), torch.nn.Tanh(), torch.nn.Linear(96, 1))


def bursts(model):
    "A loss whose gradient overflows once scaled, at one step in six."
    return lambda batch, generator: squared(model)(batch, generator) * (1e34 if torch.rand(1, generator=generator) < 0.17 else 1)


@pytest.mark.parametrize("kind, more", [(bursts, dict(scaled=True)), (squared, dict(optimizer="adamw8bit")), (squared, dict(offload="optimizer")), (squared, dict(scaled=True, optimizer="muon"))])
def test_resumes_exactly(tmp_path, kind, more):
    config, cancel, whole, parts = TrainConfig(24, lr=0.01, warmup=2, save_every=8, clip=1e9, **more), Cancel(), wide(), wide()
    first = fit(whole, points, kind(whole), config, folder=tmp_path / "whole")
    with pytest.raises(Canceled):
        fit(parts, points, kind(parts), config, folder=tmp_path / "parts", cancel=cancel, extra=lambda state: (state.step == 16 and cancel.cancel()) or {})
    parts = wide()
    second = fit(parts, points, kind(parts), config, folder=tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    assert first.scaler.state_dict() == second.scaler.state_dict()
    if kind is bursts:
        assert first.scaler.get_scale() < 2**16
    memories = [{(n, k): v for n in s.params for k, v in s.memory(n).items()} for s in (first, second)]
    assert memories[0].keys() == memories[1].keys() and all(torch.equal(v, memories[1][k]) for k, v in memories[0].items())


def test_a_gradient_that_overflows_moves_nothing_and_halves_the_scale():
    m = line()
    state, before = State(m, TrainConfig(9, scaled=True)), [p.clone() for p in m.parameters()]
    state.scaler.scale(m(torch.ones(1, 2)).sum() * 1e35).backward()
    for o in state.optimizers:
        state.scaler.unscale_(o)
    update(state)
    assert state.step == 1 and state.scaler.get_scale() == 2**15 and all(torch.equal(a, b) for a, b in zip(before, m.parameters()))


def test_the_8_bit_memory_is_in_8_bits():
    state = State(wide(), TrainConfig(5, optimizer="adamw8bit", warmup=0))
    squared(state.model)((torch.ones(4, 2), torch.ones(4, 1)), torch.Generator()).backward()
    update(state)
    assert state.memory("2.weight")["state1"].dtype == torch.uint8 and state.memory("0.weight")["state1"].dtype == torch.float32


def test_the_offloaded_optimizer_is_adamw_and_sees_others_changes():
    a, b = wide(), wide()
    pair = [(a, torch.optim.AdamW(a.parameters(), lr=0.01)), (b, thrift.Offloaded(list(b.parameters()), lr=0.01))]
    for i in range(4):
        for net, optimizer in pair:
            optimizer.param_groups[0]["lr"] = 0.01 / (i + 1)
            optimizer.zero_grad()
            net(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            if i == 1:
                with torch.no_grad():
                    net[0].weight.mul_(0.5)
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert all(v["exp_avg"].device.type == "cpu" for v in pair[1][1].state.values())


def test_stored_weights_give_the_gradients_of_their_rounded_selves():
    grads = []
    for kept in (False, True):
        parts, z, noise, text = case("cogvideox", 1)
        rounded = thrift.choose(parts.transformer, smallest=16)[0]
        for name in rounded:
            layer = parts.transformer.get_submodule(name)
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
            layer.__class__, layer.compute_dtype = (thrift.Stored, torch.float32) if kept else (torch.nn.Linear, None)
            layer.weight.data = layer.weight.data if kept else layer.weight.data.float()
        mine = lora.add(parts, rank=2, seed=1)
        with torch.no_grad():
            for p in mine:
                p.add_(0.01)
        ob.losses(parts, ob.objective(parts), z, text, generators=seeds(1)).mean().backward()
        grads.append([p.grad for p in mine])
    assert rounded and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return losses(alone(TINY | dict(steps=4, validate_every=0), tmp_path_factory.mktemp("plain")))


def losses(run):
    return [r["train/loss"] for r in run.metrics() if "train/loss" in r]


def test_a_run_over_stored_weights_resumes_exactly(tmp_path, plain):
    facts = TINY | dict(steps=4, validate_every=0, storage="fp8", checkpointing="full")
    whole, parts = alone(facts, tmp_path / "whole"), alone(facts, tmp_path / "parts", stop=2)
    alone(facts, tmp_path, parts.path)
    a, b = weights(whole.path), weights(parts.path)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert losses(whole) == losses(parts) == pytest.approx(plain, rel=0.2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fp16_learns_and_resumes_exactly(tmp_path):
    facts = TINY | dict(data="world:8", held="world:1/held", steps=2, batch=1, validate_every=0, save_every=1, noise_levels=1, precision="fp16")
    whole, parts = alone(facts, tmp_path / "whole"), alone(facts, tmp_path / "parts", stop=1)
    alone(facts, tmp_path, parts.path)
    a, b = weights(whole.path), weights(parts.path)
    assert all(torch.equal(a[k], b[k]) for k in a) and len(losses(whole)) == 2


@pytest.mark.parametrize("wrong, said", [(dict(storage="fp8", method="full"), "storage: fp8 is for"), (dict(storage="fp8", strategy="fsdp"), "storage: fp8 is for"), (dict(precision="fp16", strategy="fsdp"), "bf16, which needs no scale")])
def test_impossible_thrift_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Recipe(data="world:8", **wrong)


def test_offload_says_where_it_can_t():
    with pytest.raises(ValueError, match="on the CPU, where it lies already"):
        thrift.offloadable("cpu", "ddp", "adamw")
    with pytest.raises(ValueError, match="is for strategy: ddp with optimizer: adamw"):
        thrift.offloadable("cuda", "fsdp", "adamw")
    with pytest.raises(TypeError, match="compile is true or false"):
        Recipe(data="world:8", compile="yes")
    with pytest.raises(ValueError, match="no linear layer of a block is large enough"):
        thrift.store(family("cogvideox").tiny(), "fp32")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_blocks_learn_the_same_and_resume_exactly(tmp_path):
    facts = TINY | dict(steps=4, validate_every=0, compile=True, checkpointing="full")
    whole, parts, plain = alone(facts, tmp_path / "whole"), alone(facts, tmp_path / "parts", stop=2), alone(facts | dict(compile=False), tmp_path / "plain")
    alone(facts, tmp_path, parts.path)
    a, b = weights(whole.path), weights(parts.path)
    assert all(torch.equal(a[k], b[k]) for k in a)
    found = [[r["train/loss"] for r in run.metrics() if "train/loss" in r] for run in (whole, plain)]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
