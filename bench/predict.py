"""How well the simulator predicts the threaded engine's throughput; it should be within 15 %.

    python -m bench.predict

A round has two halves. *Calibration*: as many copies of the pipeline as it has stages run at the same time, each whole
in a thread of its own (``executor="serial"``), so that the cores are as busy as in the pipeline, but no stage waits for
another; their traces give each stage's forward and backward. *Measurement*: the pipeline with a worker per stage. The
simulator turns the first into a prediction of the second; the table shows measured over predicted rates, 1.0 being
right. ``alone`` is the same with one copy running: what a prediction that knows of no contention would be.

All three take turns, in another order each round, with pipelines made anew: what a machine's speed or a pipeline's
place in memory does to one, it does to all. Every round counts. Of a round's minibatches the first fill the pipe and
warm up; a stage's time is the median of those that follow.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels
from bench.others import Others
from bench.report import console, save, spread, summary
from layerpipe import models
from layerpipe.partition.profile import profile
from layerpipe.theory.planning.plan import plan
from layerpipe.theory.simulate import BUILDERS, StageCost, report, run

WARM_UP = 6  # minibatches through a stage before its times count
CALIBRATED = 20  # that count; a pipeline keeps the trace of somewhat more
TOLERANCE = 0.15

Data = tuple[Tensor, Tensor]


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
    """Medians of what a pipeline's trace recorded of the minibatches that count."""
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for event in pipe.trace:
        if WARM_UP <= event.action.minibatch < WARM_UP + CALIBRATED:
            times[event.action.stage, event.action.kind].append(event.end - event.start)
    middle = {key: statistics.median(values) for key, values in times.items()}
    return [StageCost(middle[s, "F"], middle[s, "B"]) for s in range(len(pipe.names))]


def calibrate(options: argparse.Namespace, at: list[str], copies: int, data: Data) -> list[StageCost]:
    """Each stage's times while ``copies`` whole pipelines run side by side, the mean over copies."""
    pipes = [pipeline(options, at, "serial") for _ in range(copies)]
    together = threading.Barrier(copies)
    done: list[None] = []

    def train(pipe: layerpipe.Pipeline) -> None:
        torch.set_num_threads(1)
        together.wait()
        for _ in range(2 * options.stages + WARM_UP + CALIBRATED):
            pipe.step(*data)
        done.append(None)
        while len(done) < copies:  # the slowest copy, too, is never alone
            pipe.step(*data)

    workers = [threading.Thread(target=train, args=(pipe,), daemon=True) for pipe in pipes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if len(done) < copies:
        raise RuntimeError("a copy of the pipeline failed; see above")
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


def measure(options: argparse.Namespace, at: list[str], steps: int, data: Data) -> float:
    """Seconds per minibatch in steady state."""
    with pipeline(options, at, "threads") as pipe:
        for _ in range(2 * len(pipe.names) + WARM_UP):
            pipe.step(*data)
        start = time.perf_counter()
        for _ in range(steps):
            pipe.step(*data)
        return (time.perf_counter() - start) / steps


def compare(options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Seconds per minibatch, measured and predicted, of every round."""
    data = torch.randn(batch, 1, options.size, options.size), torch.randint(10, (batch,))
    network = models.make("resnet18", width=options.width, channels=1, size=options.size, classes=10)
    layers = profile(network, data[:1], measure=True)
    at = plan(layers, stages=options.stages, balance="time", simulate=()).at
    turns: dict[str, Callable[[], float]] = {
        "alone": lambda: predict(calibrate(options, at, 1, data), options.schedule),
        "side by side": lambda: predict(calibrate(options, at, options.stages, data), options.schedule),
        "measured": lambda: measure(options, at, options.steps, data),
    }
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in track(range(options.rounds), description=f"batch {batch}", transient=True):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(turns[name]())
    result: dict[str, Any] = {"batch": batch, "at": at, "seconds": seconds}
    for name in ("side by side", "alone"):
        ratios = [p / m for p, m in zip(seconds[name], seconds["measured"], strict=True)]
        result[f"measured / predicted, {name}"] = summary(ratios)
    return result


def table(results: list[dict[str, Any]]) -> Table:
    found = Table(title="Samples per second: median (quartiles)", title_justify="left")
    for column in ("batch", "measured", "predicted", "measured /\npredicted", "... from\nalone", "within\n15 %"):
        found.add_column(column, justify="right")
    for result in results:
        seconds, batch = result["seconds"], result["batch"]
        cells = [spread([batch / s for s in seconds[name]], ".0f") for name in ("measured", "side by side")]
        ratios = [result[f"measured / predicted, {name}"] for name in ("side by side", "alone")]
        cells += [spread(ratio["values"], ".2f") for ratio in ratios]
        found.add_row(str(batch), *cells, "yes" if within(result) else "no")
    return found


def within(result: dict[str, Any]) -> bool:
    """Whether the median of measured over predicted is as near to 1 as it should be."""
    return bool(abs(result["measured / predicted, side by side"]["median"] - 1) <= TOLERANCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16, help="channels of ResNet-18's first layer")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--size", type=int, default=28, help="image size")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--schedule", choices=tuple(layerpipe.schedule.SCHEDULES), default="lockstep")
    parser.add_argument("--past", default="blend", help="kind of past weights")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30, help="minibatches timed in a round")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    torch.set_num_threads(1)
    with Others() as others:
        results = [compare(options, batch) for batch in options.batch]
    console().print(table(results))
    print(f"Within 15 %: {'yes' if all(map(within, results)) else 'no'}. {others}")
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    save(options.json, options=settings, results=results, within_15_percent=all(map(within, results)),
         others_share=others.share)  # fmt: skip


if __name__ == "__main__":
    main()
