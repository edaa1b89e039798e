"""Which implementation runs a step: the C++ extension, or plain torch."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

_C: Any = None
_import_error: ImportError | None = None
try:
    _C = importlib.import_module("layerpipe_kernels._C")
except ImportError as error:  # built without a compiler: everything still works, in plain torch
    _import_error = error

CPP_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
BACKENDS = ("cpp", "reference")
RECONSTRUCT: dict[torch.dtype, Any] = {
    dtype: getattr(_C, f"reconstruct_{name}") for dtype, name in CPP_DTYPES.items() if _C is not None
}


def extension() -> Any:
    """The compiled module, or ``None`` when the package was built without one."""
    return _C


def available_backends() -> tuple[str, ...]:
    """Backends that can run here, the preferred one first."""
    return BACKENDS if _C is not None else ("reference",)


def build_info() -> dict[str, Any]:
    """How the extension was built and which instruction set it picked on this machine."""
    info: dict[str, Any] = {"extension": _C is not None, "backends": list(available_backends())}
    if _C is not None:
        info.update(_C.build_info())
    else:
        info["reason"] = str(_import_error)
    return info


def choose(tensor: torch.Tensor, requested: str = "auto") -> str:
    """The backend for a tensor of this device and dtype.

    ``requested="auto"`` follows ``LAYERPIPE_BACKEND`` where it is set, and otherwise takes the C++ ops for float32 and
    float64 on the CPU and plain torch for everything else.

    Raises:
        ValueError: an unknown backend, or one that cannot take this tensor.
        RuntimeError: the C++ backend is asked for by name and was not built.
    """
    if requested == "auto" and "LAYERPIPE_BACKEND" not in os.environ:
        return "cpp" if tensor.dtype in CPP_DTYPES and _C is not None and tensor.is_cpu else "reference"
    source = "backend"
    if requested == "auto" and (forced := os.environ.get("LAYERPIPE_BACKEND")):
        requested, source = forced, "LAYERPIPE_BACKEND"
    cpp_takes = tensor.device.type == "cpu" and tensor.dtype in CPP_DTYPES
    if requested == "auto":
        return "cpp" if _C is not None and cpp_takes else "reference"
    if requested not in BACKENDS:
        raise ValueError(f"{source}={requested!r} is unknown; there are: auto, {', '.join(BACKENDS)}")
    if requested == "cpp":
        if _C is None:
            raise RuntimeError(
                f"{source}='cpp', but this installation has no C++ extension ({_import_error}); install a C++ "
                "compiler (g++ or clang++) and reinstall layerpipe"
            )
        if not cpp_takes:
            raise ValueError(
                f"{source}='cpp' takes float32 and float64 on the CPU, not {tensor.dtype} on {tensor.device}"
            )
    return requested
