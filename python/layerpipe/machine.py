"""The machine that measurements are made on."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """The processor's name as the system gives it, such as ``AMD EPYC``; at least its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
