from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerpipe import split
from layerpipe.partition import cut_at, share_threads
from layerpipe.partition.balance import balance as balanced
from layerpipe.partition.split_stage import is_split, label
from tests.engine.models import sequential


@pytest.mark.parametrize("balance", ["params", "flops", "time"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_compute_what_the_model_computes(balance: str, stages: int) -> None:
    model, x = sequential(), torch.randn(5, 4)
    parts = split(model, stages, (x,), balance=balance)
    assert len(parts) == stages
    y = x
    for part in parts:
        y = part(y)
    assert torch.equal(y, model(x))


def test_stages_share_the_layers_and_keep_their_names() -> None:
    model = sequential()
    parts = split(model, 3, balance="params")
    named = dict(itertools.chain.from_iterable(part.named_parameters() for part in parts))
    assert named.keys() == dict(model.named_parameters()).keys()
    assert all(named[name] is param for name, param in model.named_parameters())


class Constants(nn.Module):
    """Tensors of every kind that a forward reads by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.plain = nn.Linear(4, 4), nn.Linear(4, 4), torch.rand(4)
        self.register_buffer("kept", torch.rand(4))
        self.register_buffer("made", torch.rand(4), persistent=False)
        self.first.register_buffer("beside", torch.rand(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x * self.made) * self.plain * torch.ones(4)
        return self.last((y + self.kept) * self.first.beside)


@pytest.mark.parametrize("traced_by", ["fx", "export"])
def test_the_state_has_the_models_own_buffers_and_no_constants(traced_by: str) -> None:
    class Asserting(Constants):
        def forward(self, x: Tensor) -> Tensor:
            assert traced_by == "fx" or x.shape[1] == 4
            return super().forward(x)

    model, x = Asserting(), torch.randn(3, 4)
    parts = split(model, 2, (x,), balance="params")
    for again in (parts, copy.deepcopy(parts), pickle.loads(pickle.dumps(parts))):
        assert {name for part in again for name in part.state_dict()} == model.state_dict().keys()
        assert torch.equal(nn.Sequential(*again)(x), model(x))


@pytest.mark.parametrize("stages", [4, 10])
def test_resnet(stages: int) -> None:
    model = pytest.importorskip("torchvision").models.resnet18(num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    parts = split(model, stages, (x,))
    values = (x,)
    for part in parts:
        out = part(*values)
        values = out if isinstance(out, tuple) else (out,)
    assert torch.equal(values[0], model(x))
    assert label(parts[0]).startswith("conv1")
    assert label(parts[-1]).endswith("fc")


def test_measuring_changes_no_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    split(model, 2, (torch.randn(8, 4),), balance="time")
    split(model, 2, (torch.randn(8, 4),), balance="flops")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_cut_before_an_operation_in_place() -> None:
    for part in split(sequential(), 4, balance="params"):
        assert not (label(part).startswith("1"))


def test_balance_is_optimal() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        count = int(torch.randint(1, 9, (), generator=generator))
        costs = torch.rand(count, generator=generator).tolist()
        for parts in range(1, count + 1):
            best = min(
                max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *inner, count]))
                for inner in itertools.combinations(range(1, count), parts - 1)
            )
            cuts = balanced(costs, parts)
            assert cuts[0] == 0
            assert cuts[-1] == count
            assert sorted(set(cuts)) == cuts
            assert max(sum(costs[a:b]) for a, b in itertools.pairwise(cuts)) == pytest.approx(best)


def test_stages_can_be_pickled() -> None:
    part = split(sequential(), 2, balance="params")[0]
    x = torch.randn(3, 4)
    again = pickle.loads(pickle.dumps(part))
    assert torch.equal(again(x), part(x))
    assert is_split(again)
    assert label(again) == label(part)


class Dropping(nn.Module):
    """Dropout as a function, whose mode a trace would freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.dropout(self.a(x), 0.5, self.training))


class Shortcut(Dropping):
    """Training and evaluation are different operations."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if self.training else self.b(x)


@pytest.mark.parametrize(("model", "stages"), [(Dropping(), 2), (nn.Sequential(Dropping(), nn.Linear(4, 4)), 3)])
def test_training_mode_is_not_frozen_into_the_stages(model: nn.Module, stages: int) -> None:
    parts = split(model, stages, balance="params")
    x = torch.randn(8, 4)

    def run() -> Tensor:
        y = x
        for part in parts:
            y = part(y)
        return y

    assert not torch.equal(run(), run())
    for part in parts:
        part.eval()
    assert torch.equal(run(), model.eval()(x))


def test_other_operations_in_training_leave_a_block_whole() -> None:
    model, x = nn.Sequential(Shortcut(), nn.Linear(4, 4), Shortcut()), torch.randn(2, 4)
    parts = split(model, 3, balance="params")
    for mode in (True, False):
        for part in parts:
            part.train(mode)
        assert torch.equal(parts[2](parts[1](parts[0](x))), model.train(mode)(x))
    with pytest.raises(ValueError, match=r"self\.training"):
        split(Shortcut(), 2, balance="params")


def test_tracing_leaves_modes_alone() -> None:
    model = sequential().train()
    model[2].eval()
    split(model, 2, balance="params")
    assert [m.training for m in model] == [True, True, False, True, True]


def test_unused_parameters_are_named() -> None:
    class Spare(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
            self.spare = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x))

    with pytest.warns(UserWarning, match="^spare: not used in the forward"):
        split(Spare(), 2, balance="params")


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


class Skipping(nn.Module):
    """The skip connection leaves no place to cut inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.c(torch.relu(self.b(y)) + y)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.a(x)))


def test_a_skip_connection_stays_in_one_stage() -> None:
    model = Skipping()
    parts = split(model, 3, balance="params")
    assert [sorted(n.split(".")[0] for n, _ in p.named_parameters() if "weight" in n) for p in parts] == [
        ["a"],
        ["b"],
        ["c"],
    ]
    x = torch.randn(2, 4)
    assert torch.equal(parts[2](parts[1](parts[0](x))), model(x))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (sequential(), {"stages": 9, "balance": "params"}, "into 9 stages: it has 4 splittable layers"),
        (sequential(), {"stages": 0}, "at least one stage"),
        (sequential(), {"stages": 2, "balance": "colour"}, "flops, time, params, bytes"),
        (sequential(), {"stages": 2}, "example_inputs"),
        (Branching(), {"stages": 2, "balance": "params"}, "cannot be traced.*by hand"),
        (Tied(), {"stages": 3, "balance": "params"}, "tied weights"),
    ],
)
def test_what_cannot_be_split_is_refused_with_a_way_out(
    model: nn.Module, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        split(model, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("costs", "threads", "shares"),
    [
        ((3.0, 1.0), 4, [3, 1]),
        ((1.0, 1.0), 5, [3, 2]),
        ((1.0, 8.0, 1.0), 6, [1, 4, 1]),
        ((5.0, 1.0), 1, [1, 1]),
        ((None, None), 5, [2, 2]),  # made by hand: nothing is known of them
    ],
)
def test_threads_are_shared_by_what_stages_cost(
    costs: tuple[float | None, ...], threads: int, shares: list[int]
) -> None:
    stages = [nn.Linear(1, 1) for _ in costs]
    for stage, cost in zip(stages, costs, strict=True):
        if cost is not None:
            stage.meta = {"cost": cost}  # type: ignore[assignment]
    assert share_threads(threads, stages) == shares


def test_split_says_what_its_stages_cost() -> None:
    parts = split(sequential(), 2, balance="params")
    assert [part.meta["cost"] for part in copy.deepcopy(parts)] == [
        sum(p.numel() for p in part.parameters()) for part in parts
    ]


@pytest.mark.parametrize("copied", [False, True])
def test_stages_know_where_they_were_cut(copied: bool) -> None:
    model = sequential()
    stages: list[Any] = split(model, 3, balance="params")
    at = cut_at(copy.deepcopy(stages) if copied else stages)
    again = split(model, 3, at=at)
    assert [label(stage) for stage in again] == [label(stage) for stage in stages]
    assert cut_at([torch.compile(stage) for stage in stages]) == at == cut_at(again)
    with pytest.raises(ValueError, match=r"layerpipe\.split"):
        cut_at([*stages, nn.Linear(2, 2)])


def test_example_inputs_that_are_one_tensor_are_refused() -> None:
    with pytest.raises(TypeError, match="give a tuple of the forward's arguments"):
        split(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 2, torch.ones(3, 4))  # type: ignore[arg-type]
