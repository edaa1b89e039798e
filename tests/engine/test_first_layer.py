"""The network's first layer needs no past weights, and keeps none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from layerpipe.partition.first_layer import without_past
from layerpipe.stage.history import drop_history
from layerpipe.stage.probe import ReconstructionProbe
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import pipeline


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class Tied(nn.Sequential):
    """Not an nn.Sequential: its forward uses the first layer twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](self[0](x))


def names(stage: nn.Module) -> list[str]:
    found = without_past(stage)
    return [name for name, p in stage.named_parameters() if p in found]


def test_it_is_found_in_what_the_stage_is_made_of() -> None:
    assert names(nn.Linear(6, 3)) == ["weight", "bias"]
    assert names(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Conv2d(1, 2, 3, bias=False)), nn.Linear(2, 2))) == [
        "1.0.weight"
    ]
    assert names(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))) == ["0.weight"]
    frozen = nn.Linear(6, 6).requires_grad_(False)
    assert names(nn.Sequential(frozen, nn.Linear(6, 6))) == ["1.weight", "1.bias"]


def test_it_is_left_alone_where_its_past_could_be_read() -> None:
    tied = nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 6, bias=False))
    tied[1].weight = tied[0].weight
    twice = nn.Linear(6, 6)
    for stage in (nn.Sequential(twice, twice), nn.BatchNorm1d(6), Own(), Tied(nn.Linear(6, 6)), tied, nn.LSTM(6, 6)):
        assert names(stage) == []


def test_it_is_found_in_split_models() -> None:
    resnet18 = pytest.importorskip("torchvision").models.resnet18
    first, _ = layerpipe.split(resnet18(), 2, balance="params")
    assert names(first) == ["conv1.weight"]


def test_a_group_is_divided_with_its_options_and_names() -> None:
    layer, more = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = lk.SGD(
        [{"params": [("a", layer.weight), ("b", more.weight)], "lr": 0.5}, {"params": [("c", layer.bias)], "lr": 0.1}],
        momentum=0.9,
        delay=4,
    )
    drop_history(optimizer, {layer.weight, layer.bias})
    groups = [(g["param_names"], g["lr"], g["delay"]) for g in optimizer.param_groups]
    assert groups == [(["b"], 0.5, 4), (["c"], 0.1, 0), (["a"], 0.5, 0)]


@pytest.mark.parametrize("past", ["stash", "blend"])
def test_training_is_the_same_with_and_without_its_history(past: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for keep in (False, True):
        if keep:
            monkeypatch.setattr("layerpipe.stage.stage.without_past", lambda stage: set())
        with pipeline(past=past) as pipe:
            for x, y in minibatches(20):
                pipe.step(x, y)
            pipe.drain()
            states.append((copy.deepcopy(pipe.state_dict()), pipe.memory()[0].history))
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())
    assert states[0][1] < states[1][1]


def test_the_probe_looks_at_what_has_a_past() -> None:
    with pipeline([nn.Linear(6, 6), *chain(2)]) as pipe:
        probes = [ReconstructionProbe(stage, every=1) for stage in pipe.stages[:2]]
        for x, y in minibatches(12):
            pipe.step(x, y)
    assert not probes[0].readings
    assert probes[0].relative_error() is None
    assert probes[1].readings


def test_an_embedding_keeps_no_history() -> None:
    stages = [nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 6)), nn.Linear(6, 3)]
    with layerpipe.Pipeline(stages, F.cross_entropy, lambda p, **past: lk.SGD(p, lr=0.1, **past), past="stash") as pipe:
        for _ in range(6):
            pipe.step(torch.randint(50, (8,)), torch.randint(3, (8,)))
        assert pipe.memory()[0].history == 2 * sum(p.nbytes for p in stages[0][1].parameters())  # type: ignore[index]
