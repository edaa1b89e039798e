"""Seconds to equal loss: how many minibatches each way of training takes, times how long each of them takes.

    python -m bench.staleness stages=2 schedule=sequential,1f1b ... --json staleness.json    # minibatches, any machine
    python -m bench.time_to_loss --minibatches staleness.json --json time-to-loss.json       # seconds, a quiet machine

*Plain* is the better of an ordinary loop on one thread and on all; *synchronous* the best of GPipe and 1F1B of
:mod:`torch.distributed.pipelining` over gloo with 2, 4 and 8 microbatches, a process and a thread per stage;
*asynchronous* is ours with a thread per stage. All train with the same optimizer, and take turns within a round. The
first two need as many minibatches as training without a delay does; ours needs *extra* times as many, from the
simulations of ``bench.staleness`` with as many ``--microbatches``, which ours accumulates the gradients of.

For pipelines that this machine has no cores for, the schedules are simulated: a stage has its equal
share of the seconds that one thread takes, at the size of the microbatch, and links are free. That is no measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

import layerpipe_kernels as lk
from bench import distributed, pipeline, staleness
from bench.networks import Case, loss_fn
from bench.others import Others
from bench.report import console, save, spread
from layerpipe.theory import simulate
from layerpipe.theory.simulate import StageCost

CASES = {"gpt": Case("gpt", 128, 16, 64, layers=8), "resnet18": Case("resnet18", 8, 64, 28)}
PARTS = (1, 2, 4, 8, 16)  # microbatches that a synchronous pipeline may cut a minibatch into


def adamw(params: Any, **past: Any) -> torch.optim.Optimizer:
    return lk.AdamW(params, lr=1e-3, betas=(0.9, 0.95), **past)


def soap(params: Any, **past: Any) -> torch.optim.Optimizer:
    """As docs/delay.md recommends it."""
    n = past.get("delay", 0)
    knobs = {"spike_compensation": 1.0, "weight_prediction": 0.5} if n else {}
    return lk.SOAP(params, lr=3e-3, betas=(max(0.9, 1 - 1 / (14 * n)) if n else 0.9, 0.95), **knobs, **past)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"soap": soap, "adamw": adamw}


def seconds_per_minibatch(
    case: Case,
    optimizer: str,
    stages: int,
    schedule: str,
    microbatches: int,
    parts: Sequence[int],
    rounds: int,
    steps: int,
) -> dict[str, list[float]]:
    """Of every variant and round."""
    make = OPTIMIZERS[optimizer]
    options = pipeline.Options(stages, "time", "blend", (schedule,), compiled=False, split_backward=False)
    small = dataclasses.replace(case, batch=case.batch // microbatches)
    further = {"accumulate": microbatches} if microbatches > 1 else {}
    pipe, run_parts = pipeline.pipelined(small, options, (schedule, False), None, make=make, **further)
    ours = lambda count: microbatches * run_parts(microbatches * count)
    cuts = case.stages(stages)
    variants: dict[str, Callable[[int], float]] = {f"asynchronous, {schedule}": ours}
    for threads in sorted({1, os.cpu_count() or 1}):
        variants[f"plain, {threads}"] = pipeline.plain(case, threads, make=make)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(pipe))
        for name in distributed.SCHEDULES:
            for count in parts:
                started = distributed.Processes("torch", name, count, case, cuts, make)
                stack.callback(started.close)
                variants[f"synchronous, {name} {count}"] = started
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for run in variants.values():
            run(2)
        for _ in track(range(rounds), description=f"{case}, {optimizer}", transient=True):
            for name, run in variants.items():
                seconds[name].append(run(steps))
            pipe.drain()
    return seconds


def parts_of_a_step(case: Case, optimizer: str, rounds: int) -> dict[int, dict[str, float]]:
    """Median seconds on one thread: forward, backward, update; by the number of parts that a minibatch is cut into."""
    torch.set_num_threads(1)
    found = {}
    for parts in PARTS:
        if case.batch % parts:
            continue
        small = dataclasses.replace(case, batch=case.batch // parts)
        network, (x, y) = small.model(), small.minibatch()
        step = OPTIMIZERS[optimizer](network.parameters())
        times: list[tuple[float, float, float]] = []
        for _ in range(rounds + 2):
            marks = [time.perf_counter()]
            loss = loss_fn(network(x), y)
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())
            step.step()
            marks.append(time.perf_counter())
            step.zero_grad()
            times.append((marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]))
        forward, backward, update = (statistics.median(each) for each in zip(*times[2:], strict=True))
        found[parts] = {"forward": forward, "backward": backward, "update": update}
    return found


def simulated(
    measured: dict[int, dict[str, float]], stages: int, microbatches: int = 1, minibatches: int = 32
) -> dict[str, float]:
    """Seconds per minibatch of the best synchronous pipeline and of an asynchronous one, in steady state."""

    def period(schedule: str, count: int, cost: StageCost, parts: int) -> float:
        return simulate.report(simulate.run(simulate.BUILDERS[schedule]([cost] * stages, count, parts))).period

    by_parts = {}
    for parts, seconds in measured.items():
        if parts > 1:
            forward, backward = (seconds[name] * parts / stages for name in ("forward", "backward"))
            cost = StageCost(forward, backward, update=seconds["update"] / stages)
            by_parts[parts] = period("gpipe", minibatches, cost, parts)
    fewest = min(by_parts, key=lambda parts: by_parts[parts])
    seconds = measured[microbatches]
    cost = StageCost(
        seconds["forward"] / stages, seconds["backward"] / stages, update=seconds["update"] / stages / microbatches
    )
    ours = microbatches * period("1f1b", max(minibatches, 4 * stages) * microbatches, cost, 1)
    return {"synchronous": by_parts[fewest], "microbatches": fewest, "asynchronous": ours}


def extra_minibatches(found: staleness.Results, task: str, optimizer: str, stages: int, microbatches: int = 1) -> float:
    """Of the best delayed runs of the task's own size that are longest; NaN where none was measured."""
    groups: dict[Any, list[staleness.Run]] = {}
    for run in found:
        own = (run.task, run.width, run.batch, run.context, run.settings.optimizer, run.stages, run.microbatches)
        if own == (task, 0, 0, 0, optimizer, stages, microbatches) and run.schedule != "sequential":
            groups.setdefault((run.steps, run.group("seed")), []).append(run)
    longest = max((steps for steps, _ in groups), default=0)
    extras = []
    for (steps, _), runs in groups.items():
        if steps == longest:
            quality = statistics.fmean(found[run]["quality"] for run in runs)
            extras.append(steps / staleness.worth(quality, staleness.undelayed(found, runs[0])))
    return min((extra for extra in extras if not math.isnan(extra)), default=math.nan)


def best(seconds: dict[str, list[float]], kind: str) -> str:
    """The variant of this kind with the least median."""
    names = [name for name in seconds if name.startswith(kind)]
    return min(names, key=lambda name: statistics.median(seconds[name]))


def measured_table(results: Sequence[dict[str, Any]], extra: Callable[[str, str, int, int], float]) -> Table:
    made = Table(title="Median (quartiles) over rounds; ratios within a round", title_justify="left")
    columns = ("network", "optimizer", "method", "ms per minibatch", "beside plain", "extra", "to equal loss")
    for column in columns:
        made.add_column(column, justify="left" if column in columns[:3] else "right")
    for result in results:
        seconds, task, optimizer = result["seconds"], result["task"], result["optimizer"]
        plain = seconds[best(seconds, "plain")]
        for kind in ("plain", "synchronous", "asynchronous"):
            name = best(seconds, kind)
            ratios = [a / b for a, b in zip(plain, seconds[name], strict=True)]
            more = extra(task, optimizer, result["stages"], result["microbatches"]) if kind == "asynchronous" else 1.0
            made.add_row(
                task, optimizer, name, spread([1000 * s for s in seconds[name]], ".1f"), spread(ratios, ".2f"),
                f"{more:.2f}", f"{statistics.median(ratios) / more:.2f}x faster",
            )  # fmt: skip
        made.add_section()
    return made


def simulated_table(
    results: Sequence[dict[str, Any]], processors: Sequence[int], extra: Callable[[str, str, int, int], float]
) -> Table:
    made = Table(title="Simulated: seconds of one thread in equal shares, free links", title_justify="left")
    columns = (
        "network",
        "optimizer",
        "processors",
        "synchronous, ms",
        "asynchronous, ms",
        "ratio",
        "extra",
        "to equal loss",
    )
    for column in columns:
        made.add_column(column, justify="left" if column in columns[:2] else "right")
    for result in results:
        measured = {int(parts): seconds for parts, seconds in result["one thread"].items()}
        for count in processors:
            times = simulated(measured, count, result["microbatches"])
            ratio = times["synchronous"] / times["asynchronous"]
            more = extra(result["task"], result["optimizer"], count, result["microbatches"])
            made.add_row(
                result["task"], result["optimizer"], str(count),
                f"{1000 * times['synchronous']:.1f} ({times['microbatches']} microbatches)",
                f"{1000 * times['asynchronous']:.1f}", f"{ratio:.2f}", f"{more:.2f}", f"{ratio / more:.2f}x faster",
            )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--minibatches", type=Path, required=True, help="what bench.staleness measured")
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=["soap"])
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=1, choices=PARTS, help="that ours accumulates")
    parser.add_argument("--parts", type=int, nargs="+", default=[2, 4, 8], help="microbatches of torch's pipelines")
    parser.add_argument("--schedule", choices=("1f1b", "lockstep"), default="1f1b", help="ours")
    parser.add_argument("--processors", type=int, nargs="+", default=[4, 8, 16], help="that are simulated")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="minibatches per round and variant; the refresh is in it")
    parser.add_argument("--json", type=Path, help="keep the seconds here, and do not measure again what is there")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    kept = json.loads(given.json.read_text())["results"] if given.json and given.json.exists() else []
    results: list[dict[str, Any]] = kept
    for task in given.task:
        for optimizer in given.optimizer:
            key = {
                "task": task, "optimizer": optimizer, "stages": given.stages, "schedule": given.schedule,
                "microbatches": given.microbatches,
            }  # fmt: skip
            if any(result.items() >= key.items() for result in results):
                continue
            with Others() as others:
                seconds = seconds_per_minibatch(
                    CASES[task],
                    optimizer,
                    given.stages,
                    given.schedule,
                    given.microbatches,
                    given.parts,
                    given.rounds,
                    given.steps,
                )
                single = parts_of_a_step(CASES[task], optimizer, given.rounds)
            results.append({**key, "seconds": seconds, "one thread": single, "others": others.share})
            save(given.json, results=results)
            print(f"{task}, {optimizer}: {others}")
    extra = functools.partial(extra_minibatches, staleness.load(given.minibatches))
    out = console(120)
    out.print(measured_table(results, extra))
    out.print(simulated_table(results, given.processors, extra))


if __name__ == "__main__":
    main()
