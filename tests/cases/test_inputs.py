"""Inputs of a step that are more than a tensor or a tuple: dicts, keyword arguments, named tuples, structures."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import layerpipe
import layerpipe_kernels as lk
from layerpipe.errors import SpecializationError, StageError
from layerpipe.partition.profile import profile

Batch = collections.namedtuple("Batch", "x shift")
EXECUTORS = ("serial", "threads")


class Keyed(nn.Module):
    """Takes what a tokenizer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.layers, self.head = (
            nn.Embedding(11, 6),
            nn.ModuleList(nn.Linear(6, 6) for _ in range(3)),
            nn.Linear(6, 3),
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        flag: bool = False,
    ) -> Tensor:
        x = self.e(input_ids)
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        if scale is not None:
            x = x * scale
        return self.head(x.mean(1))


class Shaped(Keyed):
    """The same for torch.export, with a ``**kwargs``."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:  # type: ignore[override]
        found = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
        assert found["input_ids"].shape[1] == 5
        return super().forward(**found)  # type: ignore[arg-type]


def sgd(params: Any, **past: Any) -> Any:
    return lk.SGD(params, lr=0.1, **past)


def batch(size: int = 4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(size)
    ids = torch.randint(11, (size, 5), generator=g)
    return {
        "input_ids": ids,
        "attention_mask": (torch.rand(size, 5, generator=g) > 0.3).float(),
        "scale": torch.rand(6),
    }


def rest(minibatch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in minibatch.items() if name != "input_ids"}


def trained(model: nn.Module, stages: list[nn.Module], feed: Callable[[Any], Any], executor: str) -> None:
    """A pipeline without a delay does what a plain loop does."""
    y = torch.tensor([0, 1, 2, 0])
    minibatches = [batch() for _ in range(3)]
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    right = []
    for minibatch in minibatches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(**minibatch), y)
        loss.backward()
        optimizer.step()
        right.append(loss.detach())
    weights = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, value in zip(model.parameters(), start, strict=True):
            p.copy_(value)
    with layerpipe.Pipeline(stages, F.cross_entropy, sgd, schedule="sequential", executor=executor) as pipe:
        losses = [feed(pipe)(minibatch, y) for minibatch in minibatches]
        losses = [*(loss for loss in losses if loss is not None), *pipe.drain()]
        pipe.eval()
        output = pipe(**minibatches[0])
    assert torch.allclose(torch.stack(losses), torch.stack(right), atol=1e-6)
    assert torch.allclose(output, model(**minibatches[0]), atol=1e-6)
    assert all(torch.allclose(p, w, atol=1e-6) for p, w in zip(model.parameters(), weights, strict=True))


FEEDS: dict[str, Callable[[Any], Any]] = {
    "a dict": lambda pipe: pipe.step,
    "keywords besides": lambda pipe: lambda b, y: pipe.step(b["input_ids"], y, **rest(b)),
    "a dict and keywords": lambda pipe: lambda b, y: pipe.step({"input_ids": b["input_ids"]}, y, **rest(b)),
}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("kind", [Keyed, Shaped])
def test_dicts_and_keyword_arguments_reach_the_first_stage(kind: Any, feed: str, executor: str) -> None:
    if executor == "threads" and feed != "a dict":
        pytest.skip("how it is given is the caller's thread's affair")
    torch.manual_seed(0)
    model = kind()
    trained(model, layerpipe.split(model, 3, batch()), FEEDS[feed], executor)


@pytest.mark.parametrize("kind", [Keyed, Shaped])
def test_examples_may_be_given_in_every_way_that_a_forward_takes(kind: Any) -> None:
    torch.manual_seed(0)
    model, b = kind(), batch()
    ways = [
        layerpipe.split(model, 2, b),
        layerpipe.split(model, 2, example_kwargs=dict(reversed(b.items()))),
    ]
    if kind is Keyed:  # whose parameters have names; of *args it is fixed which arguments they are
        ways.append(layerpipe.split(model, 2, (b["input_ids"],), example_kwargs=rest(b)))
    for stages in ways:
        pipe = layerpipe.Pipeline(stages, F.cross_entropy, sgd)
        assert torch.allclose(pipe(**b), model(**b), atol=1e-6)
    assert len(profile(model, b)) == len(profile(model, (b["input_ids"],)))


def test_stages_made_by_hand_take_them_too() -> None:
    class First(nn.Linear):
        def forward(self, x: Tensor, *, shift: Tensor, **more: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + shift + sum(more.values()))

    stages, x, y = [First(6, 6), nn.Linear(6, 3)], torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    right = F.cross_entropy(stages[1](stages[0](x, shift=x, a=x, b=x)), y)
    with layerpipe.Pipeline(stages, F.cross_entropy, sgd, schedule="sequential") as pipe:
        loss = pipe.step({"x": x, "shift": x, "a": x}, y, b=x)
        assert loss is not None
        assert torch.allclose(loss, right)
        with pytest.raises(TypeError, match="First takes x, shift, more: missing a required"):
            pipe.step(x, y, a=x)
        pipe.step(x, y, shift=x)  # nothing was fed


def test_what_the_examples_lacked_is_refused_before_it_is_fed() -> None:
    b, y = batch(), torch.tensor([0, 1, 2, 0])
    with layerpipe.Pipeline(layerpipe.split(Keyed(), 2, (b["input_ids"],)), F.cross_entropy, sgd) as pipe:
        with pytest.raises(TypeError, match=r"given examples of input_ids alone .*attention_mask"):
            pipe.step(b, y)
        pipe.step({"input_ids": b["input_ids"]}, y)
    with layerpipe.Pipeline(layerpipe.split(Shaped(), 2, b), F.cross_entropy, sgd) as pipe:
        with pytest.raises(SpecializationError, match=r"attention_mask.*shape\[1\] was 5 and is 4"):
            pipe.step({**b, "attention_mask": b["attention_mask"][:, :4]}, y)
        assert pipe.fed == 0
        pipe.step(b, y)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r = nn.GRU(6, 6, batch_first=True)

    def forward(self, packed: Any) -> Tensor:
        return self.r(packed)[1][0]  # type: ignore[no-any-return]


class OfBatch(nn.Linear):
    def forward(self, batch: Any) -> Tensor:
        x, shift = (batch["x"], batch["shift"]) if isinstance(batch, dict) else (batch.x, batch.shift)
        return super().forward(x + shift)


@dataclasses.dataclass
class Data:
    x: Tensor
    shift: Tensor


X, SHIFT = torch.randn(4, 6), torch.ones(6)
PACKED = pack_padded_sequence(torch.randn(4, 5, 6), torch.tensor([5, 4, 3, 2]), batch_first=True)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("first", "given"),
    [
        (Reader(), PACKED),
        (Reader(), (PACKED,)),
        (OfBatch(6, 6), Batch(X, SHIFT)),
        (OfBatch(6, 6), (Batch(X, SHIFT),)),
        (OfBatch(6, 6), Data(X, SHIFT)),
        (OfBatch(6, 6), ({"x": X, "shift": SHIFT},)),
        (OfBatch(6, 6), {"batch": {"x": X, "shift": SHIFT}}),
    ],
)
def test_one_argument_that_is_a_structure_arrives_as_it_is(first: nn.Module, given: Any, executor: str) -> None:
    stages, y = [first, nn.Linear(6, 3)], torch.tensor([0, 1, 2, 0])
    argument = given[0] if type(given) is tuple else given["batch"] if isinstance(given, dict) else given
    right = F.cross_entropy(stages[1](stages[0](argument)), y)
    with layerpipe.Pipeline(stages, F.cross_entropy, sgd, schedule="sequential", executor=executor) as pipe:
        losses = [pipe.step(given, y), *pipe.drain()]
    assert torch.allclose(next(loss for loss in losses if loss is not None), right)


def test_a_structure_whose_tensors_require_gradients_is_refused() -> None:
    with layerpipe.Pipeline([OfBatch(6, 6), nn.Linear(6, 3)], F.cross_entropy, sgd) as pipe:
        for given in (Batch(X, SHIFT.clone().requires_grad_()), {"batch": {"x": X.clone().requires_grad_()}}):
            with pytest.raises(ValueError, match="no gradient of its inputs"):
                pipe.step(given, torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("exported", [False, True])
def test_a_model_that_takes_a_structure_is_split(exported: bool) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, batch: Any) -> Tensor:
            x = batch["x"] + batch["more"][0]
            if exported:
                assert x.shape[1] == 6
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))  # type: ignore[no-any-return]

    model, given = Whole(), {"x": X, "more": [SHIFT]}
    stages = layerpipe.split(model, 3, (given,))
    pipe = layerpipe.Pipeline(stages, F.cross_entropy, sgd)
    assert torch.allclose(pipe(given), model(given))
    assert pipe.step((given,), torch.tensor([0, 1, 2, 0])) is None
    if exported:
        with pytest.raises(SpecializationError, match=r"batch\['x'\].shape\[1\] was 6 and is 5"):
            pipe.step(({"x": X[:, :5], "more": [SHIFT]},), torch.tensor([0, 1, 2, 0]))


def test_structures_between_stages_are_refused_and_out_of_the_last_one_they_are_not() -> None:
    class Returns(nn.Linear):
        def __init__(self, made: Callable[[Tensor], Any]) -> None:
            super().__init__(6, 6)
            self.made = made

        def forward(self, x: Tensor) -> Any:
            return self.made(super().forward(x))

    y = torch.tensor([0, 1, 2, 0])
    made: dict[str, Callable[[Tensor], Any]] = {
        "dict": lambda h: {"x": h, "shift": h * 0},
        "Batch": lambda h: Batch(h, h * 0),
        "Data": lambda h: Data(h, h * 0),
    }
    losses: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "dict": lambda out, y: F.cross_entropy(out["x"], y),
        "Batch": lambda out, y: F.cross_entropy(out.x, y),
        "Data": lambda out, y: F.cross_entropy(out.x, y),
    }
    for name, make in made.items():
        pipe = layerpipe.Pipeline([Returns(make), OfBatch(6, 6)], F.cross_entropy, sgd)
        with pytest.raises(StageError, match=f"got {name}: hand its tensors on as a tuple"):
            pipe.step(X, y)
        stages = [nn.Linear(6, 6), Returns(make)]
        right = losses[name](stages[1](stages[0](X)), y)
        for past in ("blend", "stash"):
            with layerpipe.Pipeline(stages, losses[name], sgd, past=past) as pipe:
                found = [loss for loss in (pipe.step(X, y), *pipe.drain()) if loss is not None]
                assert type(pipe(X)).__name__ == name
            assert past == "stash" or torch.allclose(found[0], right)
