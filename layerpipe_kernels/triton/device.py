"""Devices and dtypes that Triton's kernels can run on."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
WARPS = 8
#: No multiply-add is fused but those that are written, and loads are not staged through shared memory.
COMPILER: dict[str, Any] = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}
if torch.version.hip is None:
    COMPILER["maxnreg"] = 128  # two programs per multiprocessor; some versions of ptxas would take more


def check_device(kernel: Any, device: torch.device) -> None:
    """Refuse the CPU, where a kernel runs in Triton's interpreter alone."""
    if device.type == "cpu" and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            "the Triton backend runs on GPUs; for tensors on the CPU use backend='cpp' or 'reference', or, for tests "
            "only, set TRITON_INTERPRET=1 before the first import"
        )


def check_dtype(what: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(
            f"the Triton backend takes {what} in {', '.join(map(str, DTYPES))}, not {dtype}; use backend='reference', "
            "or 'cuda' or 'cpp' where they are built"
        )


def elements_per_piece(*dtypes: torch.dtype) -> int:
    """Returns how many elements of the narrowest dtype are 16 bytes."""
    return 16 // min(dtype.itemsize for dtype in dtypes)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; this makes ``device`` the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def signed(seed: int) -> int:
    """The low 32 bits as a signed number: of one type whatever its value, so that no seed causes a compilation."""
    return ((seed + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
