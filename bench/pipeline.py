"""Throughput of the threaded pipeline beside plain training of the same network on the same cores.

    python -m bench.pipeline

Every round times a few steps of each variant, one variant after the other, so that a change of the machine's speed
meets all of them; ratios are formed within a round, and the table shows their median and quartiles.

*Efficiency* is the pipeline's rate over ``stages`` times that of plain training of the same code, eager or compiled,
on one thread: 1.0 would be stages that never wait and cost nothing. Its *ceiling* is the efficiency of ``stages`` plain
trainings that have nothing to do with each other, in processes of their own at the same time: what the cores, their
caches and the memory between them have to give to that many threads of this work. *Ratio* is the pipeline's rate over
the best plain one of the same code; its *limit* is what an efficiency of 1.0 would give.

ResNets are in the memory format in which plain training of that code is faster on one thread: NHWC is channels last.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from rich import box
from rich.progress import track
from rich.table import Table
from torch import Tensor

import layerpipe
import layerpipe_kernels
from bench.networks import Case, add_cases, compile_module, faster_format, loss_fn
from bench.report import console, save, spread
from layerpipe import models
from layerpipe.partition import cut_at
from layerpipe.partition.profile import intraop_threads

Run = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Options:
    stages: int
    balance: str
    past: str
    schedules: tuple[str, ...]
    compiled: bool
    split_backward: bool

    @property
    def kinds(self) -> list[tuple[str, bool]]:
        """Of pipelines: the schedule, and whether the backward is split."""
        return list(itertools.product(self.schedules, (False, True)[: 1 + self.split_backward]))


def torch_sgd(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9, fused=True)


def plain(case: Case, threads: int, *, compiled: bool = False, make: Callable[..., Any] = torch_sgd) -> Run:
    """Seconds per step of an ordinary loop, with torch's fused SGD unless another optimizer is made."""
    network: Any = case.model()
    x, y = case.minibatch()
    optimizer = make(network.parameters())
    if compiled:
        network = compile_module(network)

    def run(steps: int) -> float:
        with intraop_threads(threads):
            start = time.perf_counter()
            for _ in range(steps):
                optimizer.zero_grad()
                loss_fn(network(x), y).backward()
                optimizer.step()
            return (time.perf_counter() - start) / steps

    return run


def our_sgd(params: Any, **past: Any) -> torch.optim.Optimizer:
    return layerpipe_kernels.SGD(params, lr=0.01, momentum=0.9, **past)


def pipelined(
    case: Case,
    options: Options,
    kind: tuple[str, bool],
    at: list[str] | None,
    *,
    compiled: bool = False,
    make: Callable[..., Any] = our_sgd,
    **further: Any,
) -> tuple[layerpipe.Pipeline, Run]:
    """Seconds per step of the pipeline in steady state, one intra-op thread in each worker; cut ``at`` these layers."""
    x, y = case.minibatch()
    schedule, split = kind
    pipe = layerpipe.Pipeline(
        case.stages(options.stages, options.balance, at=at, compiled=compiled),
        loss_fn,
        make,
        past=options.past,
        schedule=schedule,
        executor="threads",
        threads_per_stage=1,
        split_backward=split,
        **further,
    )

    def run(steps: int) -> float:
        for _ in range(2 * options.stages + 1):  # fill, and let the workers wake up
            pipe.step(x, y)
        start = time.perf_counter()
        for _ in range(steps):
            pipe.step(x, y)
        return (time.perf_counter() - start) / steps

    return pipe, run


class AtOnce:
    """Plain trainings of one thread each, in processes of their own, all at the same time."""

    def __init__(self, case: Case, count: int, *, compiled: bool = False) -> None:
        context = mp.get_context("spawn")
        pairs = [context.Pipe() for _ in range(count)]
        self._ends = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=_train_when_told, args=(case, compiled, theirs), daemon=True) for _, theirs in pairs
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()  # then one that dies is an EOFError here
        for end in self._ends:
            end.recv()

    def __call__(self, steps: int) -> float:
        """Seconds per step of all of them together."""
        for end in self._ends:
            end.send(steps)
        return statistics.mean([end.recv() for end in self._ends]) / len(self._ends)

    def close(self) -> None:
        for end, process in zip(self._ends, self._processes, strict=True):
            end.close()
            process.join()


def _train_when_told(case: Case, compiled: bool, end: Connection) -> None:
    torch._inductor.config.force_disable_caches = compiled
    torch.set_num_threads(1)
    run = plain(case, 1, compiled=compiled)
    run(3)
    with contextlib.suppress(EOFError):  # nobody wants anything any more
        end.send(None)
        while True:
            end.send(run(end.recv()))


def formatted(case: Case, asked: str, compiled: bool) -> Case:
    """In the memory format asked for, where the network has one and this machine's convolutions can be trusted."""
    if case.network != "resnet18":
        return case
    if asked != "fastest":
        return dataclasses.replace(case, channels_last=asked == "channels_last")
    try:
        models.check_channels_last(case.width, torch.device("cpu"))
    except ValueError as error:
        print(f"{case}: contiguous, because {error}")
        return case
    return faster_format(case, lambda each: plain(each, 1, compiled=compiled))


def measure(cases: dict[bool, Case], options: Options, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Seconds per step of each variant and round, and what follows from them; one result per kind of code.

    Args:
        cases: of eager code (``False``) and of compiled (``True``), each in its own memory format.
    """
    cores = range(1, options.stages + 1)
    variants: dict[tuple[bool, str], Run] = {}
    pipes: dict[tuple[bool, str], layerpipe.Pipeline] = {}
    others: list[AtOnce] = []
    for compiled, case in cases.items():
        for threads in cores:
            variants[compiled, f"plain, {threads}"] = plain(case, threads, compiled=compiled)
        others.append(AtOnce(case, options.stages, compiled=compiled))
        variants[compiled, "at once"] = others[-1]
        at = None
        for kind in options.kinds:
            pipe, variants[compiled, str(kind)] = pipelined(case, options, kind, at, compiled=compiled)
            pipes[compiled, str(kind)] = pipe
            at = cut_at([stage.module for stage in pipe.stages])  # all kinds are cut like the first
    seconds: dict[tuple[bool, str], list[float]] = {key: [] for key in variants}
    try:
        for run in variants.values():
            run(3)
        for _ in track(range(rounds), description=str(cases[False]), transient=True):
            for key, run in variants.items():
                seconds[key].append(run(steps))
            for pipe in pipes.values():
                pipe.drain()
        names = {key: pipe.names for key, pipe in pipes.items()}
    finally:
        for started in (*pipes.values(), *others):
            started.close()
    results = []
    for compiled, case in cases.items():
        one, at_once = seconds[compiled, "plain, 1"], seconds[compiled, "at once"]
        best = [min(times) for times in zip(*(seconds[compiled, f"plain, {t}"] for t in cores), strict=True)]
        for schedule, split in options.kinds:
            key = compiled, str((schedule, split))
            ours = seconds[key]
            results.append(
                {
                    "case": dataclasses.asdict(case),
                    "options": dataclasses.asdict(options),
                    "code": "compiled" if compiled else "eager",
                    "schedule": f"{schedule}, split" if split else schedule,
                    "stages": names[key],
                    "rounds": rounds,
                    "steps_per_round": steps,
                    "seconds": {
                        **{f"plain, {t}": seconds[compiled, f"plain, {t}"] for t in cores},
                        "at once": at_once,
                        "pipeline": ours,
                    },
                    "efficiency": [a / (options.stages * p) for a, p in zip(one, ours, strict=True)],
                    "ceiling": [a / (options.stages * p) for a, p in zip(one, at_once, strict=True)],
                    "ratio": [b / p for b, p in zip(best, ours, strict=True)],
                    "limit": [options.stages * b / a for a, b in zip(one, best, strict=True)],
                }
            )
    return results


def table(results: list[dict[str, Any]]) -> Table:
    """Medians, and quartiles of the efficiency; the rest is in the JSON."""
    out = Table(title_justify="left")
    out.box, out.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
    names = list(results[0]["seconds"])
    # What is the same in all rows is in the title.
    what = [key for key in ("code", "schedule") if len({result[key] for result in results}) > 1]
    rest = ", ".join(results[0][key] for key in ("schedule", "code") if key not in what)
    out.title = f"Samples per second, and ratios within a round, medians: {rest or 'pipeline beside plain training'}"
    first = ("network, batch", *what)
    for column in (*first, *(name.replace(",", "") for name in names), "efficiency", "ceiling", "ratio/limit"):
        out.add_column(column, justify="left" if column in first else "right", no_wrap=True)
    for result in results:
        case = result["case"]
        rates = [f"{statistics.median(case['batch'] / s for s in result['seconds'][name]):.0f}" for name in names]
        ratio = "/".join(f"{statistics.median(result[name]):.2f}" for name in ("ratio", "limit"))
        label = f"{case['network']} {case['width']}, {case['batch']}{' NHWC' if case['channels_last'] else ''}"
        efficiency = spread(result["efficiency"], ".2f")
        ceiling = f"{statistics.median(result['ceiling']):.2f}"
        out.add_row(label, *(result[key] for key in what), *rates, efficiency, ceiling, ratio)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_cases(parser, "resnet18:16:64", "resnet18:16:8", "resnet18:8:32", "gpt:256:16")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--schedule", nargs="+", default=["lockstep", "1f1b"])
    parser.add_argument("--compile", action="store_true", help="also compiled stages against compiled plain training")
    parser.add_argument("--split-backward", action="store_true", help="also pipelines with split_backward=True")
    parser.add_argument("--memory-format", choices=("fastest", "contiguous", "channels_last"), default="fastest")
    parser.add_argument("--balance", choices=("flops", "time", "params"), default="time")
    parser.add_argument("--past", default="blend", help="kind of past weights")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.4, help="about how long each variant runs in a round")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    if given.compile:
        # Kernels are made for a number of threads; a cached one may be of another.
        torch._inductor.config.force_disable_caches = True
    options = Options(
        given.stages, given.balance, given.past, tuple(given.schedule), given.compile, given.split_backward
    )
    results = []
    for case in given.case:
        cases = {
            compiled: formatted(case, given.memory_format, compiled) for compiled in (False, True)[: 1 + given.compile]
        }
        steps = max(5, round(given.seconds / plain(cases[False], 1)(3)))
        results += measure(cases, options, given.rounds, steps)
        save(given.json, results=results)  # after each, for whoever stops it here
    console(110).print(table(results))
    for result in results:
        what = f"{Case(**result['case'])}, {result['code']} {result['schedule']}"
        print(f"{what}: stages {' | '.join(result['stages'])}")


if __name__ == "__main__":
    main()
