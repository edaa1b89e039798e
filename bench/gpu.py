"""Everything that only a GPU can show, in two calls of a few minutes: tests first, then what is measured.

    python -m bench.gpu --call 1            # at most 440 s
    python -m bench.gpu --call 2            # at most 180 s, on the same machine
    python -m bench.gpu --call 1 --dry-run  # on a machine without a GPU: each step as far as the CPU takes it

Each step is a process with a time limit of its own, which is cut to what is left of the call's. ``gpu.json`` is written
after every step, whatever becomes of the next; all output is in ``gpu.log``; the table at the end says which steps
passed and what counts most. A compiled module that was built beforehand is taken from ``--prebuilt``: ``_C.*.so`` for
this Python and GPU, and a second one below ``variant/`` to be compared with it. Without one it is built here, in the
call's own time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.report import save

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {1: 440, 2: 180}
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))


@dataclasses.dataclass
class Step:
    name: str
    seconds: int  # its limit
    command: list[str]
    needs: str | None = None  # a program on the PATH
    kernels: Path | None = None  # another compiled module for this step


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def pytest(*arguments: str) -> list[str]:
    return python("-m", "pytest", "-q", "--tb=short", "-o", "faulthandler_timeout=60", *arguments)


def bench(module: str, *arguments: str) -> list[str]:
    return python("-m", f"bench.{module}", *arguments)


def first_call(out: Path, variant: Path | None, dry: bool) -> list[Step]:
    workers = ["-n", "14"] if shutil.which("nproc") and not dry and (os.cpu_count() or 1) > 4 else []
    late = ["--ignore=tests/gpu/test_waits_gpu.py", "--ignore=tests/gpu/test_large_gpu.py"]
    on = ["--device", "cpu", "--max-bytes", "2e4"] if dry else ["--device", "cuda", "--max-bytes", "1"]
    networks = "" if dry else "resnet18,gpt2,layer450m"
    quick = ["--rounds", "3", "--seconds", "0.02"]
    steps = [
        Step("check", 25, bench("gpu_check")),
        Step("tests", 120, pytest(*workers, *late, "tests/gpu")),
        Step("step", 50, bench("step", *on, *quick, "--networks", networks, "--json", str(out / "step.json"))),
    ]
    for name, module in (("this", None), ("variant", variant)):
        for chunk in ("4096", "8192"):
            if module is not None or name == "this":
                file = str(out / f"chunks-{name}-{chunk}.part.json")
                only = ["--no-compile", "--networks", "" if dry else "layer450m", "--chunk", chunk, "--json", file]
                steps.append(Step(f"chunks {name} {chunk}", 12, bench("step", *on, *quick, *only), kernels=module))
    executors = ["--rounds", "3", "--seconds", "0.3", "--json", str(out / "executors.json")]
    variants = ["plain eager", "plain graph", "streams", "graphs", "graphs materialized"]
    on_gpu = ["--batch", "32", "256", "--size", "32", "--variants", *variants]
    on_cpu = ["--device", "cpu", "--batch", "2", "--network", "resnet18:4"]
    steps.append(Step("executors", 75, bench("executors", *executors, *(on_cpu if dry else on_gpu))))
    counters = [
        "--metrics",
        "gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ]
    profiler = [
        "ncu",
        "--clock-control",
        "none",
        "--csv",
        *counters,
        "--kernel-name",
        "regex:step_kernel|tensor_kernel",
    ]
    steps.append(Step("ncu", 40, [*profiler, *bench("gpu_check", "--kernels")], "ncu"))
    memory = ["compute-sanitizer", "--error-exitcode", "9", "--tool", "memcheck", "--report-api-errors", "no"]
    steps.append(Step("memcheck", 45, [*memory, *python("-m", "tests.gpu.sanitize", "5")], "compute-sanitizer"))
    return steps


def second_call(out: Path, variant: Path | None, dry: bool) -> list[Step]:
    executors = ["--rounds", "3", "--seconds", "0.3", "--json", str(out / "executors-compiled.json")]
    on_gpu = ["--batch", "32", "256", "--variants", "plain compiled graph", "plain graph", "graphs"]
    on_cpu = ["--device", "cpu", "--batch", "2", "--network", "resnet18:4", "--variants", "plain eager"]
    return [
        Step("failed before", 40, pytest("--last-failed", "--last-failed-no-failures", "none", "tests/gpu")),
        Step("waits", 40, pytest("tests/gpu/test_waits_gpu.py")),
        Step("compiled", 40, bench("executors", *executors, *(on_cpu if dry else on_gpu))),
        Step("large", 30, pytest("tests/gpu/test_large_gpu.py")),
    ]


def run(step: Step, limit: float, log: Path) -> dict[str, Any]:
    """What became of a step: ``status`` is that of its process, or why it was left out."""
    if step.needs and not shutil.which(step.needs):
        return {"status": f"no {step.needs}", "seconds": 0.0}
    if limit < 5:
        return {"status": "no time left", "seconds": 0.0}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as copied, log.open("a") as file:
        path = [str(ROOT), str(ROOT / "python")]
        if step.kernels is not None:
            package = Path(copied) / "layerpipe_kernels"
            shutil.copytree(ROOT / "layerpipe_kernels", package, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
            shutil.copy(step.kernels, package / f"_C{SUFFIX}")
            path.insert(0, copied)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
        print(f"\n==> {step.name}: {' '.join(step.command)}", file=file, flush=True)
        start = file.tell()
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        status: int | str
        try:
            status = process.wait(min(limit, step.seconds))
        except subprocess.TimeoutExpired:
            status = "out of time"
            os.killpg(process.pid, signal.SIGINT)  # pytest then still prints the failures that it has seen
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    said = log.read_bytes()[start:].decode(errors="replace").splitlines()
    return {"status": status, "seconds": round(time.monotonic() - began, 1), "said": said[-15:]}


def module_built(prebuilt: Path, log: Path) -> Path | None:
    """Puts the module built beforehand into the package, or builds it there. Returns the variant, if there is one."""
    ours = sorted(prebuilt.glob(f"_C{SUFFIX}"))
    if ours:
        shutil.copy(ours[0], ROOT / "layerpipe_kernels" / ours[0].name)
        print(f"kernels: {ours[0]}")
    elif torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        os.environ["LAYERPIPE_CUDA_ARCHS"] = f"{major}{minor}"
        built = run(Step("build", 240, python("setup.py", "-q", "build_ext", "--inplace")), 240, log)
        print(f"kernels: built here in {built['seconds']} s, {built['status']}")
    return next(iter(sorted((prebuilt / "variant").glob(f"_C{SUFFIX}"))), None)


def rows_of(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text())[key]
    except (OSError, KeyError, ValueError):
        return []
    return found


def summary(out: Path, steps: dict[str, Any]) -> list[str]:
    """What counts, in this order: the tests, the share of a copy, the ratios, the executors."""
    lines = [f"{name:24} {found['status']!s:>12} {found['seconds']:6.1f} s" for name, found in steps.items()]
    for row in rows_of(out / "step.json", "rows"):
        share = "" if row["of_copy"] is None else f"{100 * row['of_copy']:5.0f} % of copy"
        label = f"{row['case']}, {row['optimizer']}, {row['dtype']}"
        lines.append(f"{label:34} {row['variant']:32} {row['ms']:9.3f} ms {row['times_ours']:6.2f} x {share}")
    for file in ("executors.json", "executors-compiled.json"):
        for result in rows_of(out / file, "results"):
            for name, ratios in result["ratio"].items():
                peak = result["peak_bytes"][name] / 2**20
                rate = statistics.median(ratios)
                lines.append(f"batch {result['case']['batch']:<28} {name:32} {rate:9.2f} x best plain {peak:8.0f} MiB")
    return lines


def merge_chunks(out: Path) -> None:
    """The variants' results as one file."""
    parts = sorted(out.glob("chunks-*.part.json"))
    if parts:
        rows = {part.name.removesuffix(".part.json"): rows_of(part, "rows") for part in parts}
        save(out / "chunks.json", rows=rows)
        for part in parts:
            part.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", type=int, choices=(1, 2), default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/gpu", help="at most eight files")
    parser.add_argument("--prebuilt", type=Path, default=ROOT / "build/gpu", help="default: %(default)s")
    parser.add_argument("--limit", type=float, help="seconds (default: 440, and 180 for the second call)")
    parser.add_argument("--steps", nargs="+", help="only these")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    given = parser.parse_args()
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --dry-run does without one")
    began = time.monotonic()
    given.out.mkdir(parents=True, exist_ok=True)
    log = given.out / "gpu.log"
    variant = module_built(given.prebuilt, log)
    made: Callable[..., list[Step]] = first_call if given.call == 1 else second_call
    results: dict[str, Any] = {}
    for step in made(given.out, variant, given.dry_run):
        if given.steps and step.name not in given.steps:
            continue
        left = (given.limit or LIMITS[given.call]) - (time.monotonic() - began) - 5
        results[step.name] = run(step, left, log)
        print(f"{step.name}: {results[step.name]['status']}, {results[step.name]['seconds']} s", flush=True)
        save(given.out / f"gpu-{given.call}.json", steps=results)
    merge_chunks(given.out)
    print("\n".join(summary(given.out, results)))
    return sum(
        found["status"] not in (0, 5) and not str(found["status"]).startswith("no ") for found in results.values()
    )


if __name__ == "__main__":
    sys.exit(main())
