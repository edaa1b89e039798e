"""Throughput of the threaded pipeline beside plain training of the same network on the same cores.

    python -m bench.pipeline

Every round times a few steps of each variant, one variant after the other, so that a change of the machine's speed
meets all of them; ratios are formed within a round, and the table shows their median and quartiles.

*Efficiency* is the pipeline's rate over ``stages`` times the rate of plain training on one thread: 1.0 would be stages
that never wait and cost nothing. *Ratio* is its rate over the best plain one; its *limit* is what an efficiency of 1.0
would give.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels
from bench import environment
from layerpipe import models


@dataclasses.dataclass(frozen=True)
class Case:
    width: int
    batch: int
    size: int
    stages: int
    balance: str
    past: str


def model(case: Case) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.make("resnet18", width=case.width, channels=1, size=case.size, classes=10)


@contextmanager
def intraop(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plain(case: Case, threads: int, x: Tensor, y: Tensor) -> Callable[[int], float]:
    """Seconds per step of an ordinary loop with torch's fused SGD."""
    network = model(case)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)

    def run(steps: int) -> float:
        with intraop(threads):
            start = time.perf_counter()
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(network(x), y).backward()
                optimizer.step()
            return (time.perf_counter() - start) / steps

    return run


def pipelined(case: Case, x: Tensor, y: Tensor) -> tuple[layerpipe.Pipeline, Callable[[int], float]]:
    """Seconds per step of the pipeline in steady state, one intra-op thread in each worker."""
    stages = layerpipe.split(model(case), case.stages, (x,), balance=case.balance)
    pipe = layerpipe.Pipeline(
        stages,
        F.cross_entropy,
        lambda params, **past: layerpipe_kernels.SGD(params, lr=0.01, momentum=0.9, **past),
        past=case.past,
        executor="threads",
        threads_per_stage=1,
    )

    def run(steps: int) -> float:
        for _ in range(2 * case.stages + 1):  # fill, and let the workers wake up
            pipe.step(x, y)
        start = time.perf_counter()
        for _ in range(steps):
            pipe.step(x, y)
        return (time.perf_counter() - start) / steps

    return pipe, run


def measure(case: Case, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds per step of each variant and round, and what follows from them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, 1, case.size, case.size, generator=generator)
    y = torch.randint(10, (case.batch,), generator=generator)
    pipe, run = pipelined(case, x, y)
    variants = {"plain, 1 thread": plain(case, 1, x, y), "plain, 2 threads": plain(case, 2, x, y), "pipeline": run}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with pipe:
        for variant in variants.values():
            variant(3)
        for _ in track(range(rounds), description=f"batch {case.batch}", transient=True):
            for name, variant in variants.items():
                seconds[name].append(variant(steps))
            pipe.drain()
        names = pipe.names
    one, two, ours = (seconds[name] for name in variants)
    best = [min(a, b) for a, b in zip(one, two, strict=True)]
    return {
        "case": dataclasses.asdict(case),
        "stages": names,
        "rounds": rounds,
        "steps_per_round": steps,
        "seconds": seconds,
        "efficiency": [a / (case.stages * p) for a, p in zip(one, ours, strict=True)],
        "ratio": [b / p for b, p in zip(best, ours, strict=True)],
        "limit": [case.stages * b / a for a, b in zip(one, best, strict=True)],
    }


def spread(values: list[float], form: str) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}}–{high:{form}})"


def table(results: list[dict[str, Any]]) -> Table:
    out = Table(title="Samples per second and ratios: median (quartiles) over rounds", title_justify="left")
    for column in ("width, batch", "plain, 1 thread", "plain, 2 threads", "pipeline", "efficiency", "ratio", "limit"):
        out.add_column(column, justify="right" if column != "width, batch" else "left")
    for result in results:
        case = result["case"]
        rates = [spread([case["batch"] / s for s in result["seconds"][name]], ".0f") for name in result["seconds"]]
        ratios = [spread(result[name], ".2f") for name in ("efficiency", "ratio", "limit")]
        out.add_row(f"{case['width']}, {case['batch']}", *rates, *ratios)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16, help="channels of ResNet-18's first layer")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 8], help="batch sizes")
    parser.add_argument("--size", type=int, default=28, help="image size")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--balance", choices=("flops", "time", "params"), default="time")
    parser.add_argument("--past", default="blend", help="kind of past weights")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long each variant runs in a round")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    results = []
    for batch in options.batch:
        case = Case(options.width, batch, options.size, options.stages, options.balance, options.past)
        x, y = torch.randn(batch, 1, options.size, options.size), torch.zeros(batch, dtype=torch.long)
        steps = max(5, round(options.seconds / plain(case, 1, x, y)(3)))
        results.append(measure(case, options.rounds, steps))
    Console().print(table(results))
    for result in results:
        print(f"batch {result['case']['batch']}: stages {' | '.join(result['stages'])}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"environment": environment.describe(), "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
