"""Choice of the implementation of a step: CUDA, Triton, C++ on the CPU, or plain torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from typing import Any

import torch

_C: Any = None
_import_error: ImportError | None = None
try:
    _C = importlib.import_module("layerpipe_kernels._C")
except ImportError as error:  # built without a compiler: everything still works, in plain torch
    _import_error = error

BACKENDS = ("cuda", "triton", "cpp", "reference")

_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU_DTYPES = (*_GPU_DTYPES, torch.float64)

#: How to get what a forced backend lacks.
_MISSING = {
    "cuda": "this installation has no CUDA kernels ({why}); put nvcc on the PATH and reinstall layerpipe, or use "
    "backend='triton'",
    "triton": "Triton is not installed; pip install triton",
    "cpp": "this installation has no C++ extension ({why}); install a C++ compiler (g++ or clang++) and reinstall "
    "layerpipe",
}
_TAKES = {
    "cuda": "float32, bfloat16 and float16 on a CUDA device",
    "triton": "float32, bfloat16 and float16 on a GPU (on the CPU with TRITON_INTERPRET=1)",
    "cpp": "float32, float64, bfloat16 and float16 on the CPU",
}


def extension() -> Any:
    """Returns the compiled module, or ``None`` when the package was built without one."""
    return _C


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _built(backend: str) -> bool:
    if backend == "cuda":
        return _C is not None and hasattr(_C, "CUDA")
    return _has_triton() if backend == "triton" else backend == "reference" or _C is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _takes(backend: str, tensor: torch.Tensor) -> bool:
    if backend == "reference":
        return True
    if backend == "cpp":
        return tensor.is_cpu and tensor.dtype in _CPU_DTYPES
    on_device = tensor.is_cuda or (backend == "triton" and (_interpreted() if tensor.is_cpu else not tensor.is_meta))
    return on_device and tensor.dtype in _GPU_DTYPES


@functools.cache
def _has_code_for(device: torch.device) -> bool:
    """Returns whether the CUDA kernels were built for this GPU: as its generation's machine code, or as older PTX."""
    gpu = torch.cuda.get_device_capability(device)
    for name in _C.build_info()["cuda_architectures"].split():
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual|)", name)
        if found is None:  # "native", "all": the build knew what it did
            return True
        built = int(found[1]), int(found[2])
        if found[3] == "a":  # for this very GPU
            fits = built == gpu
        elif found[3] == "f" or found[4] == "-real":  # for its generation
            fits = built[0] == gpu[0] and built <= gpu
        else:  # with PTX
            fits = built <= gpu
        if fits:
            return True
    return False


def available_backends() -> tuple[str, ...]:
    """Returns the names of the backends that can run here, the preferred one first."""
    runs = {
        "cuda": torch.cuda.is_available(),
        "triton": torch.cuda.is_available() or _interpreted(),
        "cpp": True,
        "reference": True,
    }
    return tuple(backend for backend in BACKENDS if _built(backend) and runs[backend])


def build_info() -> dict[str, Any]:
    """Returns how the extension was built and which instruction set it picked on this machine."""
    info: dict[str, Any] = {"extension": _C is not None, "backends": list(available_backends())}
    if _C is not None:
        info.update(_C.build_info())
    else:
        info["reason"] = str(_import_error)
    return info


def choose(tensor: torch.Tensor, requested: str = "auto") -> str:
    """Returns the name of the backend for weights of this device and dtype.

    ``requested="auto"`` follows ``LAYERPIPE_BACKEND`` where it is set. Otherwise it takes, on a CUDA device, the CUDA
    kernels if they were built for it, else Triton's, and on the CPU the C++ ones; whatever these cannot take is done in
    plain torch.

    Raises:
        ValueError: an unknown backend, or one that cannot take this tensor.
        RuntimeError: a backend is asked for by name and is not there, or not for this GPU.
    """
    source = "backend"
    if requested == "auto":
        requested = os.environ.get("LAYERPIPE_BACKEND") or "auto"
        if requested == "auto":
            if tensor.is_cpu:
                return "cpp" if _C is not None and tensor.dtype in _CPU_DTYPES else "reference"
            fitting = (b for b in BACKENDS if _built(b) and _takes(b, tensor))
            return next(b for b in fitting if b != "cuda" or _has_code_for(tensor.device))
        source = "LAYERPIPE_BACKEND"
    if requested not in BACKENDS:
        raise ValueError(f"{source}={requested!r} is unknown; there are: auto, {', '.join(BACKENDS)}")
    if not _built(requested):
        why = _import_error if _C is None else "it was built without nvcc"
        raise RuntimeError(f"{source}={requested!r}, but " + _MISSING[requested].format(why=why))
    if not _takes(requested, tensor):
        raise ValueError(f"{source}={requested!r} takes {_TAKES[requested]}, not {tensor.dtype} on {tensor.device}")
    if requested == "cuda" and not _has_code_for(tensor.device):
        raise RuntimeError(
            f"{source}='cuda', but the CUDA kernels were built for {_C.build_info()['cuda_architectures']} and "
            f"{torch.cuda.get_device_name(tensor.device)} is none of these: reinstall layerpipe with "
            "LAYERPIPE_CUDA_ARCHS set to its compute capability, or use backend='triton'"
        )
    return requested
