"""How benches print and keep what they measured."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import environment


def console(width: int = 100) -> Console:
    """As wide as the terminal; ``width`` columns where the output is none, so that a kept table is not wrapped."""
    return Console(width=None if sys.stdout.isatty() else width)


def spread(values: Sequence[float], form: str) -> str:
    """``1.02 (0.99–1.05)``: median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}}–{high:{form}})"


def deviation(values: Sequence[float], form: str) -> str:
    """``1.02 ± 0.03``: mean and standard deviation, of a single value only itself."""
    around = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{around}"


def summary(values: Sequence[float]) -> dict[str, Any]:
    """For machines: all values, and what :func:`spread` shows of them."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartiles": [low, high], "values": list(values)}


def save(path: Path | None, **results: Any) -> None:
    """Writes results and the environment as JSON; nothing without a path.

    ``FILE#NAME`` adds them as ``runs[NAME]`` to the file: one file per bench and machine.
    """
    if path is None:
        return
    name, _, run = path.name.partition("#")
    path = path.with_name(name)
    content: dict[str, Any] = {"environment": environment.describe(), **results}
    if run:
        kept = json.loads(path.read_text())["runs"] if path.exists() else {}
        content = {"runs": {**kept, run: content}}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")  # so that the file is whole whenever the process dies
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
