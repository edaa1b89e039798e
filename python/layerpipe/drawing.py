"""Figures, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new_figure(**kwargs: Any) -> tuple[Any, Any]:
    """A figure and its axes, as :func:`matplotlib.pyplot.subplots` gives them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(**kwargs, layout="constrained")


def save(figure: Any, path: Path) -> Path:
    """Writes a figure and forgets it."""
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
