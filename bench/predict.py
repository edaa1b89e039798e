"""How well the simulator predicts the threaded engine's throughput.

    python -m bench.predict

A round has two halves. *Calibration*: as many copies of the pipeline as it has stages run at the same time, each whole
in a thread of its own (``executor="serial"``), so that the cores are as busy as in the pipeline, but no stage waits for
another; their traces give each stage's forward and backward. *Measurement*: the pipeline with a worker per stage. The
simulator turns the first into a prediction of the second; the table shows measured over predicted rates, 1.0 being
right. ``alone`` is the same with one copy running: what a prediction that knows of no contention would be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections import defaultdict
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
from layerpipe.layers import profile
from layerpipe.plan import plan
from layerpipe.simulate import BUILDERS, StageCost, report, run

WARM_UP = 6  # minibatches through a stage before its times count


def pipeline(options: argparse.Namespace, at: list[str], executor: str) -> layerpipe.Pipeline:
    torch.manual_seed(0)
    network = models.make("resnet18", width=options.width, channels=1, size=options.size, classes=10)
    return layerpipe.Pipeline(
        layerpipe.split(network, options.stages, at=at),
        F.cross_entropy,
        lambda params, **past: layerpipe_kernels.SGD(params, lr=0.01, momentum=0.9, **past),
        past=options.past,
        schedule=options.schedule,
        executor=executor,
        threads_per_stage=1,
    )


def stage_costs(pipe: layerpipe.Pipeline) -> list[StageCost]:
    """Medians of what a pipeline's trace recorded."""
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for event in pipe.trace:
        if event.action.minibatch >= WARM_UP:
            times[event.action.stage, event.action.kind].append(event.end - event.start)
    middle = {key: statistics.median(values) for key, values in times.items()}
    return [StageCost(middle[s, "F"], middle[s, "B"]) for s in range(len(pipe.names))]


def calibrate(options: argparse.Namespace, at: list[str], copies: int, data: tuple[Tensor, Tensor]) -> list[StageCost]:
    """Each stage's times while ``copies`` whole pipelines run side by side."""
    pipes = [pipeline(options, at, "serial") for _ in range(copies)]
    together = threading.Barrier(copies)

    def train(pipe: layerpipe.Pipeline) -> None:
        torch.set_num_threads(1)
        together.wait()
        for _ in range(2 * options.stages + WARM_UP + 20):
            pipe.step(*data)

    workers = [threading.Thread(target=train, args=(pipe,)) for pipe in pipes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    costs = [stage_costs(pipe) for pipe in pipes]
    for pipe in pipes:
        pipe.close()
    return [
        StageCost(statistics.fmean(c.forward for c in stage), statistics.fmean(c.backward for c in stage))
        for stage in zip(*costs, strict=True)
    ]


def predict(costs: list[StageCost], schedule: str) -> float:
    """Seconds per minibatch; tensors change hands within one memory, so links are free."""
    return report(run(BUILDERS[schedule](costs, 16 + 4 * len(costs), 1))).period


def measure(pipe: layerpipe.Pipeline, steps: int, data: tuple[Tensor, Tensor]) -> float:
    """Seconds per minibatch in steady state."""
    for _ in range(2 * len(pipe.names) + WARM_UP):
        pipe.step(*data)
    start = time.perf_counter()
    for _ in range(steps):
        pipe.step(*data)
    seconds = (time.perf_counter() - start) / steps
    pipe.drain()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16, help="channels of ResNet-18's first layer")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 8])
    parser.add_argument("--size", type=int, default=28, help="image size")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--schedule", choices=tuple(BUILDERS), default="lockstep")
    parser.add_argument("--past", default="blend", help="kind of past weights")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=30, help="minibatches timed in a round")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for batch in options.batch:
        data = torch.randn(batch, 1, options.size, options.size), torch.randint(10, (batch,))
        network = models.make("resnet18", width=options.width, channels=1, size=options.size, classes=10)
        layers = profile(network, data[:1], measure=True)
        at = plan(layers, stages=options.stages, balance="time", simulate=()).at
        seconds: dict[str, list[float]] = {"alone": [], "side by side": [], "measured": []}
        with pipeline(options, at, "threads") as pipe:
            for _ in track(range(options.rounds), description=f"batch {batch}", transient=True):
                seconds["alone"].append(predict(calibrate(options, at, 1, data), options.schedule))
                seconds["side by side"].append(predict(calibrate(options, at, options.stages, data), options.schedule))
                seconds["measured"].append(measure(pipe, options.steps, data))
        results.append({"batch": batch, "at": at, "seconds": seconds})

    table = Table(title="Samples per second, and measured over predicted: median (quartiles)", title_justify="left")
    for column in ("batch", "measured", "predicted", "measured / predicted", "... from alone"):
        table.add_column(column, justify="right")
    for result in results:
        seconds, batch = result["seconds"], result["batch"]
        cells = [_spread([batch / s for s in seconds[name]], ".0f") for name in ("measured", "side by side")]
        for name in ("side by side", "alone"):
            ratios = [p / m for p, m in zip(seconds[name], seconds["measured"], strict=True)]
            result[f"measured / predicted, {name}"] = statistics.median(ratios)
            cells.append(_spread(ratios, ".2f"))
        table.add_row(str(batch), *cells)
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"environment": environment.describe(), "results": results}, indent=1) + "\n"
        )


def _spread(values: list[float], form: str) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}}–{high:{form}})"


if __name__ == "__main__":
    main()
