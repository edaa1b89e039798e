"""The graphs executor on a device whose graphs are lists of ops, and which finds races: see fake_device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.fake_device import FakeDevice, Site, fake_device
from tests.engine.models import chain, minibatches
from tests.engine.test_streams import network, train


def optimizer(name: str) -> Any:
    def make(params: list[Tensor], **past: Any) -> Any:
        # A learning rate that is a tensor takes another way through torch's arithmetic: it is one for all executors.
        options: dict[str, Any] = {"backend": "reference", "capturable": True, **past}
        if name == "SGD":
            return lk.SGD(params, lr=torch.tensor(0.05), momentum=0.9, **options)
        return lk.AdamW(params, lr=torch.tensor(0.01), **options)

    return make


def pipeline(stages: list[nn.Module], executor: str, *, rule: str = "SGD", **options: Any) -> layerpipe.Pipeline:
    return layerpipe.Pipeline(
        stages, F.cross_entropy, optimizer(rule), executor=executor, check_finite=False, **options
    )


#: (network, stages, options)
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("chain", 1, {}),
    ("chain", 2, {}),
    ("chain", 3, {"past": "ema"}),
    ("chain", 3, {"past": "latest"}),
    ("chain", 2, {"past": "stash"}),
    ("chain", 4, {"max_norm": 1.0}),
    ("chain", 4, {"schedule": "1f1b"}),
    ("chain", 3, {"schedule": "sequential"}),
    ("chain", 3, {"split_backward": True}),
    ("chain", 3, {"rule": "AdamW"}),
    ("skip", 4, {}),
    ("skip", 3, {"schedule": "1f1b", "split_backward": True}),
]


def run(case: tuple[str, int, dict[str, Any]], without: Site | None = None, ticks: int = 50) -> FakeDevice:
    kind, count, options = case
    with fake_device(without) as device:
        pipe = pipeline(network(kind, count), "graphs", **options)
        train(pipe, ticks)
        del pipe
    return device


@pytest.mark.parametrize("case", CASES, ids=str)
def test_graphs_race_with_nothing_and_give_the_numbers_of_serial_and_streams(
    case: tuple[str, int, dict[str, Any]],
) -> None:
    kind, count, options = case
    states, losses = [], []
    for executor in ("serial", "streams", "graphs"):
        with fake_device() as device:
            pipe = pipeline(network(kind, count), executor, **options)
            losses.append(train(pipe, 50))
            states.append(copy.deepcopy(pipe.state_dict()))
            history = [[g.get("updates") for g in s.optimizer.param_groups] for s in pipe.stages if s.optimizer]
            assert pipe.measured_delays() == [s.measured for s in pipe.stages]
            states[-1]["updates"] = torch.tensor([[*map(int, h)][:1] for h in history])
            del pipe
        assert not device.errors, device.errors[0]
    assert device.captured
    for other in (1, 2):
        assert all(map(torch.equal, losses[0], losses[other]))
        assert [name for name in states[0] if not torch.equal(states[0][name], states[other][name])] == []
