"""Backwards in two parts, backwards that recompute, weights used more than once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import layerpipe
from layerpipe.stage.split_backward import SplitBackward
from tests.engine.models import chain, images, minibatches
from tests.engine.pipelines import EXECUTORS, assert_equal_state, sgd, trained

Data = list[tuple[Tensor, Tensor]]


class Shared(nn.Module):
    """One input for three projections, one weight for two of them and again further on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x) * torch.tanh(self.b(x)) + self.a(x) * self.scale)
        return self.a(torch.relu(y)) + x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, None].expand(-1, 3, -1) * torch.arange(1.0, 4.0)[:, None]).mean(1)


def mixed() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(6, 6), Shared(), Attention(), Shared(), nn.Linear(6, 3)]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
@pytest.mark.parametrize("past", ["stash", "blend"])
def test_a_split_backward_gives_the_same_weights(executor: str, schedule: str, past: str) -> None:
    torch.set_num_threads(1)
    data = minibatches(15)
    options: dict[str, Any] = {"executor": executor, "schedule": schedule, "past": past, "max_norm": 1.0}
    assert_equal_state(trained(mixed(), data, split_backward=True, **options), trained(mixed(), data, **options))


def test_a_split_backward_of_a_resnet_gives_the_same_weights() -> None:
    torch.set_num_threads(1)
    resnet18 = pytest.importorskip("torchvision").models.resnet18
    model, data = resnet18(num_classes=10), images(7, size=4)
    plain, split = (
        trained(layerpipe.split(copy.deepcopy(model), 3, balance="params"), data, split_backward=chosen)
        for chosen in (False, True)
    )
    assert_equal_state(split, plain)


def gradients(stage: nn.Module, x: Tensor) -> tuple[list[str], Callable[[], dict[str, bool]]]:
    """What waits for the second part, and which gradients are there."""
    for p in stage.parameters():
        p.grad = None
    x = x.requires_grad_()
    y = stage(x)
    rest = SplitBackward([y], [x])
    rest.activations([torch.ones_like(y)])
    assert x.grad is not None
    waiting = [name for name, p in stage.named_parameters() if p.grad is None]
    rest.weights()
    return waiting, lambda: {name: p.grad is not None for name, p in stage.named_parameters()}


def test_the_weights_of_linear_layers_wait_and_nothing_else_does() -> None:
    stage = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6, bias=False))
    waiting, complete = gradients(stage, torch.randn(4, 6))
    assert waiting == ["0.weight", "0.bias", "3.weight"]
    assert all(complete().values())


def test_convolutions_wait_and_a_weight_used_twice_does_not() -> None:
    waiting, complete = gradients(nn.Conv2d(2, 3, 3), torch.randn(2, 2, 5, 5))
    assert waiting == ["weight", "bias"]
    waiting, complete = gradients(Shared(), torch.randn(4, 6))
    assert waiting == ["b.weight", "b.bias"]
    assert all(complete().values())


class Returned(nn.Linear):
    """Hands its weight on, as an embedding that the head shares would be."""

    transposed = False

    def forward(self, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = x if weight is None else x @ weight
        seen = self.weight.t() if self.transposed else self.weight
        return torch.addmm(self.bias, x, seen), seen


class Taking(nn.Linear):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x @ weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b", "sequential"])
def test_a_weight_that_is_also_an_output_gets_both_gradients_of_a_split_backward(
    schedule: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Returned, "transposed", transposed)

    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        return [Returned(6, 6), Returned(6, 6), Returned(6, 6), Taking(6, 3)]

    data = minibatches(12)
    plain, split = (
        trained(stages(), data, schedule=schedule, past="stash", split_backward=chosen) for chosen in (False, True)
    )
    assert_equal_state(split, plain)


class Hooked(nn.Linear):
    """Changes the gradient of its output."""

    on_node = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad and self.on_node:
            assert y.grad_fn is not None
            y.grad_fn.register_prehook(lambda grads: (grads[0] * 3,))
        elif y.requires_grad:
            y.register_hook(lambda grad: grad * 3)
        return y


@pytest.mark.parametrize("on_node", [False, True])
def test_a_hook_changes_the_gradients_of_a_split_backward_once(on_node: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hooked, "on_node", on_node)

    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Linear(6, 6), nn.Sequential(Hooked(6, 6), nn.Tanh(), Hooked(6, 6)), nn.Linear(6, 3)]

    plain, split = (trained(stages(), minibatches(8), split_backward=chosen) for chosen in (False, True))
    assert_equal_state(split, plain)


def test_a_weights_own_gradient_reconstructs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for split in (False, True):
        made: list[Tensor] = []
        with layerpipe.Pipeline(chain(4), F.cross_entropy, sgd, split_backward=split) as pipe:
            view = pipe.stages[1]._saved.past_view
            assert view is not None
            pipe.stages[1]._saved.past_view = lambda p, view=view, made=made: made.append(p) or view(p)  # type: ignore[func-returns-value,misc]
            for x, y in minibatches(10):
                pipe.step(x, y)
            pipe.drain()
        counts.append(len(made))
    assert counts[0] == counts[1] > 0


def test_a_weight_used_by_several_layers_is_reconstructed_once_per_backward() -> None:
    made: list[Tensor] = []
    with layerpipe.Pipeline([nn.Linear(6, 6), Shared(), nn.Linear(6, 3)], F.cross_entropy, sgd) as pipe:
        saved = pipe.stages[1]._saved
        view = saved.past_view
        assert view is not None
        saved.past_view = lambda p: made.append(p) or view(p)  # type: ignore[func-returns-value]
        for x, y in minibatches(10):
            pipe.step(x, y)
        pipe.drain()
        stage = pipe.stages[1].module
        assert sum(p is stage.a.weight for p in made) == 10
        assert not any(use.past is not None for use in saved._uses.values())  # and let go of


class Checkpointed(nn.Module):
    """Keeps only its input, and runs its layers again in the backward."""

    def __init__(self, inner: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_with_past_weights(executor: str, reentrant: bool) -> None:
    """Bitwise where the past is exact; a reconstruction also changes the activations that are computed again."""
    torch.set_num_threads(1)
    data = minibatches(20)

    def stages(wrap: bool) -> list[nn.Module]:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(4)]
        inner = [Checkpointed(layer, reentrant=reentrant) if wrap and i in (1, 2) else layer
                 for i, layer in enumerate(layers)]  # fmt: skip
        return [*inner, nn.Linear(6, 3)]

    options: dict[str, Any] = {"executor": executor, "past": "stash"}
    plain, recomputed = trained(stages(False), data, **options), trained(stages(True), data, **options)
    assert_equal_state(plain, {name.replace(".inner", ""): value for name, value in recomputed.items()})


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_stage_that_recomputes_without_a_delay_is_not_split(reentrant: bool) -> None:
    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Linear(6, 6), Checkpointed(nn.Linear(6, 3), reentrant=reentrant)]

    data = minibatches(5)
    plain, split = (trained(stages(), data, split_backward=chosen) for chosen in (False, True))
    assert_equal_state(split, plain)


def test_checkpointing_that_begins_after_a_drain_recomputes_with_past_weights() -> None:
    class Switched(Checkpointed):
        on = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.on else self.inner(x)  # type: ignore[no-any-return]

    def run(on: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        switched = Switched(inner, reentrant=False)
        with layerpipe.Pipeline(
            [nn.Linear(6, 6), switched, nn.Linear(6, 6), nn.Linear(6, 3)], F.cross_entropy, sgd, past="stash"
        ) as pipe:
            for _ in range(2):
                for x, y in minibatches(12):
                    pipe.step(x, y)
                pipe.drain()
                switched.on = on
            return copy.deepcopy(pipe.state_dict())

    assert_equal_state(run(True), run(False))


def test_a_stage_that_recomputes_is_noticed_and_others_are_not() -> None:
    stages = [nn.Linear(6, 6), Checkpointed(nn.Linear(6, 6), reentrant=False), nn.Linear(6, 6), nn.Linear(6, 3)]
    with layerpipe.Pipeline(stages, F.cross_entropy, sgd) as pipe:
        for x, y in minibatches(8):
            pipe.step(x, y)
        assert [stage.recomputes for stage in pipe.stages] == [False, True, False, False]
        assert pipe.memory()[1].scratch == 2 * sum(p.nbytes for p in stages[1].parameters())
