"""Rounds of ``bench.step``: who takes how long for the same work."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
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


def measure(case: Case, rounds: int, compiled: bool, seconds: float) -> list[dict[str, Any]]:
    clock = Clock(case.device)
    todo = variants(case, compiled)
    for variant in todo:
        verify(variant)
        if isinstance(variant, Ours):
            variant.count_launches()
    # A copy reads and writes: half of the bytes each. The same bytes as the fused step moves.
    bytes_moved = case.numel * case.traffic.one_pass()
    source = torch.empty(max(bytes_moved // 2, 1), dtype=torch.uint8, device=case.device).fill_(1)
    target = torch.empty_like(source)
    repeats = {id(v): 1 for v in todo}
    for variant in todo:
        clock.seconds(variant.step, 3)
        once, _ = clock.seconds(variant.step, 3)
        repeats[id(variant)] = max(1, min(1000, math.ceil(seconds / max(once, 1e-7))))
    copy_repeats = max(1, min(1000, math.ceil(seconds / max(clock.seconds(lambda: target.copy_(source), 3)[0], 1e-7))))
    times: dict[int, list[tuple[float, float]]] = {id(v): [] for v in todo}
    copies = []
    for _ in range(rounds):
        copies.append(clock.seconds(lambda: target.copy_(source), copy_repeats)[0])
        for variant in todo:
            times[id(variant)].append(clock.seconds(variant.step, repeats[id(variant)]))
    ours = [t for t, _ in times[id(todo[0])]]
    rows = []
    for variant in todo:
        device = [t for t, _ in times[id(variant)]]
        ratios = [t / o for t, o in zip(device, ours, strict=True)]
        of_copy = [
            c / t * (variant.bytes_per_parameter / case.traffic.one_pass()) for c, t in zip(copies, device, strict=True)
        ]
        rows.append(
            {
                "case": case.name,
                "optimizer": case.optimizer,
                "dtype": str(case.dtype).removeprefix("torch."),
                "tensors": len(case.shapes),
                "parameters": case.numel,
                "variant": variant.name,
                "ms": statistics.median(device) * 1e3,
                "bytes_per_parameter": variant.bytes_per_parameter,
                "gb_per_s": variant.bytes_per_parameter * case.numel / statistics.median(device) / 1e9,
                "of_copy": statistics.median(of_copy),
                "times_ours": statistics.median(ratios),
                "times_ours_quartiles": quartiles(ratios),
                "launches": variant.launches,
                "call_us": statistics.median([c for _, c in times[id(variant)]]) * 1e6 if clock.cuda else None,
                "copy_gb_per_s": bytes_moved / statistics.median(copies) / 1e9,
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
