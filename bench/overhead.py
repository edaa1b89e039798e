"""What a stage costs when its layers cost next to nothing, and what past weights cost on a real network.

    python -m bench.overhead

*Per stage and tick*: a chain of tiny linear layers, one per stage, run by one thread. Everything is counted: forward,
reconstruct, backward, step, channels, all Python. Beside it a plain loop over the same layers with torch's fused SGD,
and *one layer alone*: its forward and a backward of its own, which is what torch itself takes of a stage's tick. What a
tick takes beyond that is the engine's work.

*Past weights*: ticks of a ResNet-18 with ``blend`` and with ``latest``, in turn, so that a change of the machine's
speed meets both; the ratio is formed within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels
from bench.report import save
from layerpipe import models

WIDTH, BATCH = 8, 4
Step = Callable[[Tensor, Tensor], Any]


def seconds(step: Step, x: Tensor, y: Tensor, steps: int) -> float:
    """Per step."""
    start = time.perf_counter()
    for _ in range(steps):
        step(x, y)
    return (time.perf_counter() - start) / steps


def layers(stages: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(WIDTH, WIDTH) for _ in range(stages)]


def sgd(params: list[Tensor], **past: Any) -> layerpipe_kernels.SGD:
    return layerpipe_kernels.SGD(params, lr=1e-3, momentum=0.9, **past)


def plain_step(network: nn.Module) -> Step:
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.mse_loss(network(x), y).backward()
        optimizer.step()

    return step


def layer_step(layer: nn.Module) -> Step:
    """A stage's tick without the engine: forward, and the gradients of weights and input."""
    gradient = torch.randn(BATCH, WIDTH)

    def step(x: Tensor, y: Tensor) -> None:
        x = x.detach().requires_grad_()
        layer.zero_grad()
        layer(x).backward(gradient)

    return step


def per_stage(stages: int, rounds: int, ticks: int) -> dict[str, list[float]]:
    """Seconds per stage and tick of every variant, one number per round."""
    torch.set_num_threads(1)
    x, y = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    alone = [layer_step(layer) for layer in layers(stages)]
    variants: dict[str, Step] = {
        "plain torch": plain_step(nn.Sequential(*layers(stages))),
        ALONE: lambda x, y: [step(x, y) for step in alone],
    }
    pipes = [
        layerpipe.Pipeline(layers(stages), F.mse_loss, sgd, past=past, schedule=schedule, check_finite=checked)
        for past, schedule, checked in VARIANTS.values()
    ]
    variants |= {name: pipe.step for name, pipe in zip(VARIANTS, pipes, strict=True)}
    found: dict[str, list[float]] = {name: [] for name in variants}
    for step in variants.values():
        seconds(step, x, y, 4 * stages)  # fill, and build the plans
    for _ in range(rounds):
        for name, step in variants.items():
            found[name].append(seconds(step, x, y, ticks) / stages)
    return found


ALONE, BLEND = "one layer alone", "lockstep, blend"
VARIANTS = {
    BLEND: ("blend", "lockstep", True),
    "lockstep, latest": ("latest", "lockstep", True),
    "1f1b, blend": ("blend", "1f1b", True),
    "lockstep, blend, unchecked": ("blend", "lockstep", False),
}


def past_weights(width: int, batch: int, rounds: int, ticks: int) -> list[float]:
    """Time of a tick with ``blend`` over that with ``latest``, one number per round."""
    torch.set_num_threads(1)
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))
    pipes = []
    for past in ("blend", "latest"):
        torch.manual_seed(0)
        network = models.make("resnet18", width=width, channels=1, size=28, classes=10)
        stages = layerpipe.split(network, 2, (x,), balance="flops")
        pipes.append(layerpipe.Pipeline(stages, F.cross_entropy, sgd, past=past))
        seconds(pipes[-1].step, x, y, 6)
    ratios = []
    for _ in range(rounds):
        blend, latest = (seconds(pipe.step, x, y, ticks) for pipe in pipes)
        ratios.append(blend / latest)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--ticks", type=int, default=100, help="per round and variant")
    parser.add_argument("--width", type=int, default=16, help="channels of ResNet-18's first layer")
    parser.add_argument("--batch", type=int, default=64, help="images per minibatch of ResNet-18")
    parser.add_argument("--no-resnet", action="store_true", help="only the tiny layers")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    result: dict[str, Any] = {}
    result["seconds per stage and tick"] = per_stage(options.stages, options.rounds, options.ticks)
    print(f"microseconds per stage and tick, {options.stages} stages: least, median (quartiles)")
    for name, values in result["seconds per stage and tick"].items():
        low, middle, high = (1e6 * q for q in statistics.quantiles(values, n=4))
        print(f"  {name:<28} {1e6 * min(values):6.1f}  {middle:6.1f} ({low:.1f}–{high:.1f})")
    own = [a - b for a, b in zip(*map(result["seconds per stage and tick"].get, (BLEND, ALONE)), strict=True)]
    low, middle, high = (1e6 * q for q in statistics.quantiles(own, n=4))
    print(f"  the engine's own, lockstep and blend: {middle:.1f} ({low:.1f}–{high:.1f})")
    if not options.no_resnet:
        ratios = past_weights(options.width, options.batch, options.rounds, 3)
        result["tick of blend over latest"] = ratios
        low, middle, high = (100 * (q - 1) for q in statistics.quantiles(ratios, n=4))
        print(
            f"past weights on ResNet-18, width {options.width}, batch {options.batch}: "
            f"{middle:+.1f} % of a tick ({low:+.1f} to {high:+.1f})"
        )
    save(options.json, **result)


if __name__ == "__main__":
    main()
