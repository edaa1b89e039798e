"""The fused step beside the same work done by torch in separate passes, in one run.

    python -m bench.step                        # this machine's CPU
    python -m bench.step --device cuda --json step.json --plot step.png

Every variant makes an optimizer step, averages the updates and writes the past weights of the same parameters. Rounds
interleave the variants, so that a change of the machine's speed meets all of them; ratios are formed within a round and
the table shows medians. *GB/s* is by declared bytes (:mod:`layerpipe_kernels.traffic`). On a CUDA device every variant
works on as many buffers in turn as are twice the L2 cache; *of copy* relates GB/s to ``torch.Tensor.copy_`` of as many
random bytes in the same round (a CPU's copy may read what it overwrites, so there it is left out), and *call* is the
Python time of ``step()`` until it returns (below the table for ResNet-18's list with one element per tensor).

A variant is timed only after its results have been compared with a float64 reference.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from bench import environment
from bench.parameter_lists import NETWORKS
from bench.report import console, save
from bench.step_report import plot, table
from bench.step_timing import measure, overhead
from bench.step_variants import Case
from layerpipe_kernels import native

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def sizes(largest: float) -> list[int]:
    """Bytes of parameters, from 10^4 on in steps of about 10."""
    return [10**k for k in range(4, 10) if 10**k <= largest]


def fits(case: Case) -> bool:
    """Whether all variants of a case have room beside each other."""
    needed = case.numel * 4 * 6 * 4
    if case.device == "cuda":
        gc.collect()  # what is left of the case before
        torch.cuda.empty_cache()
        return needed < 0.9 * torch.cuda.mem_get_info()[0]
    try:
        available = int(
            next(x for x in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in x).split()[1]
        )
    except (OSError, StopIteration):
        return True
    return needed < 0.9 * available * 1024


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
    out = console(132)
    rows: list[dict[str, Any]] = []
    with Progress(console=out, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.name}, {case.optimizer}, {case.dtype}")
            try:
                measured = measure(case, args.rounds, not args.no_compile, args.seconds) if fits(case) else []
            except torch.OutOfMemoryError:  # what the cases after it need is less
                measured = []
            if measured:
                rows += measured
                save(args.json, rows=rows)  # for whoever stops it here
            else:
                out.print(f"{case.name}, {case.optimizer}: left out, not enough memory for all variants")
            progress.advance(task)
    calls = overhead(Case("resnet18", tuple(NETWORKS["resnet18"]), "sgd", args.device))
    described = environment.describe()
    out.print(table(rows))
    out.print(
        "\nstep() of ResNet-18's 62 tensors, one element each: "
        + ", ".join(f"{k} {v:.1f} µs" for k, v in calls.items())
    )
    out.print(
        f"{described['processor']}, torch {described['torch']}, {torch.get_num_threads()} threads, {described['date']}"
    )
    save(args.json, rows=rows, resnet18_call_us=calls)
    if args.plot:
        plot(rows, args.plot, f"SGD + EMA + past weights, {described.get('gpu') or described['processor']}")


if __name__ == "__main__":
    main()
