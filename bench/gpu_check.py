"""First contact with a GPU: what was built, whether a step is right, how fast the memory is.

python -m bench.gpu_check            # on a machine without a GPU: the same on the CPU
python -m bench.gpu_check --kernels  # each kernel a few times, for a profiler
"""

from __future__ import annotations

import argparse
import statistics

import torch

import layerpipe_kernels as lk
from bench.step_timing import Clock
from bench.step_variants import Case, Ours, verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check() -> None:
    """Raises where a step differs from the float64 reference."""
    print(lk.build_info())
    for backend in lk.available_backends():
        if backend == "reference" or (backend == "cpp") != (DEVICE == "cpu"):
            continue
        for optimizer in ("sgd", "adamw"):
            for dtype in (torch.float32, torch.bfloat16):
                verify(Ours(backend, Case("check", ((1000, 1001), (7,)), optimizer, DEVICE, dtype)))
                print(f"{backend} {optimizer} {dtype}: as the reference")


def copy_speed(size: int) -> float:
    """Bytes per second, read and written, of a copy."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=DEVICE)
    target, clock = torch.empty_like(source), Clock(DEVICE)
    clock.seconds(lambda: target.copy_(source), 3)
    return 2 * size / statistics.median(clock.seconds(lambda: target.copy_(source), 5)[0] for _ in range(5))


def kernels(numel: int) -> None:
    for backend in lk.available_backends():
        if backend == "reference" or (backend == "cpp") != (DEVICE == "cpu"):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            ours = Ours(backend, Case("kernels", ((numel,),), "sgd", DEVICE, dtype))
            for _ in range(3):
                ours.step()
        weight, terms = torch.randn(numel, device=DEVICE), [torch.randn(numel, device=DEVICE) for _ in range(2)]
        lk.ops.reconstruct(weight, terms, [0.5, 0.5], backend=backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", action="store_true")
    if parser.parse_args().kernels:
        return kernels(1 << 26 if DEVICE == "cuda" else 1 << 12)
    check()
    print(f"copy: {copy_speed(1 << 30 if DEVICE == 'cuda' else 1 << 20) / 1e9:.0f} GB/s")


if __name__ == "__main__":
    main()
