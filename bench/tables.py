"""Writes the tables of the documents from the measurements in bench/results.

    python -m bench.tables           # all documents
    python -m bench.tables --check   # says which tables are not what the measurements give; nothing is written

A table stands between two comments, the first of which says what makes it::

    <!-- table: study study-baselines.json mlp -->
    <!-- end of table -->
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.report import deviation
from layerpipe.study import runner, tables
from layerpipe.study.results import results
from layerpipe.study.statistics import Mean

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MARKED = re.compile(r"(<!-- table: (?P<call>[^>]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return tables.Table("", columns, rows).markdown()


def read(name: str) -> Any:
    """Returns the content of a file, or of one of its runs: ``FILE#RUN``."""
    file, _, run = name.partition("#")
    content = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return content["runs"][run] if run else content


def study(name: str, model: str) -> str:
    """Quality of every row of a study on one network."""
    spec, found, _ = runner.load(RESULTS / name)
    return tables.quality_table(model, [r for r in results(spec, found) if r.row.model == model]).markdown()


def networks(name: str) -> str:
    """Of a study with several networks: a line for each, a column for each row."""
    spec, found, _ = runner.load(RESULTS / name)
    made = results(spec, found)
    heads = list(dict.fromkeys(_head(r.row.optimizer, r.row.method if r.row.delay else "undelayed") for r in made))
    rows = []
    for model in dict.fromkeys(r.row.model for r in made):
        cells = {
            _head(r.row.optimizer, r.row.method if r.row.delay else "undelayed"): r
            for r in made
            if r.row.model == model
        }
        digits = 3 if tables.measure_of(model) is tables.LOSS else 1
        texts = [cells[h].mean.text(digits) if h in cells and cells[h].mean else "diverged" for h in heads]  # type: ignore[union-attr]
        rows.append((f"{model}, {tables.measure_of(model).unit}", *texts))
    return markdown(("network", *heads), rows)


def stages(name: str) -> str:
    """Of a study of one network at several depths: a line for each number of stages, a column for each method."""
    spec, found, _ = runner.load(RESULTS / name)
    made = [r for r in results(spec, found) if r.row.delay and r.mean is not None]
    heads = list(dict.fromkeys(_head(r.row.optimizer, r.row.method) for r in made))
    rows = []
    for count in sorted({r.row.stages for r in made}):
        cells = {_head(r.row.optimizer, r.row.method): r for r in made if r.row.stages == count}
        delay = max(r.row.delay for r in cells.values())
        texts = [cells[h].mean.text(1) for h in heads]  # type: ignore[union-attr]
        rows.append((f"{count}", f"{delay:g} … 0", *texts))
    return markdown(("stages", "delays without microbatches", *heads), rows)


def _head(optimizer: str, method: str) -> str:
    return method if method.startswith("ours") else f"{optimizer}, {method}"


def errors(name: str) -> str:
    """Error of past weights in a study, by kind and delay, beside theory."""
    spec, found, _ = runner.load(RESULTS / name)
    return tables.error_table(results(spec, found)).markdown()


def memory(name: str) -> str:
    """What past weights take, by kind."""
    spec, found, _ = runner.load(RESULTS / name)
    return tables.memory_table(results(spec, found), Path("data")).markdown()


def methods() -> str:
    """All methods with formula and source."""
    rows = [(f"`{name}`", m.title, m.formula, m.source) for name, m in tables.METHODS.items()]
    return markdown(("name", "method", "formula", "source"), rows)


def hours(name: str) -> str:
    """How long a study's trainings took, by network."""
    _, found, _ = runner.load(RESULTS / name)
    seconds: dict[str, list[float]] = {}
    for trial, outcome in found.items():
        seconds.setdefault(trial.row.model, []).append(1000 * outcome.seconds / trial.row.steps)
    rows = [(model, f"{len(each)}", f"{statistics.median(each):.1f}") for model, each in seconds.items()]
    return markdown(("network", "trainings", "milliseconds of a core per minibatch, median"), rows)


def staleness(name: str) -> str:
    """Seeds of ``bench.staleness`` by what differs between them."""
    runs: dict[tuple[Any, ...], list[float]] = {}
    for run in read(name)["runs"]:
        o = run["options"]
        key = (0 if o["schedule"] == "sequential" else o["stages"], o["microbatches"], max(run["delays"]), o["steps"])
        runs.setdefault(key, []).append(run["quality"])
    rows = [
        (str(stages or "–"), str(m), f"{n:g} … 0" if n else "0", str(steps), str(len(each)), deviation(each, ".3f"))
        for (stages, m, n, steps), each in runs.items()
    ]
    return markdown(("stages", "microbatches per update", "delays", "minibatches", "seeds", "loss ± deviation"), rows)


def claim(name: str) -> str:
    """LayerPipe's schedule beside PipeDream's: the mean and the most over its 7 to 9 processors."""
    rows = []
    for network, found in read(name)["results"].items():
        speedups = [row["speedup"] for row in found if 7 <= row["processors"] <= 9]
        rows.append((network, f"{100 * (statistics.fmean(speedups) - 1):.0f} %", f"{100 * (max(speedups) - 1):.0f} %"))
    return markdown(("network", "mean over 7, 8, 9 processors", "most"), rows)


def accuracy(name: str) -> str:
    """``layerpipe compare``: test accuracy, error of the past weights in the worst stage, and bytes."""
    rows = []
    for kind, found in read(name)["results"].items():
        worst = [max((e for e in errors if e is not None), default=0.0) for errors in found["past_weight_error"]]
        rows.append(
            (kind, Mean.of(found["test_accuracy"]).text(1), f"{statistics.fmean(worst):.4f}" if any(worst) else "0",
             f"{found['kept_bytes'] / 1e6:.2f} MB")
        )  # fmt: skip
    return markdown(("past", "test accuracy ± standard error, %", "worst error", "weights and past"), rows)


MAKERS: dict[str, Callable[..., str]] = {
    maker.__name__: maker
    for maker in (study, networks, stages, errors, memory, methods, hours, staleness, claim, accuracy)
}  # fmt: skip


def written(text: str) -> str:
    """A document with its tables made anew.

    Raises:
        KeyError: a table of an unknown kind.
    """

    def table(match: re.Match[str]) -> str:
        kind, *arguments = match["call"].split()
        return f"{match[1]}{MAKERS[kind](*arguments)}\n{match[3]}"

    return MARKED.sub(table, text)


def documents() -> list[Path]:
    return sorted((ROOT / "docs").glob("*.md"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a table differs")
    given = parser.parse_args()
    changed = [(path, new) for path in documents() if (new := written(text := path.read_text("utf-8"))) != text]
    for path, new in changed:
        print(f"{path.relative_to(ROOT)}: {'differs from its measurements' if given.check else 'written'}")
        if not given.check:
            path.write_text(new, encoding="utf-8")
    sys.exit(given.check and bool(changed))


if __name__ == "__main__":
    main()
