"""Throughput beside torch.distributed.pipelining: the same stages on the same cores.

    python -m bench.distributed

GPipe and 1F1B of :mod:`torch.distributed.pipelining` run in one process per stage over gloo, each minibatch cut into 2,
4 and 8 microbatches, one intra-op thread per process, torch's fused SGD. Ours runs once in one process with a thread
per stage and once as they do, in one process per stage over gloo. The variants take turns within a round while the
others' processes wait; ratios are formed within a round.

The two train differently: theirs is ordinary training whose BatchNorm sees microbatches, ours is asynchronous. This
compares how fast they get through the same data, nothing else.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import layerpipe
from bench.networks import Case, add_cases, loss_fn
from bench.pipeline import our_sgd, torch_sgd
from bench.report import save, spread

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


Make = Callable[..., torch.optim.Optimizer]


def theirs(
    rank: int, cuts: list[torch.nn.Module], case: Case, name: str, microbatches: int, make: Make = torch_sgd
) -> Callable[[], object]:
    """A step of one stage of torch's pipeline."""
    x, y = case.minibatch()
    stage = PipelineStage(cuts[rank], rank, len(cuts), torch.device("cpu"))
    schedule = SCHEDULES[name](stage, n_microbatches=microbatches, loss_fn=loss_fn)
    optimizer = make(cuts[rank].parameters())
    last = rank == len(cuts) - 1

    def step() -> None:
        optimizer.zero_grad()
        schedule.step(*([x] if rank == 0 else []), **({"target": y} if last else {}))
        optimizer.step()

    return step


def pipeline(cuts: list[torch.nn.Module], schedule: str, executor: str) -> layerpipe.Pipeline:
    return layerpipe.Pipeline(
        cuts,
        loss_fn,
        our_sgd,
        schedule=schedule,
        executor=executor,
        threads_per_stage=1,
    )


def rank_main(
    rank: int,
    kind: str,
    name: str,
    microbatches: int,
    case: Case,
    cuts: list[torch.nn.Module],
    store: str,
    commands: Any,
    answers: Any,
    make: Make,
) -> None:
    """One stage, of torch's pipeline or of ours: trains as many steps as it is told, and says how long each took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(cuts))
    if kind == "torch":
        step = theirs(rank, cuts, case, name, microbatches, make)
    else:
        step = functools.partial(pipeline(cuts, name, "distributed").step, *case.minibatch())
        for _ in range(2 * len(cuts) + 1):  # fill
            step()
    while steps := commands.get():
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        dist.barrier()
        if rank == len(cuts) - 1:
            answers.put((time.perf_counter() - start) / steps)
    dist.destroy_process_group()


class Processes:
    """Processes that wait to be told how many steps to train.

    Args:
        kind: ``"torch"`` or ``"layerpipe"``.
        name: of its schedule.
        microbatches: that torch's cuts a minibatch into.
        make: the optimizer of a stage of torch's, from its parameters.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        microbatches: int,
        case: Case,
        cuts: list[torch.nn.Module],
        make: Make = torch_sgd,
    ) -> None:
        context = mp.get_context("spawn")
        self._answers = context.Queue()
        self._commands = [context.Queue() for _ in cuts]
        self._directory = tempfile.TemporaryDirectory(prefix="layerpipe-bench-")
        store = f"{self._directory.name}/store"
        self._processes = [
            context.Process(
                target=rank_main,
                args=(rank, kind, name, microbatches, case, cuts, store, self._commands[rank], self._answers, make),
                daemon=True,
            )
            for rank in range(len(cuts))
        ]
        for process in self._processes:
            process.start()

    def __call__(self, steps: int) -> float:
        for commands in self._commands:
            commands.put(steps)
        while True:
            try:
                return float(self._answers.get(timeout=5))
            except Exception as error:  # queue.Empty: nobody has answered yet
                if not all(process.is_alive() for process in self._processes):
                    raise RuntimeError("a process has died; see above") from error

    def close(self) -> None:
        for commands in self._commands:
            commands.put(0)
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.terminate()
        self._directory.cleanup()


def measure(
    case: Case, stages: int, schedule: str, microbatches: list[int], rounds: int, steps: int
) -> dict[str, list[float]]:
    """Seconds per minibatch of every variant and round."""
    cuts = case.stages(stages)
    pipe = pipeline(cuts, schedule, "threads")
    x, y = case.minibatch()

    def ours(count: int) -> float:
        for _ in range(2 * stages + 1):
            pipe.step(x, y)
        start = time.perf_counter()
        for _ in range(count):
            pipe.step(x, y)
        return (time.perf_counter() - start) / count

    processes = {
        f"torch {name}, {count}": Processes("torch", name, count, case, cuts)
        for name in SCHEDULES
        for count in microbatches
    }
    processes[f"layerpipe {schedule}, processes"] = Processes("layerpipe", schedule, 1, case, cuts)
    variants = {f"layerpipe {schedule}": ours, **processes}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    try:
        for run in variants.values():
            run(2)
        for _ in range(rounds):
            for name, run in variants.items():
                seconds[name].append(run(steps))
            pipe.drain()
    finally:
        pipe.close()
        for each in processes.values():
            each.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_cases(parser, "resnet18:16:64", "gpt:256:16")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--schedule", choices=("lockstep", "1f1b"), default="lockstep", help="ours")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[2, 4, 8], help="that torch's pipelines try")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8, help="minibatches per round and variant")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    for case in options.case:
        for count in options.microbatches:
            if count < options.stages or case.batch % count:
                parser.error(
                    f"--microbatches {count}: at least as many as stages, {options.stages}, and a divisor of the batch "
                    f"of {case}"
                )
    results = {}
    for case in options.case:
        seconds = results[str(case)] = measure(
            case, options.stages, options.schedule, options.microbatches, options.rounds, options.steps
        )
        ours = next(iter(seconds.values()))
        print(
            f"{case}, {options.stages} stages: samples per second, and how many times as long as our threads it takes"
        )
        print("  medians (quartiles); torch's with the number of microbatches")
        for name, values in seconds.items():
            rate = spread([case.batch / s for s in values], ".1f")
            ratio = spread([a / b for a, b in zip(values, ours, strict=True)], ".2f")
            print(f"  {name:<30} {rate:<22} {ratio}")
        save(options.json, seconds=results)  # after each, for whoever stops it here


if __name__ == "__main__":
    main()
