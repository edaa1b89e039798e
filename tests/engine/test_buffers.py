"""The memory that graphs read from and write to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerpipe.executors.buffers import Buffers
from tests.engine.fake_device import fake_device
from tests.engine.graph_pipelines import pipeline
from tests.engine.layouts import Minibatches, data, summing, turning
from tests.engine.models import minibatches
from tests.engine.pipelines import assert_equal_state


def first_slots(stages: Callable[[], list[nn.Module]], minibatches: Minibatches) -> list[Any]:
    """Of each stage, after a training that gives the serial executor's weights."""
    weights, slots = [], []
    for executor in ("serial", "graphs"):
        with fake_device(), pipeline(stages(), executor) as pipe:
            for x, y in minibatches:
                pipe.step(x, y)
            slots = [stage._slots[0] for stage in getattr(pipe._executor, "_captured", ())]
            pipe.drain()
            weights.append(pipe.state_dict())
    assert_equal_state(*weights)
    return slots


@pytest.mark.parametrize(("stages", "strides"), [(turning, (30, 1, 6)), (summing, (6, 1, 0))])
def test_replayed_gradients_lie_in_memory_as_eager_ones_do(stages: Any, strides: tuple[int, ...]) -> None:
    first, second, *_ = first_slots(stages, data(20))
    assert second.upstream[0].stride() == strides
    assert first.grads.content[0].stride() == strides


class Spread(nn.Linear):
    """Hands on the same memory for all positions."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x).unsqueeze(2).expand(-1, -1, 5)
        return y


class Sliced(nn.Linear):
    """Hands on a part of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).repeat(1, 10).view(-1, 6, 10)[:, :, ::2]


@pytest.mark.parametrize(("first", "strides"), [(Spread, (6, 1, 0)), (Sliced, (60, 10, 2))])
def test_what_is_lent_keeps_its_repetitions_and_gaps(first: Any, strides: tuple[int, ...]) -> None:
    def stages() -> list[nn.Module]:
        after = summing()
        return [first(6, 6), *after]

    _, second, *_ = first_slots(stages, minibatches(20))
    assert second.inputs.content[0].stride() == strides


def test_room_for_targets_takes_what_repeats_more_and_refuses_what_repeats_less() -> None:
    dense, expanded = torch.randn(4, 3), torch.randn(1, 3).expand(4, 3)
    room = Buffers("targets", dense)
    room.fill(expanded, None)
    assert torch.equal(room.content, expanded)
    with pytest.raises(ValueError, match=r"targets have been captured as .*expanded from \(1, 3\).*contiguous"):
        Buffers("targets", expanded).fill(dense, None)
