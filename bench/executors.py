"""Training on one GPU: the pipeline on streams and from graphs, beside plain training eager, compiled and from a graph.

    python -m bench.executors --json bench/results/DEVICE-executors.json

Every round times each variant over the same number of steps, one variant after the other; the table shows samples per
second, median and quartiles over rounds, the ratio to the best plain variant within a round, and the peak of memory
that torch had allocated for this variant alone, cuBLAS workspaces of its streams included (32 MiB for each host thread
and stream on Hopper). A stage's graphs hold the activations of all its minibatches in flight. Batches that do not fit
are left out.

``--device cpu`` runs the plain and the serial variant with few steps: a check of this file, not a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import layerpipe
import layerpipe_kernels
from bench.networks import Case, loss_fn
from bench.report import console, save, spread
from layerpipe import accelerator

Step = Callable[[], Any]
PLAIN = ("plain eager", "plain compiled", "plain graph", "plain compiled graph")
PIPELINES = ("serial", "streams", "graphs", "graphs materialized")


def sgd(params: Any, **options: Any) -> torch.optim.Optimizer:
    return layerpipe_kernels.SGD(params, lr=0.01, momentum=0.9, **options)


def plain(case: Case, kind: str, device: torch.device) -> Step:
    """One step of an ordinary loop with torch's fused SGD."""
    network: Any = case.model().to(device)
    x, y = (t.to(device) for t in case.minibatch())
    on_gpu = device.type == "cuda"
    lr = torch.tensor(0.01, device=device) if kind.endswith("graph") else 0.01
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, fused=on_gpu)
    if "compiled" in kind:
        network = torch.compile(network, dynamic=False)

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(network(x), y).backward()
        optimizer.step()

    if not kind.endswith("graph"):
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        loss_fn(network(x), y).backward()
        optimizer.step()

    def replay() -> None:
        graph.replay()

    # A graph works on memory that it does not keep: that of the network, the minibatch and the optimizer's state.
    replay.holds = network, x, y, optimizer, lr  # type: ignore[attr-defined]
    return replay


def pipelined(case: Case, kind: str, device: torch.device, stages: int, schedule: str) -> Step:
    """``kind``: the executor, and whether its steps write the past weights for the next backward."""
    executor, materialize = kind.split()[0], kind.endswith("materialized")
    x, y = (t.to(device) for t in case.minibatch())
    model = case.model().to(device)
    parts = layerpipe.split(model, stages, (x,), balance="flops")

    def optimizer(params: list[Tensor], **past: Any) -> torch.optim.Optimizer:
        return sgd(params, capturable=executor == "graphs", **past)

    past = layerpipe_kernels.Blend(materialize=materialize)
    pipe = layerpipe.Pipeline(parts, loss_fn, optimizer, past=past, schedule=schedule, executor=executor)
    return lambda: pipe.step(x, y)


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def seconds(step: Step, steps: int, device: torch.device) -> float:
    """Per step, from an idle device to an idle device."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return (time.perf_counter() - start) / steps


def make(case: Case, name: str, device: torch.device, stages: int, schedule: str) -> tuple[Step, int]:
    """A variant that has warmed up, and the bytes that it needed at most beside what others hold."""
    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # each variant pays for its own
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    step = plain(case, name, device) if name in PLAIN else pipelined(case, name, device, stages, schedule)
    for _ in range(6 * stages + 4):  # fill, capture, and let the eager minibatches leave
        step()
    return step, peak(device) - before


def measure(
    case: Case, names: list[str], device: torch.device, *, stages: int, schedule: str, rounds: int, budget: float
) -> dict[str, Any]:
    variants, peaks = {}, {}
    for name in names:
        variants[name], peaks[name] = make(case, name, device, stages, schedule)
    steps = max(3, round(budget / seconds(variants[names[0]], 3, device)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, step in variants.items():
            times[name].append(seconds(step, steps, device))
    best = [min(of_round) for of_round in zip(*(times[n] for n in names if n in PLAIN), strict=True)]
    return {
        "case": dataclasses.asdict(case),
        "stages": stages,
        "schedule": schedule,
        "steps_per_round": steps,
        "seconds": times,
        "ratio": {name: [b / t for b, t in zip(best, times[name], strict=True)] for name in names},
        "peak_bytes": peaks,
    }


def table(results: list[dict[str, Any]]) -> Table:
    out = Table(title="Samples per second: median (quartiles) over rounds", title_justify="left")
    for column in ("network, batch", "variant", "samples/s", "best plain = 1", "peak MiB"):
        out.add_column(column, justify="left" if column in ("network, batch", "variant") else "right")
    for result in results:
        case = result["case"]
        for name, times in result["seconds"].items():
            rates = [case["batch"] / t for t in times]
            label = f"{case['network']} {case['width']}, {case['batch']}{' NHWC' if case['channels_last'] else ''}"
            ratio = statistics.median(result["ratio"][name])
            out.add_row(label, name, spread(rates, ".0f"), f"{ratio:.2f}", f"{result['peak_bytes'][name] / 2**20:.0f}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18:64", metavar="NETWORK:WIDTH", help="default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--size", type=int, default=32, help="image size, or length of a GPT's sequences")
    parser.add_argument("--channels-last", action="store_true", help="of all variants")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--schedule", default="lockstep")
    parser.add_argument("--variants", nargs="+", choices=(*PLAIN, *PIPELINES), help="default: all that the device has")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long each variant runs in a round")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    given = parser.parse_args()
    device = torch.device(given.device)
    accelerator.ask_for_connections()
    if device.type == "cuda":
        torch.cuda.init()  # which statistics of memory need
    network, width = given.network.split(":")
    names = given.variants or ([*PLAIN, *PIPELINES] if device.type == "cuda" else ["plain eager", "serial"])
    results = []
    for batch in given.batch:
        case = Case(network, int(width), batch, given.size, given.channels_last)
        try:
            results.append(
                measure(
                    case, names, device, stages=given.stages, schedule=given.schedule, rounds=given.rounds,
                    budget=given.seconds,
                )
            )  # fmt: skip
        except (torch.OutOfMemoryError, layerpipe.StageError) as error:
            print(f"{case} left out: {error}")
        save(given.json, results=results)  # after each, for whoever stops it here
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if not results:
        raise SystemExit("nothing was measured")
    console().print(table(results))


if __name__ == "__main__":
    main()
