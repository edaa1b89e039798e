"""Stages of bfloat16 weights, and their float32 masters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import EXECUTORS, assert_equal_state, sgd


def test_loaded_weights_replace_their_masters() -> None:
    torch.manual_seed(0)
    stages: list[nn.Module] = [stage.bfloat16() for stage in chain(3)]
    data = [(x.bfloat16(), y) for x, y in minibatches(8)]

    def optimizer(params: Any, **past: Any) -> lk.SGD:
        return lk.SGD(params, lr=0.05, master_weights=True, **past)

    with layerpipe.Pipeline(stages, F.cross_entropy, optimizer) as pipe:
        start = copy.deepcopy(pipe.state_dict())
        for x, y in data:
            pipe.step(x, y)
        pipe.drain()
        masters = [state["master"].clone() for state in pipe.optimizer.state.values()]
        pipe.load_state_dict(copy.deepcopy(pipe.state_dict()))  # keeps what bfloat16 does not hold
        assert all(
            torch.equal(state["master"], master)
            for state, master in zip(pipe.optimizer.state.values(), masters, strict=True)
        )
        pipe.load_state_dict(start)
        for group in pipe.optimizer.param_groups:
            group["lr"] = 0.0
        for x, y in data:
            pipe.step(x, y)
        pipe.drain()
        names, end = [name for name, _ in pipe.named_parameters()], pipe.state_dict()
        assert_equal_state({name: start[name] for name in names}, {name: end[name] for name in names})


@pytest.mark.parametrize("executor", EXECUTORS)
def test_bf16_parameters_train(executor: str) -> None:
    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        return [stage.bfloat16() for stage in chain(3)]

    x = torch.randn(64, 6).bfloat16()
    y = (x[:, 0] > 0).long()
    with layerpipe.Pipeline(stages(), F.cross_entropy, sgd, executor=executor) as pipe:
        losses = [float(loss) for _ in range(120) if (loss := pipe.step(x, y)) is not None]
        assert losses[-1] < 0.5 * losses[0]
        assert all(p.dtype == torch.bfloat16 for p in pipe.parameters())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_bf16_stages_keep_small_updates_in_float32_masters(executor: str) -> None:
    """Updates below half a unit of bfloat16 are lost without masters and add up with them."""
    x = torch.randn(64, 6).bfloat16()
    y = (x[:, 0] > 0).long()

    def run(master_weights: bool) -> tuple[list[Tensor], layerpipe.Pipeline]:
        torch.manual_seed(0)
        stages: list[nn.Module] = [stage.bfloat16() for stage in chain(3)]
        start = [p.detach().clone() for stage in stages for p in stage.parameters() if p.ndim > 1]

        def optimizer(params: Any, **past: Any) -> lk.SGD:
            return lk.SGD(params, lr=1e-4, momentum=0.9, master_weights=master_weights, **past)

        with layerpipe.Pipeline(stages, F.cross_entropy, optimizer, executor=executor, threads_per_stage=1) as pipe:
            for _ in range(200):
                pipe.step(x, y)
            pipe.drain()
        now = [p.detach() for p in pipe.parameters() if p.ndim > 1]
        return [(a != b).double().mean() for a, b in zip(start, now, strict=True)], pipe

    lost, _ = run(False)
    moved, pipe = run(True)
    assert sum(moved) > 3 * sum(lost)
    for param, state in pipe.optimizer.state.items():
        assert state["master"].dtype == torch.float32
        assert torch.equal(state["master"].bfloat16(), param)
        assert "ema" not in state or state["ema"].dtype == torch.float32
