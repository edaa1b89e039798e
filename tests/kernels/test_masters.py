"""What is kept in another dtype than the weights: float32 masters of narrow ones, bfloat16 averages."""

from __future__ import annotations

import copy

import pytest
import torch

import layerpipe_kernels as lk
from tests.kernels.checkpoints import BF16, F32, F64, parameters, saved, steps, take


def test_float32_state_survives_on_bfloat16_parameters() -> None:
    params = parameters(BF16)
    optimizer = lk.SGD(params, lr=0.1, momentum=0.9, delay=4, past=lk.EMA(norm="match"), master_weights=True)
    steps(optimizer, params, 5, seed=1)
    other = lk.SGD(parameters(BF16), lr=0.1, momentum=0.9, delay=4, past=lk.EMA(norm="match"), master_weights=True)
    other.load_state_dict(saved(optimizer))
    for a, b in zip(params, other.param_groups[0]["params"], strict=True):
        for key in ("momentum_buffer", "ema", "master", "norms"):
            assert other.state[b][key].dtype == F32
            assert torch.equal(optimizer.state[a][key], other.state[b][key])


def test_weights_that_were_loaded_alone_replace_their_masters() -> None:
    params = parameters(BF16)
    start = [p.detach().clone() for p in params]
    optimizer = lk.SGD(params, lr=0.1, master_weights=True)
    steps(optimizer, params, 5, seed=1)
    masters = [optimizer.state[p]["master"].clone() for p in params]
    optimizer.weights_loaded()  # they were not, and what bfloat16 does not hold is kept
    assert all(torch.equal(optimizer.state[p]["master"], master) for p, master in zip(params, masters, strict=True))
    take(params, start)
    optimizer.weights_loaded()
    optimizer.param_groups[0]["lr"] = 0.0
    steps(optimizer, params, 1, seed=2)
    assert all(map(torch.equal, params, start))


def test_bfloat16_averages_survive_on_float32_parameters() -> None:
    params = parameters()
    optimizer = lk.AdamW(params, delay=4, past=lk.Blend(dtype=BF16))
    steps(optimizer, params, 5, seed=1)
    other = lk.AdamW(parameters(), delay=4, past=lk.Blend(dtype=BF16))
    other.load_state_dict(saved(optimizer))
    for a, b in zip(params, other.param_groups[0]["params"], strict=True):
        assert other.state[b]["ema"].dtype == BF16
        assert torch.equal(optimizer.state[a]["ema"], other.state[b]["ema"])


@pytest.mark.parametrize("dtype", [F32, F64])
def test_masters_of_narrow_weights_are_not_needed_for_others(dtype: torch.dtype) -> None:
    narrow = parameters(BF16)
    optimizer = lk.AdamW(narrow, lr=0.05, delay=3, master_weights=True)
    steps(optimizer, narrow, 5, seed=1)
    params = parameters(dtype)
    take(params, narrow)
    other = lk.AdamW(params, lr=0.05, delay=3)
    other.load_state_dict(saved(optimizer))
    assert not any("master" in state for state in other.state.values())
    plain = copy.deepcopy((params, other))
    plain[1].param_groups[0]["master_weights"] = False
    for each in ((params, other), plain):
        steps(each[1], each[0], 2, seed=2)
    assert all(map(torch.equal, params, plain[0]))


def test_a_master_that_is_no_longer_wanted_is_no_past() -> None:
    params = parameters(BF16)
    optimizer = lk.SGD(params, lr=0.1, delay=3, past="blend", master_weights=True)
    steps(optimizer, params, 5, seed=1)
    optimizer.param_groups[0]["master_weights"] = False
    history = []
    for t in range(6):
        history.append([p.detach().clone() for p in params])
        steps(optimizer, params, 1, seed=2 + t)
    for param, then in zip(params, history[-3], strict=True):
        assert (optimizer.past_weight(param) - then).norm() < 0.5 * (param.detach() - then).norm()
