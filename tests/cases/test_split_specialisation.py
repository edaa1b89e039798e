"""What layerpipe.split fixes in its trace of a model is served later, or refused by name: never silently wrong."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import types
import weakref
from collections.abc import Callable, Sequence
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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gain = nn.Linear(6, 6), nn.Linear(6, 6), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.b(torch.tanh(self.a(x)))


class Blocks(nn.Module):
    def __init__(self, kind: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(kind() for _ in range(4)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def through(stages: Sequence[nn.Module], *values: Any, **kwargs: Any) -> Any:
    for stage in stages:
        out = stage(*values, **kwargs)
        values, kwargs = out if isinstance(out, tuple) else (out,), {}
    return values[0]


def drawn_alike(model: nn.Module, stages: Sequence[nn.Module], x: Tensor) -> bool:
    outputs = []
    for run in (model, lambda x: through(stages, x)):
        torch.manual_seed(0)
        outputs.append(run(x))
    return bool(torch.allclose(*outputs, atol=1e-6))


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))

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


def hook(*_: Any) -> None:
    pass


REGISTER: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(hook),
    "forward, first": lambda m: m.register_forward_pre_hook(hook),
    "backward": lambda m: m.register_full_backward_hook(hook),
    "backward, first": lambda m: m.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("kind", REGISTER)
def test_a_hook_on_what_the_cut_goes_through_is_refused_after_the_split(kind: str) -> None:
    model = Blocks()
    stages = split(model, 2, (X,))
    for module, name in ((model.blocks[3], "blocks.3"), (model, "Blocks")):
        handle = REGISTER[kind](module)
        with pytest.raises(SpecializationError, match=f"a hook was registered on {name} after layerpipe.split"):
            through(stages, X)
        handle.remove()
        through(stages, X)


@pytest.mark.parametrize("kind", REGISTER)
def test_a_hook_from_before_the_split_keeps_its_module_whole_and_is_called_while_it_is_there(kind: str) -> None:
    model, calls = Blocks(), list[str]()
    # By name, as the hook is a closure and not the function that REGISTER takes from this module.
    ways = {"forward": "forward_hook", "forward, first": "forward_pre_hook", "backward": "full_backward_hook",
            "backward, first": "full_backward_pre_hook"}  # fmt: skip
    handle = getattr(model.blocks[1], f"register_{ways[kind]}")(lambda *_: calls.append("seen"))
    stages = split(model, 2, (X,))
    calls.clear()
    through(stages, X.clone().requires_grad_()).sum().backward()
    assert calls == ["seen"]
    handle.remove()
    through(stages, X).sum().backward()
    assert calls == ["seen"]


def test_a_block_that_is_kept_whole_weighs_as_much_as_its_layers() -> None:
    cut, whole = Blocks(), Blocks()
    whole.blocks[1].register_forward_hook(hook)
    x = torch.randn(8, 6)
    first, _ = layerpipe.split(whole, 2, (x,))
    assert first(x).shape == layerpipe.split(cut, 2, (x,))[0](x).shape == x.shape  # both are cut between two blocks


def test_a_hook_that_changes_the_output_does_so_until_it_is_removed() -> None:
    model = Blocks()
    handle = model.blocks[2].register_forward_hook(lambda m, i, o: o * 0.5)
    stages = split(model, 2, (X,))
    assert drawn_alike(model, stages, X)
    handle.remove()
    assert drawn_alike(model, stages, X)


def test_a_hook_on_the_model_itself_is_refused_with_the_way_out() -> None:
    model = Blocks()
    model.register_forward_hook(hook)
    with pytest.raises(ValueError, match="Blocks has a hook of its own, which no stage would call"):
        split(model, 2, (X,))


def test_a_hook_on_all_that_could_be_cut_is_named() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    model[0].register_forward_hook(hook)
    with pytest.raises(ValueError, match="0 is not taken apart for its hooks"):
        split(model, 2, (X,))


class Long(nn.Module):
    """Code that asks for sizes, which torch.export traces."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.layers = nn.Embedding(16, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head, self.gain = nn.Linear(6, 3), 1.0

    def forward(self, x: Tensor, mask: Tensor | None = None, repeat: int = 1, mean: bool = True) -> Tensor:
        if x.shape[1] > 16:
            x = x[:, :16]
        x = x + self.positions(torch.arange(x.shape[1]))
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.gain
        if mask is not None:
            x = x * mask
        x = x.sum(1) / x.shape[1] if mean else x.sum(1)
        return self.head(x) * repeat


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
