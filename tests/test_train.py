"""The loop under fire: a real kill -9, a broken checkpoint, a loss that is not a number, frozen weights."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from torch import nn

from vidgen.errors import Canceled, CorruptWeights
from vidgen.progress import Cancel
from vidgen.train.loop import State, TrainConfig, fit, load_state, same_config

CONFIG = dict(steps=40, lr=0.05, warmup=5, save_every=5, log_every=10)


def line():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def points(rng):
    x = torch.tensor(rng.normal(size=(16, 2)), dtype=torch.float32)
    return x, x.sum(1, keepdim=True)


def squared(model):
    return lambda batch, generator: ((model(batch[0]) - batch[1] + 0.01 * torch.randn(1, generator=generator)) ** 2).mean()


SLOW = f"""
import sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_train import CONFIG, TrainConfig, fit, line, points, squared
m = line()
def slow(rng):
    time.sleep(0.05)
    return points(rng)
fit(m, slow, squared(m), TrainConfig(**CONFIG), folder=sys.argv[1])
"""


def test_killed_run_ends_at_the_same_weights(tmp_path):
    whole = line()
    fit(whole, points, squared(whole), TrainConfig(**CONFIG), folder=tmp_path / "whole")
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / "killed")])
    checkpoint, deadline = tmp_path / "killed" / "checkpoint.safetensors", time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    stopped = load_state(State(line(), TrainConfig(**CONFIG)), checkpoint).step
    assert 0 < stopped < CONFIG["steps"]
    resumed = line()
    state = fit(resumed, points, squared(resumed), TrainConfig(**CONFIG), folder=tmp_path / "killed")
    assert state.step == CONFIG["steps"]
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_average_is_resumed_too(tmp_path):
    whole, parts = line(), line()
    expected = fit(whole, points, squared(whole), TrainConfig(**CONFIG), folder=tmp_path / "a").ema
    cancel = Cancel()
    with pytest.raises(Canceled):
        fit(parts, points, squared(parts), TrainConfig(**CONFIG), folder=tmp_path / "b", cancel=cancel, extra=lambda state: cancel.cancel() or {})
    parts = line()
    got = fit(parts, points, squared(parts), TrainConfig(**CONFIG), folder=tmp_path / "b").ema
    assert all(torch.equal(expected[k], got[k]) for k in expected)
    assert not torch.equal(expected["0.weight"], whole[0].weight)


def test_truncated_checkpoint_is_named(tmp_path):
    m = line()
    fit(m, points, squared(m), TrainConfig(**CONFIG), folder=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptWeights, match="checkpoint.safetensors"):
        fit(line(), points, squared(m), TrainConfig(**CONFIG), folder=tmp_path)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    m = line()
    fit(m, points, squared(m), TrainConfig(**CONFIG), folder=tmp_path)
    with pytest.raises(CorruptWeights):
        fit(nn.Linear(2, 1), points, lambda b, g: None, TrainConfig(**CONFIG), folder=tmp_path)


def test_loss_that_is_no_number_stops_before_the_weights(tmp_path):
    m = line()
    before = [p.clone() for p in m.parameters()]
    with pytest.raises(FloatingPointError, match="lower lr"):
        fit(m, points, lambda b, g: m(b[0]).mean() * float("nan"), TrainConfig(**CONFIG), folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, m.parameters()))


def test_frozen_weights_stay(tmp_path):
    m = line()
    m[0].requires_grad_(False)
    before = m[0].weight.clone()
    fit(m, points, squared(m), TrainConfig(**CONFIG), folder=tmp_path)
    assert torch.equal(before, m[0].weight)
    with pytest.raises(ValueError, match="nothing to train"):
        State(m.requires_grad_(False), TrainConfig(steps=1))


def test_other_settings_are_refused(tmp_path):
    m = line()
    fit(m, points, squared(m), TrainConfig(**CONFIG), folder=tmp_path)
    with pytest.raises(ValueError, match="lr 0.05 -> 0.1"):
        fit(line(), points, squared(m), TrainConfig(**CONFIG | {"lr": 0.1}), folder=tmp_path)
    fit(m, points, squared(m), TrainConfig(**CONFIG | {"log_every": 7}), folder=tmp_path)


def test_curve_is_a_mean_of_all_losses_also_over_a_break(tmp_path):
    m, cancel, seen = line(), Cancel(), []
    def constant(batch, generator):
        seen.append(1)
        if len(seen) == 13:
            cancel.cancel()
        return m(batch[0]).mean() * 0 + 1
    config = TrainConfig(**CONFIG | {"log_every": 20, "save_every": 100})
    with pytest.raises(Canceled):
        fit(m, points, constant, config, folder=tmp_path, cancel=cancel)
    assert fit(m, points, constant, config, folder=tmp_path).curve == [[20, 1.0], [40, 1.0]]


def muon(**more):
    return TrainConfig(**CONFIG | more, optimizer="muon")


def test_muon_takes_the_hidden_matrices_only():
    state = State(line(), muon())
    names = [[n for n, p in state.params.items() if any(p is q for group in o.param_groups for q in group["params"])] for o in state.optimizers]
    assert names == [["0.bias", "2.weight", "2.bias"], ["0.weight"]]
    assert [type(o).__name__ for o in State(line(), TrainConfig(**CONFIG)).optimizers] == ["AdamW"]


def test_muon_resumes_exactly(tmp_path):
    whole = line()
    fit(whole, points, squared(whole), muon(), folder=tmp_path / "whole")
    cancel = Cancel()
    with pytest.raises(Canceled):
        m = line()
        fit(m, points, squared(m), muon(), folder=tmp_path / "parts", cancel=cancel, extra=lambda state: (state.step == 20 and cancel.cancel()) or {})
    resumed = line()
    state = fit(resumed, points, squared(resumed), muon(), folder=tmp_path / "parts")
    assert state.step == CONFIG["steps"] and all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_muon_trains_a_model_of_which_only_matrices_learn(tmp_path):
    m = line()
    for name, p in m.named_parameters():
        p.requires_grad_(name == "0.weight")
    before = m[0].weight.clone()
    fit(m, points, squared(m), muon(), folder=tmp_path)
    assert not torch.equal(before, m[0].weight)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="lion.*adamw.*muon"):
        TrainConfig(steps=1, optimizer="lion")


def test_a_checkpoint_older_than_a_setting_had_its_default():
    saved = json.loads(json.dumps(asdict(TrainConfig(**CONFIG))))
    del saved["optimizer"]
    same_config(saved, TrainConfig(**CONFIG), "old")
    with pytest.raises(ValueError, match="optimizer adamw -> muon"):
        same_config(saved, muon(), "old")
