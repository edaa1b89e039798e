"""A short run for compute-sanitizer: every kernel once, over sizes around a pack and a chunk, aligned and not.

compute-sanitizer --tool memcheck python -m tests.gpu.sanitize    # all cases; with a 5 behind it, every fifth
"""

from __future__ import annotations

import sys

import torch

from layerpipe_kernels import ops
from layerpipe_kernels.options import StepArguments
from tests.kernels import steps
from tests.kernels.steps import Case


def main() -> None:
    sizes = (0, 1, 7, 8, 9, 8191, 8192, 8193, 40_000)
    done = 0
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    for covering in steps.COVERING[::every]:
        for offset in (0, 1):
            case = Case(
                covering.rule, covering.dtype, covering.grad, covering.ema, covering.emas, covering.past,
                covering.master, counts=True, offset=offset, sizes=sizes, device="cuda",
            )  # fmt: skip
            arrays, grads = case.make()
            clock = torch.tensor(1, device="cuda")
            steps.run(
                case.rule, arrays, grads, "cuda", case.options(), case.design(delay=3), StepArguments(clock=clock)
            )
            done += 1
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for offset in (0, 1):
            weight = torch.randn(40_001, device="cuda").to(dtype)[offset:]
            term = torch.randn(40_001, device="cuda")[offset:]
            ops.reconstruct(weight, [term, term.bfloat16()], [1.0, 2.0], backend="cuda")
            ops.ema_update_([term.clone(), term.bfloat16()], weight, [0.5, 0.9], backend="cuda")
    torch.cuda.synchronize()
    print(f"{done} steps")


if __name__ == "__main__":
    main()
