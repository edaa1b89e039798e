"""The fused step beside the same work done by torch in separate passes, in one run.

    python -m bench.step                        # this machine's CPU
    python -m bench.step --device cuda --json step.json --plot step.png

Every variant makes an optimizer step, averages the updates and writes the past weights of the same parameters. Rounds
interleave the variants, so that a change of the machine's speed meets all of them; ratios are formed within a round and
the table shows medians. *GB/s* is by declared bytes (:mod:`layerpipe_kernels.traffic`), *of copy* relates it to
``torch.Tensor.copy_`` of as many bytes in the same round, *call* is the Python time of ``step()`` until it returns (on
a CUDA device; below the table for ResNet-18's list with one element per tensor).

A variant is timed only after its results have been compared with a float64 reference.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import layerpipe_kernels as lk
from bench import environment
from bench.parameter_lists import NETWORKS, Shape, parameters
from layerpipe_kernels import native, reference
from layerpipe_kernels.options import Moment, PastDesign, SgdOptions
from layerpipe_kernels.traffic import Traffic

LR, MOMENTUM, DELAY = 1e-3, 0.9, 6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    shapes: tuple[Shape, ...]
    optimizer: str  # "sgd" or "adamw"
    device: str
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        return parameters(list(self.shapes))

    @property
    def traffic(self) -> Traffic:
        return Traffic(weight=self.dtype, states=1 if self.optimizer == "sgd" else 2)

    def parameters(self, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        made = []
        for shape in self.shapes:
            p = torch.randn(shape, generator=generator, device=self.device).to(self.dtype).requires_grad_()
            p.grad = torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
            made.append(p)
        return made


class Variant:
    """One way to do the work on its own copy of the parameters."""

    launches: int | None = None
    bytes_per_parameter: int

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case = name, case
        self.params = case.parameters()

    def step(self) -> None:
        raise NotImplementedError

    def pasts(self) -> Sequence[Tensor]:
        """The past weights after the last step."""
        raise NotImplementedError


class Ours(Variant):
    def __init__(self, backend: str, case: Case) -> None:
        super().__init__(f"layerpipe, {backend}", case)
        options: dict[str, Any] = {"past": "ema", "delay": DELAY, "materialize": True, "backend": backend, "lr": LR}
        if case.optimizer == "sgd":
            self.optimizer: Any = lk.SGD(self.params, momentum=MOMENTUM, **options)
        else:
            self.optimizer = lk.AdamW(self.params, **options)
        self.bytes_per_parameter = case.traffic.one_pass()
        self.step = self.optimizer.step  # type: ignore[method-assign]

    def pasts(self) -> Sequence[Tensor]:
        return [self.optimizer.past_view(p) for p in self.params]

    def count_launches(self) -> None:
        runner = self.optimizer._ready_groups[0].plan.runner
        self.launches = getattr(runner, "launches", None)


class Chain(Variant):
    """torch's optimizer, then the averages, then the past weights, each a pass over memory of its own.

    The average runs over the momentum buffer (SGD, whose updates are a multiple of it) or over ``exp_avg`` (Adam, whose
    updates torch does not keep): the same bytes, and for Adam less work than the updates themselves would take.
    """

    def __init__(self, implementation: str, case: Case) -> None:
        super().__init__(f"torch {implementation} chain", case)
        kind: Any = torch.optim.SGD if case.optimizer == "sgd" else torch.optim.AdamW
        options = {"momentum": MOMENTUM} if case.optimizer == "sgd" else {}
        self.optimizer = kind(self.params, lr=LR, **options, **{implementation: True})
        self.bytes_per_parameter = case.traffic.separate_passes()
        self.key = "momentum_buffer" if case.optimizer == "sgd" else "exp_avg"
        self.decay = lk.decay.matched(DELAY)
        self.emas = [torch.zeros_like(p, dtype=reference.state_dtype(p.dtype)) for p in self.params]
        self.out = [torch.empty_like(p, requires_grad=False) for p in self.params]
        self.t = 0

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.t += 1
        mean = (self.t - 1) / self.t
        decay = mean if self.t <= DELAY else min(self.decay, mean)
        updates = [self.optimizer.state[p][self.key] for p in self.params]
        torch._foreach_lerp_(self.emas, updates, 1 - decay)
        scale = LR * min(self.t, DELAY)
        if self.case.device == "cuda":  # one launch for all; on the CPU a loop without allocations is faster
            self.out = torch._foreach_add(self.params, self.emas, alpha=scale)
        else:
            for p, e, out in zip(self.params, self.emas, self.out, strict=True):
                torch.add(p, e, alpha=scale, out=out)

    def pasts(self) -> Sequence[Tensor]:
        return self.out


class Compiled(Variant):
    """``torch.compile`` of the reference, for SGD."""

    def __init__(self, case: Case) -> None:
        super().__init__("torch.compile of the reference", case)
        self.bytes_per_parameter = case.traffic.one_pass()
        full = reference.state_dtype(case.dtype)
        self.velocities = [torch.zeros_like(p, dtype=full, requires_grad=False) for p in self.params]
        self.emas = [torch.zeros((1, *p.shape), dtype=full, device=p.device) for p in self.params]
        self.out = [torch.empty_like(p, requires_grad=False) for p in self.params]
        options = SgdOptions(LR, MOMENTUM)

        def all_tensors(weights: Any, grads: Any, velocities: Any, emas: Any, pasts: Any, decay: Any, tap: Any) -> None:
            design = PastDesign(0, (decay,), (tap,))
            for w, g, v, e, past in zip(weights, grads, velocities, emas, pasts, strict=True):
                reference.sgd_step_(w, g, v, e, past, options, design)

        self.compiled = torch.compile(all_tensors, dynamic=False)
        self.scalars: dict[float, Tensor] = {}  # as tensors, so that another value is not another program
        self.t = 0

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        decays, taps, _ = PastDesign(DELAY, (lk.decay.matched(DELAY),), (float(DELAY),)).at(self.t)
        grads = [p.grad for p in self.params]
        weights = [p.detach() for p in self.params]
        decay, tap = (
            self.scalars.setdefault(x, torch.tensor(x, device=weights[0].device)) for x in (decays[0], taps[0])
        )
        self.compiled(weights, grads, self.velocities, self.emas, self.out, decay, tap)

    def pasts(self) -> Sequence[Tensor]:
        return self.out


def verify(variant: Variant) -> None:
    """Three steps against the float64 reference on the first tensors; raises where they differ."""
    case = variant.case
    before = [p.detach().double() for p in variant.params]
    for _ in range(3):
        variant.step()
    design = PastDesign(DELAY, (0.5,), (float(DELAY),))  # while the delay fills, its decays do not matter
    pasts = variant.pasts()
    for i in sorted(range(len(before)), key=lambda i: before[i].numel())[:8]:
        w, g = before[i].clone(), variant.params[i].grad
        assert g is not None
        v, e = torch.zeros_like(w), torch.zeros_like(w)[None]
        if case.optimizer == "sgd":
            past = torch.empty_like(w)
            for t in range(1, 4):
                reference.sgd_step_(w, g.double(), v, e, past, SgdOptions(LR, MOMENTUM), design, Moment(t=t))
            torch.testing.assert_close(pasts[i].double(), past, rtol=2e-2 if case.dtype != torch.float32 else 1e-4,
                                       atol=1e-5 if case.dtype == torch.float32 else 2e-2)  # fmt: skip
        else:
            q, count, options = torch.zeros_like(w), torch.zeros((), device=w.device), lk.options.AdamOptions(LR)
            options = options._replace(weight_decay=1e-2)
            for t in range(1, 4):
                reference.adam_step_(w, g.double(), v, q, None, count, e, None, options, design, Moment(t=t))
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if case.dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(variant.params[i].detach().double(), w, **tolerance)


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


def variants(case: Case, compiled: bool) -> list[Variant]:
    backends = [b for b in lk.available_backends() if (b == "cpp") == (case.device == "cpu") and b != "reference"]
    made: list[Variant] = [Ours(backend, case) for backend in backends]
    for implementation in ("fused", "foreach"):
        # torch 2.13's fused SGD left blocks of 16-bit parameters on the CPU as they were: never a measure there.
        if case.device == "cuda" or case.dtype == torch.float32 or implementation == "foreach":
            made.append(Chain(implementation, case))
    if compiled and case.optimizer == "sgd" and len(case.shapes) <= 64:
        made.append(Compiled(case))
    return made


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


def sizes(largest: float) -> list[int]:
    """Bytes of parameters, from 10^4 on in steps of about 10."""
    return [10**k for k in range(4, 10) if 10**k <= largest]


def fits(case: Case) -> bool:
    """Whether all variants of a case have room beside each other."""
    needed = case.numel * 4 * 6 * 4
    if case.device == "cuda":
        return needed < 0.9 * torch.cuda.mem_get_info()[0]
    try:
        available = int(
            next(x for x in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in x).split()[1]
        )
    except (OSError, StopIteration):
        return True
    return needed < 0.9 * available * 1024


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="Step + EMA + past weights", title_justify="left", show_edge=False)
    for name in ("parameters", "variant", "ms", "GB/s", "of copy", "× ours (quartiles)", "launches", "call µs"):
        made.add_column(name, justify="left" if name in ("parameters", "variant") else "right")
    last = None
    for row in rows:
        key = (row["case"], row["optimizer"], row["dtype"])
        if last not in (None, key):
            made.add_section()
        low, high = row["times_ours_quartiles"]
        made.add_row(
            "" if key == last else f"{row['case']}, {row['optimizer']}, {row['dtype']}",
            row["variant"],
            f"{row['ms']:.3g}",
            f"{row['gb_per_s']:.1f}",
            f"{100 * row['of_copy']:.0f} %",
            f"{row['times_ours']:.2f} ({low:.2f}–{high:.2f})",
            "–" if row["launches"] is None else str(row["launches"]),
            "–" if row["call_us"] is None else f"{row['call_us']:.1f}",
        )
        last = key
    return made


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """A roofline: bytes per second over the size, under the line that a copy reaches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    swept = [r for r in rows if r["tensors"] == 1 and r["dtype"] == "float32" and r["optimizer"] == "sgd"]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for variant in dict.fromkeys(r["variant"] for r in swept):
        own = [r for r in swept if r["variant"] == variant]
        # The work is the same for all: bytes that one pass needs, over the time each took.
        one = Traffic().one_pass()
        axes.plot(
            [4 * r["parameters"] for r in own],
            [one * r["parameters"] / r["ms"] / 1e6 for r in own],
            "o-",
            label=variant,
        )
    first = swept[0]["variant"]
    copy = [r for r in swept if r["variant"] == first]
    axes.plot(
        [4 * r["parameters"] for r in copy], [r["copy_gb_per_s"] for r in copy], "k--", label="copy of as many bytes"
    )
    axes.set(xscale="log", yscale="log", xlabel="bytes of float32 parameters", title=title)
    axes.set_ylabel("GB/s, counting the bytes of one pass")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-bytes", type=float, help="largest parameters (default: 268e6 on the CPU, 1e9 on CUDA)")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of: " + ", ".join(NETWORKS) + "; '' for none")
    parser.add_argument("--optimizers", default="sgd,adamw")
    parser.add_argument("--dtypes", default=None, help="of: fp32, bf16 (default: fp32 on the CPU, both on CUDA)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="per variant and round")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU (default: torch's)")
    parser.add_argument(
        "--chunk", type=int, default=0, help="elements per block of the compiled kernels (default: theirs)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the reference out")
    parser.add_argument("--json", type=Path, help="write the measurements")
    parser.add_argument("--plot", type=Path, help="write a roofline")
    args = parser.parse_args()
    native.default_chunk = args.chunk
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    largest = args.max_bytes or (268.5e6 if args.device == "cpu" else 1e9)
    dtypes = (args.dtypes or ("fp32" if args.device == "cpu" else "fp32,bf16")).split(",")

    sweep = [(f"{n / 1e6:g} MB", ((n // 4,),)) for n in sizes(largest)]
    if args.device == "cpu" and largest >= 268e6:
        sweep.append(("67M", ((67_108_864,),)))
    networks = [(name, tuple(NETWORKS[name])) for name in args.networks.split(",") if name]
    cases = [
        Case(name, shapes, optimizer, args.device, DTYPES[dtype])
        for optimizer in args.optimizers.split(",")
        for dtype in dtypes
        for name, shapes in (*sweep, *networks)
    ]
    console = Console(width=None if sys.stdout.isatty() else 132)
    rows: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.name}, {case.optimizer}, {case.dtype}")
            if fits(case):
                rows += measure(case, args.rounds, not args.no_compile, args.seconds)
            else:
                console.print(f"{case.name}, {case.optimizer}: left out, not enough memory for all variants")
            progress.advance(task)
    calls = overhead(Case("resnet18", tuple(NETWORKS["resnet18"]), "sgd", args.device))
    described = environment.describe()
    console.print(table(rows))
    console.print(
        "\nstep() of ResNet-18's 62 tensors, one element each: "
        + ", ".join(f"{k} {v:.1f} µs" for k, v in calls.items())
    )
    console.print(
        f"{described['processor']}, torch {described['torch']}, {torch.get_num_threads()} threads, {described['date']}"
    )
    if args.json:
        args.json.write_text(json.dumps({"environment": described, "rows": rows, "resnet18_call_us": calls}, indent=1))
    if args.plot:
        plot(rows, args.plot, f"SGD + EMA + past weights, {described.get('gpu') or described['processor']}")


if __name__ == "__main__":
    main()
