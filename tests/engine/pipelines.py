"""Pipelines for tests."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.models import chain

EXECUTORS = ["serial", "threads"]


def sgd(params: list[Tensor], **past: Any) -> lk.SGD:
    return lk.SGD(params, lr=0.05, momentum=0.9, **past)


def pipeline(stages: list[nn.Module] | None = None, **options: Any) -> layerpipe.Pipeline:
    return layerpipe.Pipeline(stages or chain(), F.cross_entropy, sgd, **options)


def workers() -> int:
    return sum(t.name.startswith("layerpipe ") for t in threading.enumerate())


def train(pipe: layerpipe.Pipeline, data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Trains on all minibatches and drains; returns their losses."""
    losses = [pipe.step(x, y) for x, y in data]
    return [loss for loss in losses if loss is not None] + pipe.drain()


def assert_equal_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name] - b[name]).abs().max()}"


def trained(
    stages: list[nn.Module], data: list[tuple[Tensor, Tensor]], factory: Any = sgd, **options: Any
) -> dict[str, Tensor]:
    with layerpipe.Pipeline(stages, F.cross_entropy, factory, **options) as pipe:
        for x, y in data:
            pipe.step(x, y)
        pipe.drain()
        return copy.deepcopy(pipe.state_dict())
