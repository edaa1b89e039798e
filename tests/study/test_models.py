"""The networks of the study: what they compute, and that a pipeline can train them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import layerpipe
import layerpipe_kernels as lk
from layerpipe import models
from layerpipe.models.spiking import LeakyIntegrateAndFire


def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, target)


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [("vgg11", 8, 1), ("vgg11", 28, 1), ("vgg11", 32, 3), ("spiking", 28, 1), ("vit", 8, 1), ("vit", 32, 3)],
)
def test_a_network_cut_into_stages_is_itself(name: str, size: int, channels: int) -> None:
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = models.make(name, width=8, channels=channels, size=size, classes=10)
    x = torch.randn(3, channels, size, size)
    expected = model(x)
    assert expected.shape == (3, 10)
    y = x
    for stage in layerpipe.split(model, 8, (x,)):
        y = stage(*y) if isinstance(y, tuple) else stage(y)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("name", ["vgg11", "vit", "spiking"])
def test_an_asynchronous_pipeline_learns_a_minibatch_by_heart(name: str) -> None:
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = models.make(name, width=32 if name == "vit" else 8, channels=1, size=8, classes=4)
    y = torch.arange(8) % 4
    x = torch.randn(4, 1, 8, 8)[y]
    adamw = lambda params, **past: lk.AdamW(params, lr=3e-3, **past)
    with layerpipe.Pipeline(
        layerpipe.split(model, 3, (x,)), loss_fn, adamw, schedule="1f1b", executor="serial", max_norm=1.0
    ) as pipe:
        losses = [loss.item() for _ in range(40) if (loss := pipe.step(x, y)) is not None]
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_neurons_fire_when_their_potential_passes_one_and_lose_it() -> None:
    neurons = LeakyIntegrateAndFire(4, decay=0.5)
    x = torch.full((4, 1, 1), 0.8, requires_grad=True)
    spikes = neurons(x)
    # potentials: 0.8; 0.4 + 0.8 = 1.2 fires, 0.2 is left; 0.1 + 0.8 = 0.9; 0.45 + 0.8 = 1.25 fires
    assert spikes.flatten().tolist() == [0, 1, 0, 1]
    spikes[3].sum().backward()
    assert x.grad is not None
    surrogate = 1 / (1 + 5 * 0.25) ** 2
    torch.testing.assert_close(x.grad.flatten(), surrogate * torch.tensor([0.125, 0.25, 0.5, 1.0]))


def test_a_vit_that_cannot_be_cut_into_patches_is_refused() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="multiples of 4 as size"):
        models.make("vit", width=8, channels=1, size=30, classes=10)
