"""The five rows that docs/measured.md begins with, each with a plot, made of what bench/results holds.

python -m bench.headlines --write
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import deviation, spread

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
PAGE = DOCS / "measured.md"
BEGIN, END = "<!-- python -m bench.headlines --write -->\n", "<!-- end -->\n"


class Bar(NamedTuple):
    label: str
    values: list[float]


class Headline(NamedTuple):
    """A row of the table, and a plot of medians with quartiles, or of means with standard deviations."""

    name: str  # the plot's file
    what: str
    says: str
    unit: str
    bars: list[Bar]
    means: bool = False


def read(file: str, run: str | None = None) -> Any:
    content = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return content if run is None else content["runs"][run]


def loss() -> Headline:
    runs = [run for run in read("staleness-seeds-xeon.json")["runs"] if run["options"]["steps"] == 600]

    def qualities(**options: Any) -> list[float]:
        return [run["quality"] for run in runs if options.items() <= run["options"].items()]

    alone = qualities(schedule="sequential")
    four, eight = (qualities(stages=8, schedule="1f1b", microbatches=m) for m in (4, 8))
    return Headline(
        "loss",
        "A GPT in eight stages, 600 minibatches, SOAP, three seeds, simulated ([more](delay.md))",
        f"{deviation(four, '.3f')} nats per byte with four microbatches per update, "
        f"{deviation(eight, '.3f')} with eight; "
        f"without a delay {deviation(alone, '.3f')}",
        "nats per byte",
        [Bar("no delay", alone), Bar("8 stages, 4 microbatches", four), Bar("8 stages, 8 microbatches", eight)],
        means=True,
    )


def accuracy() -> Headline:
    stored = read("compare-epyc.json", "10-stages-5000-stash")["results"]
    others = read("compare-epyc.json", "10-stages-5000-blend-latest")["results"]
    bars = [
        Bar("no delay", stored["sequential"]["test_accuracy"]),
        *(Bar(f"past={name}", {**stored, **others}[name]["test_accuracy"]) for name in ("stash", "blend", "latest")),
    ]
    found = ", ".join(f"{bar.label} {deviation(bar.values, '.1f')} %" for bar in bars)
    return Headline(
        "accuracy",
        "ResNet-18 in ten stages, delays up to 18, 5000 minibatches, three seeds ([more](#accuracy-and-past-weights))",
        found,
        "test accuracy, %",
        bars,
        means=True,
    )


def throughput() -> Headline:
    bars = [
        Bar(_case(result["case"]), result["ratio"])
        for run in ("small", "large")
        for result in read("pipeline-epyc.json", run)["results"]
        if result["code"] == "eager"
    ]
    return Headline(
        "throughput",
        "Two threads beside the best plain loop on two cores ([more](#throughput))",
        "; ".join(f"{bar.label}: {spread(bar.values, '.2f')}" for bar in bars),
        "times the rate of the best plain loop",
        bars,
    )


def pipelining() -> Headline:
    bars = []
    for case, seconds in read("distributed-epyc.json")["seconds"].items():
        ours = seconds["layerpipe lockstep"]
        theirs = {name: _ratios(values, ours) for name, values in seconds.items() if name.startswith("torch")}
        best = min(theirs, key=lambda name: statistics.median(theirs[name]))
        bars.append(Bar(f"{case}: {best.removeprefix('torch ')}", theirs[best]))
    return Headline(
        "pipelining",
        "The best schedule of `torch.distributed.pipelining` beside our threads ([more](#throughput))",
        "; ".join(f"{bar.label} microbatches takes {spread(bar.values, '.2f')} times as long" for bar in bars),
        "times as long as our threads",
        bars,
    )


def step() -> Headline:
    rows = [
        row
        for row in read("step-epyc.json")["rows"]
        if row["variant"].startswith("torch") and "fused" in row["variant"] and row["optimizer"] == "sgd"
    ]
    bars = [
        Bar(row["case"], [row["times_ours_quartiles"][0], row["times_ours"], row["times_ours_quartiles"][1]])
        for row in rows
        if row["parameters"] > 100_000
    ]
    return Headline(
        "step",
        "torch's fused SGD, then averages and past weights in passes of their own, beside the fused step, from 1 MB on "
        "([more](#the-step))",
        "; ".join(f"{bar.label}: {bar.values[1]:.2f}" for bar in bars) + " times as long",
        "times as long as the fused step",
        bars,
    )


def _case(case: dict[str, Any]) -> str:
    return f"{case['network']} {case['width']}, batch {case['batch']}"


def _ratios(values: list[float], ours: list[float]) -> list[float]:
    return [a / b for a, b in zip(values, ours, strict=True)]


def headlines() -> list[Headline]:
    return [loss(), accuracy(), throughput(), pipelining(), step()]


def table(rows: list[Headline]) -> str:
    """As it stands in docs/measured.md."""
    lines = ["| | | |", "| --- | --- | --- |"]
    lines += [f"| {row.what} | {row.says} | ![{row.name}](headlines/{row.name}.png) |" for row in rows]
    return "\n".join(lines) + "\n"


def draw(row: Headline, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(4.6, 0.6 + 0.32 * len(row.bars)), layout="constrained")
    for place, bar in enumerate(reversed(row.bars)):
        if row.means:
            middle = statistics.fmean(bar.values)
            low = high = statistics.stdev(bar.values)
        else:
            least, middle, most = statistics.quantiles(bar.values, n=4) if len(bar.values) > 3 else bar.values
            low, high = middle - least, most - middle
        axes.errorbar(middle, place, xerr=[[low], [high]], fmt="o", capsize=3, color="C0")
    axes.set_yticks(range(len(row.bars)), [bar.label for bar in reversed(row.bars)], fontsize=8)
    axes.set_ylim(-0.6, len(row.bars) - 0.4)
    if row.unit.startswith("times"):
        axes.axvline(1, color="0.6", linewidth=1)
    axes.set_xlabel(row.unit, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def replaced(page: str, rows: list[Headline]) -> str:
    """A page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(rows)}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="draw into docs/headlines, and renew docs/measured.md")
    args = parser.parse_args()
    rows = headlines()
    if not args.write:
        print(table(rows))
        return
    (DOCS / "headlines").mkdir(exist_ok=True)
    for row in rows:
        draw(row, DOCS / "headlines" / f"{row.name}.png")
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
