"""Tasks of a study: the networks and data sets of ``layerpipe train``, cut by ``layerpipe.split``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerpipe import data as datasets
from layerpipe import models
from layerpipe.data import Images
from layerpipe.partition import split
from layerpipe.study.training import Minibatch, Task

#: Of the training examples, those that learning rates are chosen with: a tenth, but not more than this.
MOST_VALIDATED = 1000


class Measure(NamedTuple):
    """A measure of a network's quality."""

    unit: str
    better: Callable[[float, float], bool]  # whether the first is better


LOSS = Measure("nats per byte", lambda a, b: a < b)
ACCURACY = Measure("%", lambda a, b: a > b)


def measure_of(model: str) -> Measure:
    """Test loss of a language model, test accuracy of a classifier."""
    return LOSS if model == "gpt" else ACCURACY


def loss(model: nn.Module, minibatch: Minibatch) -> Tensor:
    x, y = minibatch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@functools.cache
def examples(data: str, root: Path) -> tuple[Images, Tensor, Tensor]:
    """A data set without its validation examples, and these."""
    images = datasets.load(data, root)
    order = torch.randperm(len(images.train_x), generator=torch.Generator().manual_seed(0))
    held = min(MOST_VALIDATED, len(order) // 10)
    kept, validated = order[held:], order[:held]
    rest = images._replace(train_x=images.train_x[kept], train_y=images.train_y[kept])
    return rest, images.train_x[validated], images.train_y[validated]


@functools.cache
def cut(model: str, data: str, width: int, stages: int, root: Path) -> dict[str, int]:
    """The stage of every parameter by its name, where the network is cut by FLOPs.

    Raises:
        ValueError, DataError: as :func:`task`.
    """
    images, _, _ = examples(data, root)
    network = models.make_for(images.train_x[0], model, width=width, classes=images.classes)
    if stages == 1:
        return dict.fromkeys(dict(network.named_parameters()), 0)
    parts = split(network, stages, (images.train_x[:2],))
    stage_of = {id(param): s for s, part in enumerate(parts) for param in part.parameters()}
    return {name: stage_of[id(param)] for name, param in network.named_parameters()}


def task(model: str, data: str, width: int, batch_size: int, stages: int, seed: int, root: Path) -> Task:
    """A network with weights and minibatches that depend on the seed alone, cut into stages by FLOPs.

    Raises:
        ValueError: an unknown model, or one that cannot be cut into so many stages.
        DataError: data that is not here.
    """
    images, validation_x, validation_y = examples(data, root)
    stage_of = cut(model, data, width, stages, root)
    torch.manual_seed(seed)
    network = models.make_for(images.train_x[0], model, width=width, classes=images.classes)
    matrices = _matrices(network)

    @torch.no_grad()
    def quality(network: nn.Module, x: Tensor, y: Tensor) -> float:
        network.eval()
        outputs = [network(part).flatten(0, -2) for part in x.split(500)]
        network.train()
        if measure_of(model) is LOSS:
            return F.cross_entropy(torch.cat(outputs), y.flatten()).item()
        return 100 * (torch.cat(outputs).argmax(-1) == y.flatten()).float().mean().item()

    return Task(
        network,
        stage_of.__getitem__,
        stages,
        matrices.__contains__,
        images.batches(batch_size, seed),
        loss,
        lambda network: quality(network, images.test_x, images.test_y),
        lambda network: quality(network, validation_x, validation_y),
    )


def _matrices(model: nn.Module) -> set[str]:
    """Weights of linear, convolution and attention layers but for the last linear one, which is the output."""
    found = [
        f"{name}.{weight}"
        for name, module in model.named_modules()
        for weight in ("weight", "in_proj_weight")
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.MultiheadAttention)
        and isinstance(getattr(module, weight, None), nn.Parameter)
    ]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return set(found) - {f"{name}.weight" for name in linear[-1:]}
