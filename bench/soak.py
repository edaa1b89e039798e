"""Does a pipeline stay as fast and as small as it began? Time per tick and memory over 100,000 ticks.

    python -m bench.soak

Ends with status 1 where the last fifth is slower than the second by more than ``--slower``, or the process has grown by
more than ``--growth`` since. The first fifth does not count: allocators and plans settle there.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels
from bench.report import save

WIDTH, BATCH, PARTS = 8, 4, 20


class Sample(NamedTuple):
    """After some ticks."""

    ticks: int
    microseconds: float  # per tick since the sample before
    rss_kb: int  # resident memory of the process
    objects: int  # that Python's collector knows
    threads: int


def rss_kb() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmRSS")


def soak(ticks: int, stages: int, executor: str, schedule: str, past: str) -> list[Sample]:
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def sgd(params: list[Tensor], **options: object) -> layerpipe_kernels.SGD:
        return layerpipe_kernels.SGD(params, lr=1e-3, momentum=0.9, **options)  # type: ignore[arg-type]

    x, y = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    parts = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(stages)]
    samples = []
    with layerpipe.Pipeline(parts, F.mse_loss, sgd, executor=executor, schedule=schedule, past=past) as pipe:
        for part in range(1, PARTS + 1):
            count = ticks * part // PARTS - ticks * (part - 1) // PARTS
            start = time.perf_counter()
            for _ in range(count):
                pipe.step(x, y)
            passed = time.perf_counter() - start
            gc.collect()
            samples.append(
                Sample(
                    ticks * part // PARTS,
                    1e6 * passed / count,
                    rss_kb(),
                    len(gc.get_objects()),
                    threading.active_count(),
                )
            )
            print("{:>9,} ticks  {:8.1f} us/tick  {:>9,} kB  {:>9,} objects  {} threads".format(*samples[-1]))
        pipe.drain()
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ticks", type=int, default=100_000)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--executor", choices=("serial", "threads"), default="threads")
    parser.add_argument("--schedule", default="lockstep")
    parser.add_argument("--past", default="blend")
    parser.add_argument("--slower", type=float, default=1.3, help="ratio that is a failure")
    parser.add_argument("--growth", type=float, default=2.0, help="MB that are a failure")
    parser.add_argument("--json", type=Path, help="write the samples here")
    options = parser.parse_args()
    if options.ticks < PARTS:
        parser.error(f"--ticks: at least {PARTS}")
    samples = soak(options.ticks, options.stages, options.executor, options.schedule, options.past)
    early, late = samples[PARTS // 5 : 2 * PARTS // 5], samples[-PARTS // 5 :]
    slower = statistics.median(s.microseconds for s in late) / statistics.median(s.microseconds for s in early)
    growth = (samples[-1].rss_kb - samples[PARTS // 5 - 1].rss_kb) / 1000
    objects = samples[-1].objects - samples[PARTS // 5 - 1].objects
    print(
        f"last fifth over second: {slower:.2f} of the time; since the first fifth {growth:+.1f} MB, {objects:+} objects"
    )
    save(options.json, samples=[s._asdict() for s in samples])
    sys.exit(int(slower > options.slower or growth > options.growth))


if __name__ == "__main__":
    main()
