"""``balance="time"``: cuts that are found by measuring whole stages."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerpipe import models, split
from layerpipe.partition import partition
from layerpipe.partition.profile import TimedCut, _now, seconds
from tests.engine.models import sequential


class Wrapped(nn.Module):
    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage, self.calls = stage, 0

    def forward(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.stage(*inputs)
        return result


def noisy() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize("wrap", [None, nn.Sequential])
def test_stages_take_turns_when_they_are_measured(wrap: Any) -> None:
    """And so do those of several cuts: a slow moment of the machine meets all alike, no weight is still in a cache."""
    order = list[int]()

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            order.append(self.out_features)
            return super().forward(x)

    x, (a, b, c) = (torch.randn(2, 4),), (Watched(4, 5), Watched(5, 6), Watched(6, 7))
    ways = [TimedCut([a, b, c], x, wrap), TimedCut([nn.Sequential(a, b), c], x, wrap)]
    del order[:]
    taken = seconds(ways)
    assert [len(stages) for stages in taken] == [3, 2]
    assert all(0 < t < float("inf") for stages in taken for times in stages for t in times)
    assert order == [5, 6, 7] * 2 * 8
    del order[:]
    seconds(ways, at_least=60.0)  # of something this fast, not for a minute
    assert order == [5, 6, 7] * 2 * 30


def test_a_device_is_waited_for_where_its_work_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = list[torch.device]()
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(synchronize=waited.append))
    _now([torch.device(name) for name in ("cpu", "cuda:1", "meta")])
    assert waited == [torch.device("cuda:1")]


def test_wrapped_stages_are_measured_on_copies_and_returned_untouched() -> None:
    model, made = noisy(), list[Wrapped]()

    def wrap(stage: nn.Module) -> Wrapped:
        made.append(Wrapped(stage))
        return made[-1]

    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    stages = split(model, 2, (torch.randn(5, 4),), balance="time", wrap=wrap)
    assert stages == made[-2:]
    assert len(made) in (4, 6, 8, 10)  # up to four pairs were measured
    assert all(stage.calls > 1 for stage in made[:-2])
    assert not any(stage.calls for stage in made[-2:])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.random.set_rng_state(random)
    torch.randn(5, 4)
    expected = torch.random.get_rng_state()
    torch.random.set_rng_state(random)
    split(model, 2, (torch.randn(5, 4),), balance="time", wrap=wrap)
    assert torch.equal(torch.random.get_rng_state(), expected)
    owned = {id(p) for p in model.parameters()}
    assert {id(p) for stage in stages for p in stage.parameters()} == owned
    assert not any(id(p) in owned for stage in made[:2] for p in stage.parameters())


@pytest.mark.parametrize("wrap", [None, nn.Sequential])
def test_the_cut_follows_what_whole_stages_take(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a stage takes as long as it has Linear layers, whatever these cost alone."""

    def count(stage: nn.Module) -> int:
        return sum(isinstance(m, nn.Linear) for m in stage.modules())

    def fake_seconds(tried: list[TimedCut], **_: object) -> list[list[tuple[float, float]]]:
        return [[(0.01, count(stage)) for stage, _, _ in cut.runs] for cut in tried]

    monkeypatch.setattr(partition, "seconds", fake_seconds)
    model = nn.Sequential(nn.Linear(64, 64), *[nn.Linear(2**i, 2 ** (i - 1)) for i in range(6, 0, -1)], nn.Tanh())
    stages: list[Any] = split(model, 2, (torch.randn(8, 64),), balance="time", wrap=wrap)
    counts = [count(stage) for stage in stages]
    assert max(counts) == 4
    assert [round((stage[0] if wrap else stage).meta["cost"]) for stage in stages] == counts


@pytest.mark.parametrize("how", [{"balance": "flops"}, {"balance": "params"}, {"at": ["4"], "balance": "time"}])
def test_nothing_is_measured_where_no_time_is_asked_for(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "seconds", None)
    stages = split(sequential(), 2, (torch.randn(5, 4),), wrap=Wrapped, **how)
    assert all(isinstance(stage, Wrapped) for stage in stages)


def test_wrapped_stages_are_first_measured_with_residual_blocks_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut within a block keeps apart what a compiler would make one; one beside it is found if it is better."""
    pytest.importorskip("torchvision")
    measured: list[list[int]] = []

    def fake_seconds(tried: list[TimedCut], **_: object) -> list[list[tuple[float, float]]]:
        newest = [stage for stage, _, _ in tried[-1].runs]
        measured.append([sum(isinstance(m, nn.Conv2d) for m in stage.modules()) for stage in newest])
        return [[(0.5, 0.5), (1.0, 1.0)] for _ in tried]

    monkeypatch.setattr(partition, "seconds", fake_seconds)
    model = models.make("resnet18", width=4, channels=1, size=8, classes=3)
    split(model, 2, (torch.randn(2, 1, 8, 8),), balance="time", wrap=Wrapped)
    assert measured[0][0] in {1, 3, 5, 8, 10, 13, 15, 18}  # of 20, after the stem or a whole block
    assert len(measured) == 4
