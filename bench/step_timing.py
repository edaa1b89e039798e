"""Rounds of ``bench.step``: who takes how long for the same work."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.step_variants import Case, Ours, variants, verify


class Clock:
    """Seconds that a call takes: by events on a CUDA device, else by the wall."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def seconds(self, call: Callable[[], None], repeats: int) -> tuple[float, float]:
        """Per call: on the device, and in Python until it returned."""
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            each = (time.perf_counter() - begin) / repeats
            return each, each
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        called = (time.perf_counter() - begin) / repeats
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats, called


class Rotation:
    """The same work on several copies in turn, so that none finds its memory in a cache where the last left it."""

    def __init__(self, works: Sequence[Callable[[], None]]) -> None:
        self.works, self.next = works, 0

    def __call__(self) -> None:
        self.works[self.next]()
        self.next = (self.next + 1) % len(self.works)


def copies(case: Case) -> int:
    """How many buffers are used in turn: on a GPU as many as are twice its L2 cache; on a CPU one, whose caches hold
    what the size says."""
    if case.device == "cpu":
        return 1
    cache = int(torch.cuda.get_device_properties(case.device).L2_cache_size)
    return min(64, 1 + 2 * cache // max(1, case.numel * case.traffic.one_pass()))


def copying(case: Case, count: int) -> Callable[[], None]:
    """Copies as many bytes as the fused step moves: half of them are read, and as many written."""
    size = max(case.numel * case.traffic.one_pass() // 2, 1)
    noise = torch.randint(0, 256, (min(size, 1 << 20),), dtype=torch.uint8, device=case.device)
    sources = [noise.repeat(-(-size // len(noise)))[:size] for _ in range(count)]
    targets = [torch.empty_like(source) for source in sources]
    return Rotation([functools.partial(t.copy_, s) for t, s in zip(targets, sources, strict=True)])


def measure(case: Case, rounds: int, compiled: bool, seconds: float) -> list[dict[str, Any]]:
    clock = Clock(case.device)
    first = variants(case, compiled)
    for variant in first:
        verify(variant)
        if isinstance(variant, Ours):
            variant.count_launches()
    count = copies(case)
    others = [variants(case, compiled, fresh=False) for _ in range(count - 1)]
    steps = [Rotation([v.step for v in same]) for same in zip(first, *others, strict=True)]
    works: list[Callable[[], None]] = [*steps, copying(case, count)]
    repeats = []
    for work in works:
        clock.seconds(work, 3 * count)
        once, _ = clock.seconds(work, 3 * count)
        repeats.append(max(count, min(1000, math.ceil(seconds / max(once, 1e-7)))))
    times: list[list[tuple[float, float]]] = [[] for _ in works]
    for _ in range(rounds):
        for taken, work, times_each in zip(times, works, repeats, strict=True):
            taken.append(clock.seconds(work, times_each))
    ours, copied = [t for t, _ in times[0]], [t for t, _ in times[-1]]
    rows = []
    for variant, taken in zip(first, times, strict=False):
        device = [t for t, _ in taken]
        ratios = [t / o for t, o in zip(device, ours, strict=True)]
        share = variant.bytes_per_parameter / case.traffic.one_pass()
        # A CPU's copy reads what it writes before it writes it, or not: no measure of what the memory gives.
        of_copy = statistics.median(c / t * share for c, t in zip(copied, device, strict=True)) if clock.cuda else None
        rows.append(
            {
                "case": case.name,
                "optimizer": case.optimizer,
                "dtype": str(case.dtype).removeprefix("torch."),
                "tensors": len(case.shapes),
                "parameters": case.numel,
                "buffers": count,
                "variant": variant.name,
                "ms": statistics.median(device) * 1e3,
                "bytes_per_parameter": variant.bytes_per_parameter,
                "gb_per_s": variant.bytes_per_parameter * case.numel / statistics.median(device) / 1e9,
                "of_copy": of_copy,
                "times_ours": statistics.median(ratios),
                "times_ours_quartiles": quartiles(ratios),
                "launches": variant.launches,
                "call_us": statistics.median([c for _, c in taken]) * 1e6 if clock.cuda else None,
                "copy_gb_per_s": case.numel * case.traffic.one_pass() / statistics.median(copied) / 1e9,
            }
        )
    return rows


def overhead(case: Case, repeats: int = 300) -> dict[str, float]:
    """Microseconds of ``step()`` for this list with one element per tensor: what is not work on memory."""
    tiny = dataclasses.replace(case, shapes=tuple((1,) for _ in case.shapes))
    clock = Clock(case.device)
    result = {}
    for variant in variants(tiny, compiled=False):
        clock.seconds(variant.step, 20)
        samples = [clock.seconds(variant.step, max(1, repeats // 10))[1] for _ in range(10)]
        result[variant.name] = statistics.median(samples) * 1e6
    return result


def quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4)
    return [first, third]
