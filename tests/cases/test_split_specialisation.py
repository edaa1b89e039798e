"""What layerpipe.split fixes in its trace of a model is served later, or refused by name: never silently wrong."""

from __future__ import annotations

import pickle
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from layerpipe import split
from layerpipe.errors import SpecializationError, StageError
from tests.cases.split_models import Block, Blocks, X, drawn_alike
from tests.engine.models import through

RATE = 2.0


class Config:
    def __init__(self) -> None:
        self.shift, self.unread = 0.0, 1


class Net(nn.Module):
    """Numbers of its own, of its class, of a config, of its module."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)), nn.Linear(6, 3)
        self.temperature, self.rate, self.wide, self.unread = 1.0, 0.5, False, 0
        self.config: Any = Config()
        self.shifts = {"a": [0.0]}
        self.act: Callable[[Tensor], Tensor] = torch.tanh
        self.offset = torch.zeros(6)
        self.register_buffer("mean", torch.zeros(6))
        self.extra: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(self.act(layer(x)), self.rate, self.training)
        if self.wide:
            x = x * 3
        if self.extra is not None:
            x = self.extra(x)
        x = x * self.scale + self.config.shift + self.shifts["a"][0] + self.offset + self.mean
        return self.head(x) * RATE / self.temperature


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a temperature": (lambda m: setattr(m, "temperature", 0.1), "Net.temperature was 1.0 and is 0.1"),
    "a rate of dropout": (lambda m: setattr(m, "rate", 0.0), "Net.rate was 0.5 and is 0.0"),
    "a flag": (lambda m: setattr(m, "wide", True), "Net.wide was False and is True"),
    "what was None": (lambda m: setattr(m, "extra", nn.Linear(6, 6)), "Net.extra was None"),
    "a function": (lambda m: setattr(m, "act", torch.relu), "Net.act was"),
    "a field of a config": (lambda m: setattr(m.config, "shift", 1.0), "Net.config.shift was 0.0 and is 1.0"),
    "another config": (lambda m: setattr(m, "config", types.SimpleNamespace(shift=1.0)), "Net.config was"),
    "an entry of a nested list": (lambda m: m.shifts["a"].__setitem__(0, 1.0), "the content of Net.shifts has"),
    "a plain tensor replaced": (lambda m: setattr(m, "offset", torch.ones(6)), "Net.offset was"),
    "a buffer replaced": (lambda m: setattr(m, "mean", torch.ones(6)), "Net.mean has been replaced"),
    "a number of the class, covered": (lambda m: setattr(m, "scale", 2.0), "Net.scale has been replaced"),
    "a layer replaced": (lambda m: setattr(m, "head", nn.Linear(6, 3)), "a layer of Net has been replaced"),
    "a layer in a list replaced": (lambda m: m.layers.__setitem__(1, nn.Linear(6, 6)), "a layer of layers has been"),
    "a layer added to a list": (lambda m: m.layers.append(nn.Linear(6, 6)), "a layer of layers has been replaced"),
    "an attribute deleted": (lambda m: delattr(m, "wide"), "Net.wide was False"),
}  # fmt: skip


@pytest.mark.invariant(8)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_that_the_trace_has_fixed_is_refused_by_name(change: str) -> None:
    model = Net()
    stages = split(model, 2, (X,))
    assert drawn_alike(model, stages, X)
    act, message = CHANGES[change]
    act(model)
    with pytest.raises(SpecializationError, match=message.replace("[", r"\[")):
        through(stages, X)


def test_a_number_of_the_class_or_of_the_python_module_that_has_changed_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = split(Net(), 2, (X,))
    with monkeypatch.context() as patched:
        patched.setattr(Net, "scale", 2.0)
        with pytest.raises(SpecializationError, match=r"scale was 1\.0 and is 2\.0"):
            through(stages, X)
    with monkeypatch.context() as patched:
        patched.setitem(globals(), "RATE", 1.0)
        with pytest.raises(SpecializationError, match=r"test_split_specialisation\.RATE was 2.0 and is 1.0"):
            through(stages, X)
    through(stages, X)


def test_what_the_forward_does_not_read_may_change_and_what_is_put_back_is_as_it_was() -> None:
    model = Net()
    stages = split(model, 2, (X,))
    model.unread, model.config.unread, model.temperature = 5, 7, 0.5
    model.temperature = 1.0
    model.new = 3  # type: ignore[assignment]
    model.offset.fill_(2.0)
    model.mean.fill_(3.0)  # type: ignore[operator]
    model.layers[0].weight.data.mul_(2)  # type: ignore[union-attr,operator]
    assert drawn_alike(model, stages, X)


def test_layers_of_torch_are_shared_so_that_their_numbers_and_hooks_count() -> None:
    class WithLayers(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.drop(x))

    model = WithLayers()
    stages = split(model, 2, (X,))
    model.drop.p = 0.0
    model.head.register_forward_hook(lambda m, i, o: o * 2)
    assert drawn_alike(model, stages, X)


def test_a_pipeline_stops_with_the_stage_and_what_has_changed() -> None:
    model = Blocks()
    stages = split(model, 2, (X,))
    make = lambda params, **past: lk.SGD(params, lr=0.1, **past)
    for executor in ("serial", "threads"):
        model.blocks[3].gain = 1.0  # type: ignore[assignment]
        with layerpipe.Pipeline(stages, F.cross_entropy, make, executor=executor) as pipe:
            y = torch.zeros(8, dtype=torch.long)
            pipe.step(X, y)
            pipe.drain()
            model.blocks[3].gain = 0.5  # type: ignore[assignment]
            with pytest.raises(StageError, match=r"stage 1 .*blocks.3.gain was 1.0 and is 0.5"):
                for _ in range(4):
                    pipe.step(X, y)


def test_modes_are_the_models_own_wherever_they_are_switched() -> None:
    model = Net()
    model.eval()
    stages = split(model, 2, (X,))
    assert drawn_alike(model, stages, X)  # it begins as it was found
    for stage in stages:
        stage.train()
    assert model.training
    assert drawn_alike(model, stages, X)
    for stage in stages:
        stage.eval()
    assert not model.training
    assert drawn_alike(model, stages, X)
    model.train()
    with pytest.raises(SpecializationError, match=r"Net\.training is True and its stage's is False"):
        through(stages, X)


def test_a_block_that_is_in_another_mode_keeps_it() -> None:
    class Dropping(Block):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    model = Blocks(Dropping)
    model.blocks[1].eval()
    stages = split(model, 2, (X,))
    assert drawn_alike(model, stages, X)
    stages[0].eval()  # a frozen stage
    assert [block.training for block in model.blocks] == [False, False, True, True]
    assert drawn_alike(model, stages, X)
    model.blocks[3].eval()
    with pytest.raises(SpecializationError, match=r"blocks.3.training is False"):
        through(stages, X)


class Counting(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen: Any = x
        return super().forward(x) * self.calls


def test_a_block_that_sets_its_attributes_is_called_as_it_is() -> None:
    model = Blocks(Counting)
    stages = split(model, 2, (X,))
    assert [block.calls for block in model.blocks] == [0] * 4  # type: ignore[union-attr]
    through(stages, X)
    assert [block.calls for block in model.blocks] == [1] * 4  # type: ignore[union-attr]
    assert all(type(block.seen) is Tensor for block in model.blocks)  # type: ignore[union-attr]


def test_a_model_that_sets_its_attributes_is_refused_and_left_alone() -> None:
    class Remembering(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.outputs = list[Any]()

        def forward(self, x: Tensor) -> Tensor:
            self.last = x = super().forward(x)
            self.outputs.append(x)
            return x

    model = Remembering()
    with pytest.raises(ValueError, match=r"its forward changes Remembering\.(last|outputs)"):
        split(model, 2, (X,))
    assert not hasattr(model, "last")
    assert model.outputs == []


DRAWS: dict[str, Callable[[], float]] = {
    "Python": random.random,
    "NumPy": lambda: float(np.random.rand()),
    "torch": lambda: float(torch.rand(())),
}


@pytest.mark.parametrize("generator", DRAWS)
@pytest.mark.parametrize("examples", [(X,), None])
def test_random_numbers_that_a_trace_would_repeat_are_refused(generator: str, examples: Any) -> None:
    class Skipping(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * (1 + DRAWS[generator]()))

    model = Skipping()
    states = random.getstate(), np.random.get_state()[2], torch.random.get_rng_state()
    with pytest.raises(ValueError, match=rf"draws random numbers of {generator}"):
        split(model, 2, examples, balance="params")
    assert states[:2] == (random.getstate(), np.random.get_state()[2])
    assert torch.equal(states[2], torch.random.get_rng_state())


def test_gradients_switched_off_are_not_lost_without_examples() -> None:
    class Frozen(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.blocks[0](x)
            return self.head(self.blocks[1](x))  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"under torch.no_grad\(\) or torch.autocast.*give example_inputs"):
        split(Frozen(), 2, balance="params")


def test_compiled_models_and_parallel_ones_are_refused_and_compiled_blocks_stay_compiled() -> None:
    with pytest.raises(ValueError, match=r"the model is compiled.*wrap=torch.compile"):
        split(torch.compile(Blocks(), backend="eager"), 2, (X,))  # type: ignore[arg-type]
    model = Blocks()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"the model is compiled.*wrap=torch.compile"):
        split(model, 2, (X,))
    with pytest.raises(ValueError, match=r"split its \.module"):
        split(nn.DataParallel(Blocks()), 2, (X,))
    model = Blocks()
    model.blocks[1].compile(backend="eager")
    stages = split(model, 2, (X,))
    assert drawn_alike(model, stages, X)
    assert any(module is model.blocks[1] for stage in stages for module in stage.modules())


class Scaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 6
        return super().forward(x) * torch.tensor(2.0)


def test_constants_made_inside_a_block_are_cut_with_it() -> None:
    model = Blocks(Scaled)
    stages = split(model, 3, (X,))
    assert drawn_alike(model, stages, X)
    assert drawn_alike(model, pickle.loads(pickle.dumps(stages)), X)
    assert sorted(name for stage in stages for name in stage.state_dict()) == sorted(model.state_dict())
