"""What a measurement was made on; stands beside every figure."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import layerpipe_kernels
from layerpipe.machine import processor


def describe() -> dict[str, Any]:
    """Processor, versions, date and the command that was run."""
    return {
        "processor": processor(),
        **_gpu(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": layerpipe_kernels.build_info(),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
    }


@functools.cache
def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    driver = "unknown"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.check_output(query, text=True).strip()
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem
