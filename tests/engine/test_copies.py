"""Weights that a forward uses only as a copy are reported."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from tests.engine.models import chain, minibatches
from tests.engine.pipelines import pipeline


def test_a_copied_weight_is_reported_once_with_its_name() -> None:
    stages = chain(3)
    stages[0] = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    with pipeline(stages) as pipe, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in minibatches(8):
            pipe.step(x, y)
    messages = [str(w.message) for w in caught if "works on copies" in str(w.message)]
    assert len(messages) == 1
    assert "stage 0" in messages[0]
    assert "0.parametrizations.weight.original1" in messages[0]


def test_autocast_is_reported() -> None:
    class Cast(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    with (
        pytest.warns(UserWarning, match=r"stage 0 .*copies of .*weight"),
        pipeline([Cast(6, 6), nn.Linear(6, 3)]) as pipe,
    ):
        for x, y in minibatches(8):
            pipe.step(x, y)


def test_lookups_and_views_are_no_copies() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.weight = nn.Embedding(10, 6), nn.Parameter(torch.randn(12, 6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.table(x.abs().long().clamp(max=9)).mean(1)
            return y @ self.weight[:6].t() + y @ self.weight.view(2, 6, 6)[1]

    with pipeline([Views(), nn.Linear(6, 3)]) as pipe, warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in minibatches(6):
            pipe.step(x, y)


def test_plain_layers_are_not_reported_as_copies() -> None:
    with pipeline() as pipe, warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in minibatches(4):
            pipe.step(x, y)
