"""What the benches train: ResNet-18 on small images, and a small GPT."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
from layerpipe import models
from layerpipe.models.gpt import GPT

VOCABULARY = 256

#: And the size that each has unless one is given.
NETWORKS = {"resnet18": 28, "mlp": 28, "gpt": 128}


def compile_module(module: nn.Module) -> Any:
    """All of it in C++: the kernels that torch.compile calls from Python hold Python's lock while they run, and two
    threads would take turns."""
    return torch.compile(module, options={"cpp_wrapper": True})


@dataclasses.dataclass(frozen=True)
class Case:
    """One network and batch; ``width`` and ``size`` are a GPT's model dimension and sequence length."""

    network: str
    width: int
    batch: int
    size: int
    channels_last: bool = False
    layers: int = 4

    @classmethod
    def parse(cls, text: str) -> Case:
        """``NETWORK:WIDTH:BATCH`` or ``NETWORK:WIDTH:BATCH:SIZE``, as a ``type`` for argparse."""
        network, *numbers = text.split(":")
        if network not in NETWORKS:
            raise argparse.ArgumentTypeError(f"{text}: {network!r} is none of {', '.join(NETWORKS)}")
        try:
            width, batch, size = map(int, numbers if len(numbers) == 3 else [*numbers, NETWORKS[network]])
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is not NETWORK:WIDTH:BATCH or NETWORK:WIDTH:BATCH:SIZE") from None
        return cls(network, width, batch, size)

    def __str__(self) -> str:
        return f"{self.network} {self.width}, batch {self.batch}{', channels last' if self.channels_last else ''}"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def model(self) -> nn.Module:
        """The same weights every time."""
        torch.manual_seed(0)
        if self.network == "gpt":
            return GPT(layers=self.layers, width=self.width, heads=4, context=self.size, vocabulary=VOCABULARY)
        if self.channels_last:
            models.check_channels_last(self.width, torch.device("cpu"))
        model = models.make(self.network, width=self.width, channels=1, size=self.size, classes=10)
        return model.to(memory_format=self.memory_format)

    def minibatch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        if self.network == "gpt":
            tokens = torch.randint(VOCABULARY, (self.batch, self.size + 1), generator=generator)
            return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        x = torch.randn(self.batch, 1, self.size, self.size, generator=generator)
        return x.contiguous(memory_format=self.memory_format), torch.randint(10, (self.batch,), generator=generator)

    def stages(
        self, count: int, balance: str = "time", *, at: list[str] | None = None, compiled: bool = False
    ) -> list[nn.Module]:
        model, (x, _) = self.model(), self.minibatch()
        wrap = compile_module if compiled else None
        return layerpipe.split(model, count, (x,), balance=balance, at=at, wrap=wrap)


def faster_format(case: Case, step: Callable[[Case], Callable[[int], float]], rounds: int = 5) -> Case:
    """The case with the memory format in which ``step(case)(n)``, its seconds per step over ``n`` steps, is shorter."""
    both = [dataclasses.replace(case, channels_last=last) for last in (False, True)]
    runs = [step(each) for each in both]
    steps = [max(1, round(0.3 / run(2))) for run in runs]  # the first ones warm it up
    seconds = [[run(count) for run, count in zip(runs, steps, strict=True)] for _ in range(rounds)]
    return min(zip(map(statistics.median, zip(*seconds, strict=True)), both, strict=True), key=lambda pair: pair[0])[1]


def add_cases(parser: argparse.ArgumentParser, *default: str) -> None:
    """The option ``--case`` of a bench: a list of cases."""
    parser.add_argument(
        "--case",
        nargs="+",
        type=Case.parse,
        default=[Case.parse(text) for text in default],
        metavar="NETWORK:WIDTH:BATCH[:SIZE]",
        help=f"{', '.join(NETWORKS)}; SIZE of images, or length of the GPT's sequences; default: {' '.join(default)}",
    )


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())
