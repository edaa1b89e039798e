"""What ``bench.staleness`` trains: the GPT and the ResNet-18 of docs/delay.md, cut by blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerpipe import data, models
from layerpipe.models.gpt import GPT
from layerpipe.study.training import Minibatch, Task


def _loss(model: nn.Module, minibatch: Minibatch) -> Tensor:
    x, y = minibatch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def gpt_task(seed: int, *, blocks: int = 8, width: int = 128, batch: int = 16, context: int = 64) -> Task:
    """A GPT on the bytes of Python's library; embeddings belong to the first block, the head to the last."""
    torch.manual_seed(seed)
    model = GPT(layers=blocks, width=width, heads=4, context=context, vocabulary=256)
    text, unseen = data.python_sources()

    def draw(source: Tensor, generator: torch.Generator) -> Minibatch:
        starts = torch.randint(len(source) - context, (batch,), generator=generator)
        windows = torch.stack([source[start : start + context + 1] for start in starts.tolist()])
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def endless() -> Iterator[Minibatch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield draw(text, generator)

    generator = torch.Generator().manual_seed(999)
    tests = [draw(unseen, generator) for _ in range(-(-32768 // (batch * context)))]

    def stage_of(name: str) -> int:
        if name.startswith("blocks"):
            return int(name.split(".")[1])
        return 0 if name.startswith(("tokens", "positions")) else blocks - 1

    @torch.no_grad()
    def quality(model: nn.Module) -> float:
        return sum(_loss(model, test).item() for test in tests) / len(tests)

    matrices = lambda name: name.startswith("blocks") and model.get_parameter(name).dim() == 2
    return Task(model, stage_of, blocks, matrices, endless(), _loss, quality)


def resnet_task(seed: int, *, width: int = 8, batch: int = 64) -> Task:
    """A ResNet-18 on Fashion-MNIST; the pieces are the stem, eight blocks and the head."""
    images = data.load("fashion-mnist", data.DEBIAN_FASHION_MNIST)
    torch.manual_seed(seed)
    model = models.make("resnet18", width=width, channels=1, size=28, classes=10)
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]

    def stage_of(name: str) -> int:
        block = name[: len("layer1.0")]
        return 1 + blocks.index(block) if block in blocks else 9 if name.startswith("fc") else 0

    @torch.no_grad()
    def quality(model: nn.Module) -> float:
        model.eval()
        pairs = zip(images.test_x.split(500), images.test_y.split(500), strict=True)
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in pairs)
        model.train()
        return 100 * right / len(images.test_y)

    matrices = lambda name: model.get_parameter(name).dim() > 1 and not name.startswith("fc")
    return Task(model, stage_of, 10, matrices, images.batches(batch, seed), _loss, quality)


TASKS: dict[str, Callable[..., Task]] = {"gpt": gpt_task, "resnet18": resnet_task}
