"""Sizes, dtypes and flags that layerpipe.split has fixed are refused when they change."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerpipe import split
from layerpipe.errors import SpecializationError
from tests.cases.split_models import Blocks, Long, X, drawn_alike
from tests.engine.models import through


def test_other_sizes_than_torch_export_has_seen_are_refused_and_other_minibatches_are_not() -> None:
    model = Long()
    stages = split(model, 2, (torch.randn(8, 5, 6),))
    for batch in (1, 2, 8, 11):
        assert drawn_alike(model, stages, torch.randn(batch, 5, 6))
    for length in (4, 20):
        with pytest.raises(SpecializationError, match=rf"x.shape\[1\] was 5 and is {length}"):
            through(stages, torch.randn(8, length, 6))
    with pytest.raises(SpecializationError, match=r"x was of shape"):
        through(stages, torch.randn(8, 6))
    model.gain = 2.0
    with pytest.raises(SpecializationError, match=r"Long\.gain was 1\.0 and is 2\.0"):
        through(stages, torch.randn(8, 5, 6))


def test_numbers_flags_and_nones_that_torch_export_has_seen_are_refused_when_they_change() -> None:
    x, mask = torch.randn(8, 5, 6), torch.rand(8, 5, 1)
    stages = split(Long(), 2, (x, None, 2, False))
    through(stages, x, None, 2, False)
    for args, message in (
        ((x, None, 3, False), "repeat was 2 and is 3"),
        ((x, None, 2, True), "mean was False and is True"),
        ((x, mask, 2, False), "mask was None and is a tensor"),
    ):
        with pytest.raises(SpecializationError, match=message):
            through(stages, *args)


def test_a_none_that_torch_fx_has_seen_is_refused_when_it_is_a_tensor() -> None:
    class Optional(Blocks):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x if mask is None else x * mask)

    stages = split(Optional(), 2, (X, None))
    through(stages, X, None)
    with pytest.raises(SpecializationError, match="mask was None and is a tensor"):
        through(stages, X, X)


class Pair(nn.Module):
    """Asks for the minibatch's size, or whether two are alike."""

    def __init__(self, question: Callable[[Tensor, Tensor], bool]) -> None:
        super().__init__()
        self.a, self.b, self.question = nn.Linear(6, 6), nn.Linear(6, 3), question

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = h * 2 if self.question(x, y) else h
        return self.b(h) + y


@pytest.mark.parametrize(
    ("question", "right", "wrong"),
    [
        (lambda x, y: x.shape[0] > 4, [5, 9], [2, 1]),
        (lambda x, y: x.shape[0] % 4 == 0, [4, 12], [6, 1]),
        (lambda x, y: x.shape[0] == 1, [2, 9], [1]),
        (lambda x, y: x.shape[0] == 8, [8], [4]),
    ],
)
def test_a_question_for_the_size_of_the_minibatch_has_one_answer(
    question: Any, right: list[int], wrong: list[int]
) -> None:
    model = Pair(question)
    stages = split(model, 2, (torch.randn(8, 6), torch.randn(8, 3)))
    for count in (*right, *wrong):
        x, y = torch.randn(count, 6), torch.randn(count, 3)
        if count in wrong:
            with pytest.raises(SpecializationError):
                through(stages, x, y)
        else:
            assert torch.allclose(through(stages, x, y), model(x, y))


def test_numbers_made_of_a_dtype_refuse_another() -> None:
    class Masked(Long):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x.masked_fill(x > 1, torch.finfo(x.dtype).max / 1e3))

    x = torch.randn(8, 5, 6)
    for kind, refused in ((Masked, True), (Long, False)):
        stages = [stage.double() for stage in copy.deepcopy(split(kind(), 2, (x,)))]
        if refused:
            with pytest.raises(SpecializationError, match=r"x was of torch\.float32 and is of torch\.float64"):
                through(stages, x.double())
        else:
            through(stages, x.double())


def test_compiled_stages_refuse_the_same() -> None:
    model = Long()
    x = torch.randn(8, 5, 6)
    stages = split(model, 2, (x,), wrap=lambda stage: torch.compile(stage, backend="eager", fullgraph=True))
    assert torch.allclose(through(stages, x), model(x), atol=1e-6)
    with pytest.raises(SpecializationError, match=r"x.shape\[1\] was 5 and is 7"):
        through(stages, torch.randn(8, 7, 6))
    model.gain = 2.0
    with pytest.raises(SpecializationError, match=r"Long\.gain"):
        through(stages, x)


def test_copies_and_what_outlives_the_model_guard_their_inputs_alone() -> None:
    model, x = Long(), torch.randn(8, 5, 6)
    stages = split(model, 2, (x,))
    model.gain = 3.0
    for copies in (copy.deepcopy(stages), pickle.loads(pickle.dumps(stages))):
        through(copies, x)
        with pytest.raises(SpecializationError, match=r"x.shape\[1\] was 5 and is 7"):
            through(copies, torch.randn(8, 7, 6))
    last, positions = weakref.ref(model.head.weight), weakref.ref(model.positions.weight)
    del model, copies
    first = stages[0]
    del stages
    gc.collect()
    assert last() is None  # a process of several keeps no other's weights
    assert positions() is not None
    first(x)
