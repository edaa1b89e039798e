"""Replicas times stages in gloo processes, beside torch's pipelines and DDP: the same model and global minibatch.

    python -m bench.mesh --rounds 4 --steps 4

For every mesh ``dp x pp`` ours runs with lockstep in ``dp * pp`` processes. Beside it run, where they fit, GPipe, 1F1B
and interleaved 1F1B of :mod:`torch.distributed.pipelining` (``dp`` of 1; interleaved with two stages per process) and
:class:`torch.nn.parallel.DistributedDataParallel` (``pp`` of 1). Each process has one intra-op thread. The variants
take turns within a round while the others' processes wait; ratios are formed within a round. Memory is the peak that
the system has counted for a process, its imports included; the largest of a variant's processes is shown.

Ours is asynchronous, theirs are ordinary training: this compares how fast they get through the same data.
"""

from __future__ import annotations

import argparse
import functools
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn.parallel import DistributedDataParallel

import layerpipe
from bench.networks import Case, add_cases, loss_fn
from bench.pipeline import our_sgd, torch_sgd
from bench.report import save, spread


class Variant(NamedTuple):
    name: str  # "layerpipe", "ddp", or one of torch's schedules
    dp: int
    pp: int
    stages: int  # per process

    def __str__(self) -> str:
        return f"{self.dp} x {self.pp} {self.name}"


def variants(meshes: list[tuple[int, int]]) -> list[Variant]:
    """Ours on every mesh, and what torch has for it."""
    found = []
    for dp, pp in meshes:
        found.append(Variant("layerpipe", dp, pp, 1))
        if dp == 1:
            found += [Variant(name, 1, pp, 1) for name in ("gpipe", "1f1b")] + [Variant("interleaved", 1, pp, 2)]
        if pp == 1:
            found.append(Variant("ddp", dp, 1, 1))
    return found


def step_of(
    variant: Variant, rank: int, case: Case, cuts: list[nn.Module], microbatches: int
) -> tuple[Callable[[], object], Callable[[], None]]:
    """A step of this process, and what ends it."""
    x, y = case.minibatch()
    if variant.name == "layerpipe":
        mesh = init_device_mesh("cpu", (variant.dp, variant.pp), mesh_dim_names=("dp", "pp"))
        pipe = layerpipe.Pipeline(cuts, loss_fn, our_sgd, schedule="lockstep", mesh=mesh)
        part = [each.chunk(pipe.replicas)[pipe.replica] for each in (x, y)]
        return functools.partial(pipe.step, *part), pipe.close
    if variant.name == "ddp":
        model = DistributedDataParallel(cuts[0])
        x, y = (each.chunk(variant.dp)[rank] for each in (x, y))
        optimizer = torch_sgd(model.parameters())

        def train() -> None:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

        return train, lambda: None
    own = range(rank, len(cuts), variant.pp)
    stages = [PipelineStage(cuts[i], i, len(cuts), torch.device("cpu")) for i in own]
    schedule: Any
    if variant.name == "interleaved":
        schedule = ScheduleInterleaved1F1B(stages, n_microbatches=microbatches, loss_fn=loss_fn)
    else:
        kind = ScheduleGPipe if variant.name == "gpipe" else Schedule1F1B
        schedule = kind(stages[0], n_microbatches=microbatches, loss_fn=loss_fn)
    optimizer = torch_sgd([p for i in own for p in cuts[i].parameters()])
    inputs, target = [x] if 0 in own else [], {"target": y} if len(cuts) - 1 in own else {}

    def train_in_pipe() -> None:
        optimizer.zero_grad()
        schedule.step(*inputs, **target)
        optimizer.step()

    return train_in_pipe, lambda: None


def process(
    rank: int,
    variant: Variant,
    case: Case,
    cuts: list[nn.Module],
    microbatches: int,
    store: str,
    orders: Any,
    said: Any,
) -> None:
    """Trains as many steps as it is told, and says how long each took and how much memory there has been."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = variant.dp * variant.pp
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    step, close = step_of(variant, rank, case, cuts, microbatches)
    for _ in range(2 * variant.pp + 1):  # fill
        step()
    while steps := orders.get():
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        dist.barrier()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        said.put(((time.perf_counter() - start) / steps, peak))
    close()
    dist.destroy_process_group()


class Processes:
    """A variant's, which wait to be told how many steps to train."""

    def __init__(self, variant: Variant, case: Case, microbatches: int) -> None:
        context = mp.get_context("spawn")
        size, cuts = variant.dp * variant.pp, case.stages(variant.pp * variant.stages, "flops")
        self._directory = tempfile.TemporaryDirectory(prefix="layerpipe-bench-")
        self._orders, self._said = [context.Queue() for _ in range(size)], context.Queue()
        store = f"{self._directory.name}/store"
        self._processes = [
            context.Process(
                target=process, args=(r, variant, case, cuts, microbatches, store, orders, self._said), daemon=True
            )
            for r, orders in enumerate(self._orders)
        ]
        for each in self._processes:
            each.start()

    def __call__(self, steps: int) -> tuple[float, int]:
        """Seconds per minibatch, and the largest peak of memory in bytes."""
        for orders in self._orders:
            orders.put(steps)
        found: list[tuple[float, int]] = []
        while len(found) < len(self._orders):
            try:
                found.append(self._said.get(timeout=5))
            except Exception as error:  # queue.Empty: nobody has answered yet
                if not all(each.is_alive() for each in self._processes):
                    raise RuntimeError("a process has died; see above") from error
        return max(seconds for seconds, _ in found), max(peak for _, peak in found)

    def close(self) -> None:
        for orders in self._orders:
            orders.put(0)
        for each in self._processes:
            each.join(20)
            if each.is_alive():
                each.terminate()
        self._directory.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_cases(parser, "gpt:128:16")
    parser.add_argument("--mesh", nargs="+", default=["1x2", "2x1", "2x2", "1x4"], metavar="DPxPP")
    parser.add_argument("--microbatches", type=int, default=8, help="that torch's pipelines cut a minibatch into")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6, help="minibatches per round and variant")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    meshes = []
    for text in options.mesh:
        dp, _, pp = text.partition("x")
        if not (dp.isdigit() and pp.isdigit() and int(dp) and int(pp)):
            parser.error(f"--mesh {text}: replicas and processes of each, as in 2x2")
        meshes.append((int(dp), int(pp)))
    results: dict[str, Any] = {}
    for case in options.case:
        all_of = {variant: Processes(variant, case, options.microbatches) for variant in variants(meshes)}
        seconds: dict[str, list[float]] = {str(variant): [] for variant in all_of}
        peaks: dict[str, int] = {}
        try:
            for run in all_of.values():
                run(2)
            for _ in range(options.rounds):
                for variant, run in all_of.items():
                    took, peaks[str(variant)] = run(options.steps)
                    seconds[str(variant)].append(took)
        finally:
            for run in all_of.values():
                run.close()
        results[str(case)] = {"seconds": seconds, "peaks": peaks}
        print(f"{case}: samples per second, times as long as ours on the first mesh takes, peak memory of a process")
        ours = next(iter(seconds.values()))
        for name, values in seconds.items():
            rate = spread([case.batch / s for s in values], ".1f")
            ratio = spread([a / b for a, b in zip(values, ours, strict=True)], ".2f")
            print(f"  {name:<22} {rate:<22} {ratio:<20} {peaks[name] / 2**20:.0f} MiB")
        save(options.json, **results)


if __name__ == "__main__":
    main()
