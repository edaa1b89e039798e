"""A part of a model that was made on the meta device has the values that it has in a model that is made whole."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
from layerpipe.models import GPT, resnet18
from tests import forks
from tests.engine.models import minibatches
from tests.engine.pipelines import sgd


class _Odd(nn.Module):
    """What initialisers there are, data from Python, tied and sliced tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6, padding_idx=2)
        self.linear = nn.Linear(6, 6)
        nn.init.orthogonal_(self.linear.weight)
        nn.init.trunc_normal_(self.linear.bias, std=0.2)
        self.scale = nn.Parameter(torch.randn(3, 4) * 0.1 + torch.linspace(0, 1, 4))
        self.register_buffer("table", torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        self.register_buffer("mask", torch.ones(4, 4).tril())
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm2d(4)
        self.attention, self.lstm = nn.MultiheadAttention(6, 2), nn.LSTM(3, 4)
        nn.init.sparse_(self.attention.in_proj_weight, 0.3)
        self.output = nn.Linear(6, 9)
        self.output.weight = self.embedding.weight
        with torch.no_grad():
            self.linear.weight[1].fill_(3.0)
            self.scale.data.mul_(2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "odd": _Odd,
    "gpt": lambda: GPT(layers=2, width=16, heads=2, context=8, vocabulary=50),
    "resnet": lambda: resnet18(classes=10, width=8),
}


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) and x.stride() == y.stride() for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_every_part_alone_is_that_of_the_whole_model_bit_for_bit(name: str) -> None:
    torch.manual_seed(3)
    whole = MODELS[name]()
    after = torch.rand(2)
    for part, _ in whole.named_children():
        torch.manual_seed(3)
        with layerpipe.deferred_init() as init:
            model = MODELS[name]()
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        init.materialize([model.get_submodule(part)])
        assert equal(model.get_submodule(part), whole.get_submodule(part))
        assert torch.equal(torch.rand(2), after)  # a pipeline's random layers are seeded from there


def test_ties_attributes_and_frozen_weights_stay() -> None:
    with layerpipe.deferred_init() as init:
        model = _Odd()
    model.linear.bias.requires_grad_(False)
    model.scale.kind = "a mark"  # type: ignore[attr-defined]
    init.materialize([model])
    assert model.output.weight is model.embedding.weight
    assert not model.linear.bias.requires_grad
    assert model.scale.kind == "a mark"  # type: ignore[attr-defined]
    assert model.lstm(torch.zeros(1, 1, 3))[0].shape == (1, 1, 4)


def test_who_has_drawn_since_keeps_the_generators_state() -> None:
    with layerpipe.deferred_init() as init:
        layer = nn.Linear(3, 3)
    torch.manual_seed(9)
    init.materialize([layer])
    state = torch.get_rng_state()
    assert torch.equal(state, torch.manual_seed(9).get_state())


def test_what_was_made_elsewhere_is_refused_by_name() -> None:
    with layerpipe.deferred_init() as init:
        model = nn.Sequential(nn.Linear(2, 2))
    model.append(nn.Linear(2, 2, device="meta"))
    with pytest.raises(RuntimeError, match=r"1\.weight is on the meta device and was not made inside"):
        init.materialize([model])


def test_a_pipeline_of_deferred_stages_trains_as_one_of_made_ones() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3))

    def train(stages: list[nn.Module], **options: Any) -> dict[str, Tensor]:
        with layerpipe.Pipeline(stages, F.cross_entropy, sgd, **options) as pipe:
            for x, y in minibatches(6):
                pipe.step(x, y)
            pipe.drain()
            return pipe.state_dict()

    torch.manual_seed(5)
    expected = train(layerpipe.split(make(), 2, (torch.zeros(8, 6),), balance="params"))
    torch.manual_seed(5)
    with layerpipe.deferred_init() as init:
        model, x = make(), torch.empty(8, 6)
    found = train(layerpipe.split(model, 2, (x,), balance="params"), materialize=init.materialize)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_stages_on_meta_are_refused_where_nothing_makes_them() -> None:
    with pytest.raises(ValueError, match=r"weight of stage 0 .* give materialize="):
        layerpipe.Pipeline([nn.Linear(6, 3, device="meta")], F.cross_entropy, sgd)


def _big() -> nn.Module:
    """192 MiB."""
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(48)))


def _limited(rank: int, pipe: Any) -> None:
    """Make the stages of one of 16 processes where there is memory for four of them, and then the whole."""
    torch.set_num_threads(1)
    with layerpipe.deferred_init() as init:
        model, x = _big(), torch.empty(1, 1024)
    stages = layerpipe.split(model, 16, (x,), balance="params")
    with open("/proc/self/status") as file:
        used = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + (48 << 20), -1))
    init.materialize([stages[rank]])
    found = [p.shape for p in stages[rank].parameters() if not p.is_meta]
    try:
        _big()
        whole = "made"
    except RuntimeError as error:
        whole = str(error)
    pipe.send((len(found), whole))


def test_one_of_sixteen_processes_needs_the_memory_of_its_own_part() -> None:
    process, pipe = forks.start(_limited, 9)
    assert pipe.poll(60)
    made, whole = pipe.recv()
    process.join()
    assert made == 3
    assert "can't allocate memory" in whole
