"""Weights that reach a backward by another way than through the stage's saved tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import layerpipe
import layerpipe_kernels as lk
from tests.cases.alike import SGD, trained_alike
from tests.engine.models import minibatches
from tests.engine.random_layers import LAYERS

#: Ways around the hooks, each trained as in a simulation in which every minibatch has weights of its own.
WAYS = [
    *("kept", "kept view", "kept in a closure", "saved view", "offloaded", "hooks that do nothing", "hooks that cast"),
    *("hooks disabled", "checkpoint", "checkpoint for some", "reentrant", "reentrant for some", "checkpoint of a norm"),
    *("func grad", "func vmap", "func jvp", "functional call", "functional call of another", "penalty", "first order"),
    *("gradient hook", "module hook", "clipped", "clipped in place", "sparse"),
    *("weight norm", "spectral norm", "hooks around a buffer"),
]


@pytest.mark.invariant(8)
@pytest.mark.filterwarnings("ignore:.*works on copies of:UserWarning")
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
@pytest.mark.parametrize("way", WAYS)
def test_a_backward_has_the_weights_of_its_forward(way: str, schedule: str) -> None:
    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Linear(6, 6), LAYERS[way](), nn.Linear(6, 3)]

    executor = "threads" if schedule == "1f1b" else "serial"
    trained_alike(stages, minibatches(9), executor, schedule=schedule)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_only_for_large_minibatches(reentrant: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            if len(x) < 10:
                return self.layers(x)  # type: ignore[no-any-return]
            return checkpoint(self.layers, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Linear(6, 6), Block(), nn.Linear(6, 3)]

    sizes = [8, 8, 12, 8, 12, 12, 8, 12, 12]
    trained_alike(stages, [minibatches(1, size, seed=i)[0] for i, size in enumerate(sizes)])


def test_a_hook_that_changes_weights_in_a_backward_is_refused_by_name() -> None:
    """The pipeline's optimizer makes the updates, and a backward has past values in the weights' place."""
    stages = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)]
    own = torch.optim.SGD([stages[1].weight], lr=0.1)
    stages[1].weight.register_post_accumulate_grad_hook(lambda _: own.step())
    with (
        layerpipe.Pipeline(stages, F.cross_entropy, lambda params, **past: lk.SGD(params, **SGD, **past)) as pipe,
        pytest.raises(layerpipe.StageError, match=r"stage 1 .*changes the weight weight in a backward.*optimizer only"),
    ):
        for x, y in minibatches(9):
            pipe.step(x, y)
