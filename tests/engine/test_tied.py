"""Layers that a model has under several names, layers that change their own buffers, and values that are not there."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerpipe
import layerpipe_kernels
from layerpipe import split
from layerpipe.partition.partition import cut_at
from tests.engine.models import through


class Shared(nn.Module):
    """One normalization under three names, used twice, and its weight under two more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.wide = nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.Linear(256, 256), nn.Linear(256, 3))
        self.blocks = nn.ModuleDict({"a": self.norm, "b": nn.Sequential(self.norm)})
        self.scale = self.gain = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.blocks["b"](torch.tanh(self.norm(self.first(x)))))  # type: ignore[no-any-return]


class CountingNorm(nn.Module):
    """As timm writes it: a function of torch's, and a count of its own in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.batches.add_(1)
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return (x - self.mean) * self.weight


class Masked(nn.Linear):
    """Between its mask, which there is not, and its use lies no place to cut."""

    def forward(self, x: Tensor) -> Tensor:
        mask = mask_of(x)
        return masked(super().forward(x), mask)


def unmasked() -> nn.Sequential:
    return nn.Sequential(Masked(4, 4), Masked(4, 4), Masked(4, 3))


@torch.fx.wrap
def mask_of(x: Tensor) -> Tensor | None:
    return None if x.dim() == 2 else x > 0


@torch.fx.wrap
def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def counting() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), CountingNorm(4), nn.Linear(4, 4), CountingNorm(4), nn.Linear(4, 3))


def trained(model: nn.Module, stages: list[nn.Module] | None, x: Tensor) -> dict[str, Tensor]:
    """The state after two minibatches, of the model or of a pipeline of its stages without a delay."""
    y = torch.zeros(len(x), dtype=torch.long)
    if stages is not None:
        sgd: Any = lambda params, **past: layerpipe_kernels.SGD(params, lr=0.1, **past)
        with layerpipe.Pipeline(stages, nn.functional.cross_entropy, sgd, schedule="sequential") as pipe:
            for _ in range(2):
                pipe.step(x, y)
            return dict(pipe.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return dict(model.state_dict())


@pytest.mark.parametrize("balance", ["flops", "time", "params"])
@pytest.mark.parametrize("make", [Shared, counting, unmasked])
def test_stages_train_as_the_model_does_and_have_all_its_names(make: Any, balance: str) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(5, 4)
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    own = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    stages = split(model, 2, (x,), balance=balance)
    after = model.state_dict(keep_vars=True)
    assert {name: id(tensor) for name, tensor in after.items()} == own  # nothing was left in place of a tensor
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    found, expected = trained(model, stages, x), trained(reference, None, x)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    reference.load_state_dict(found)


def test_a_layer_that_counts_is_taken_whole_and_its_neighbours_are_not() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = counting()

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3] + self.layers(x)  # type: ignore[no-any-return]

    stages = split(nn.Sequential(Block(), nn.Linear(3, 3)), 6, balance="params")
    assert cut_at(stages) == ["0.layers.1", "0.layers.2", "0.layers.3", "0.layers.4", "1"]


def test_copies_keep_all_names_of_a_tensor() -> None:
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(5, 4)
    parts = split(model, 2, (x,))
    names = [list(part.state_dict()) for part in parts]
    for again in (copy.deepcopy(parts), pickle.loads(pickle.dumps(parts)), copy.deepcopy(copy.deepcopy(parts))):
        assert [sorted(part.state_dict()) for part in again] == [sorted(part) for part in names]
        assert [len(list(a.parameters())) for a in again] == [len(list(b.parameters())) for b in parts]  # still one
        assert torch.equal(through(again, x), through(copy.deepcopy(parts), x))
