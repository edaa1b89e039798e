"""The table and the roofline of ``bench.step``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from layerpipe_kernels.traffic import Traffic


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="Step + EMA + past weights", title_justify="left", show_edge=False)
    for name in ("parameters", "variant", "ms", "GB/s", "of copy", "× ours (quartiles)", "launches", "call µs"):
        made.add_column(name, justify="left" if name in ("parameters", "variant") else "right")
    last = None
    for row in rows:
        key = (row["case"], row["optimizer"], row["dtype"])
        if last not in (None, key):
            made.add_section()
        low, high = row["times_ours_quartiles"]
        made.add_row(
            "" if key == last else f"{row['case']}, {row['optimizer']}, {row['dtype']}",
            row["variant"],
            f"{row['ms']:.3g}",
            f"{row['gb_per_s']:.1f}",
            "–" if row["of_copy"] is None else f"{100 * row['of_copy']:.0f} %",
            f"{row['times_ours']:.2f} ({low:.2f}–{high:.2f})",
            "–" if row["launches"] is None else str(row["launches"]),
            "–" if row["call_us"] is None else f"{row['call_us']:.1f}",
        )
        last = key
    return made


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """A roofline: bytes per second over the size, under the line that a copy reaches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    swept = [r for r in rows if r["tensors"] == 1 and r["dtype"] == "float32" and r["optimizer"] == "sgd"]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for variant in dict.fromkeys(r["variant"] for r in swept):
        own = [r for r in swept if r["variant"] == variant]
        # The work is the same for all: bytes that one pass needs, over the time each took.
        one = Traffic().one_pass()
        axes.plot(
            [4 * r["parameters"] for r in own],
            [one * r["parameters"] / r["ms"] / 1e6 for r in own],
            "o-",
            label=variant,
        )
    first = swept[0]["variant"]
    copy = [r for r in swept if r["variant"] == first]
    axes.plot(
        [4 * r["parameters"] for r in copy], [r["copy_gb_per_s"] for r in copy], "k--", label="copy of as many bytes"
    )
    axes.set(xscale="log", yscale="log", xlabel="bytes of float32 parameters", title=title)
    axes.set_ylabel("GB/s, counting the bytes of one pass")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
