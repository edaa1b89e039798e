"""What is not one tensor does not cross a boundary: a tuple is taken apart in the stage that makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerpipe import split
from layerpipe.partition.forward import trace
from layerpipe.partition.values import is_tensor


class Between(nn.Module):
    """A function of 8 features between two layers."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.function, self.last = nn.Linear(4, 8), function, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.function(self.first(x)))


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "cat of chunk": lambda x: torch.cat(x.chunk(4, 1)[:2], 1),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "max of all": lambda x: x[:, :4] * x.max(),
    "max": lambda x: x.view(-1, 4, 2).max(dim=2)[0],
    "median": lambda x: x.view(-1, 4, 2).median(dim=2).values,
    "size": lambda x: x.view(x.size(0) * 2, x.shape[1] // 2),
    "slice": lambda x: x[:, :4],
    "sort": lambda x: torch.sort(x)[0][:, :4],
    "topk": lambda x: x.topk(4)[0],
    "var_mean": lambda x: torch.var_mean(x.view(-1, 4, 2), 2)[1],
}


@pytest.mark.parametrize("told", [True, False], ids=["run without data", "as far as it shows"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_that_return_several_tensors(function: str, told: bool) -> None:
    check(Between(FUNCTIONS[function]), 2, told)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_shows_is_what_running_without_data_finds(function: str) -> None:
    model = Between(FUNCTIONS[function])
    found, shown = (
        {node.name: is_tensor(forward.root, node) for node in forward.nodes}
        for forward in (trace(model, (torch.randn(3, 4),)), trace(model))
    )
    assert shown == found


class Block(nn.Linear):
    """A layer of one's own with two outputs, which torch.fx cannot look into."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        assert len(x) < 100
        return super().forward(x), x.sum(dim=1, keepdim=True)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(4, 8), Block(8, 4)
        self.lstm, self.last = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        y, total = self.block(self.first(x))
        h, (c, _) = self.lstm(y.unsqueeze(1))
        return self.last(h[:, 0] * c[0]) + total


@pytest.mark.parametrize("told", [True, False], ids=["run without data", "as far as it shows"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_layers_that_return_several_tensors(stages: int, told: bool) -> None:
    check(Layers(), stages, told)


@pytest.mark.parametrize("told", [True, False], ids=["run without data", "as far as it shows"])
def test_a_tuple_that_is_needed_on_both_sides_is_named(told: bool) -> None:
    class Late(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            largest = self[0](x).max(dim=1, keepdim=True)
            return self[2](self[1](largest[0] * x)) + largest[1]

    with pytest.raises(ValueError, match="no cut before 1, for example: max_1, which is not one tensor"):
        split(Late(*(nn.Linear(4, 4) for _ in range(3))), 3, (torch.randn(3, 4),) if told else None, balance="params")


def test_a_number_given_to_the_model_crosses_no_boundary() -> None:
    class Scaled(nn.Sequential):
        def forward(self, x: Tensor, scale: float) -> Any:  # type: ignore[override]
            return self[1](self[0](x)) * scale

    with pytest.raises(ValueError, match="scale, which is not one tensor"):
        split(Scaled(nn.Linear(4, 4), nn.Linear(4, 4)), 2, (torch.randn(3, 4), 2.0))


def test_running_without_data_changes_no_buffer_and_draws_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4))
    before = [value.clone() for value in (*model.state_dict().values(), torch.get_rng_state())]
    split(model, 2, (torch.ones(3, 4),), at=["3"])
    assert all(map(torch.equal, before, (*model.state_dict().values(), torch.get_rng_state())))


def check(model: nn.Module, stages: int, told: bool) -> None:
    x = torch.randn(3, 4)
    values: Any = (x,)
    for part in split(model, stages, (x,)) if told else split(model, stages, balance="params"):
        out = part(*values)
        values = out if isinstance(out, tuple) else (out,)
        assert all(isinstance(value, Tensor) for value in values)
    assert torch.equal(values[0], model(x))
