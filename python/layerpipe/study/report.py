"""A study as one self-contained page, and its tables as Markdown and CSV."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerpipe.study import figures, tables
from layerpipe.study.results import Result, results
from layerpipe.study.runner import Found
from layerpipe.study.spec import Spec
from layerpipe.study.tables import Table

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 0 1rem 3rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
td:last-child { min-width: 12rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; } td:not(:last-child) { white-space: nowrap; }
.note { font-size: .85rem; color: #555; }
svg { width: 100%; height: auto; max-width: 40rem; display: block; margin: 1rem auto; }
pre { overflow-x: auto; background: #f5f5f5; padding: .6rem; font-size: .85rem; }
"""


def write(path: Path, spec: Spec, found: Found, sittings: Sequence[dict[str, Any]], root: Path) -> list[Result]:
    """Writes ``report.html``, ``tables.md`` and a CSV file for each table; returns the rows that are complete."""
    made = results(spec, found)
    sections = _sections(spec, made, found, root)
    body = "".join(
        f"<section>\n<h2>{html.escape(table.title)}</h2>\n{table.html()}{''.join(drawn)}</section>\n"
        for table, drawn in sections
    )
    title = f"What delays cost: {html.escape(spec.name)}"
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"{_summary(spec, made)}{body}{_reproduce(spec, found, sittings)}</body>\n</html>\n"
    )
    (path / "report.html").write_text(page, encoding="utf-8")
    markdown = "\n\n".join(f"## {table.title}\n\n{table.markdown()}" for table, _ in sections)
    (path / "tables.md").write_text(f"# {spec.name}\n\n{markdown}\n", encoding="utf-8")
    for i, (table, _) in enumerate(sections):
        name = "".join(letter if letter.isalnum() else "-" for letter in table.title.lower()).strip("-")
        (path / f"{i + 1:02}-{name}.csv").write_text(table.csv(), encoding="utf-8")
    return made


def _sections(spec: Spec, made: Sequence[Result], found: Found, root: Path) -> list[tuple[Table, list[str]]]:
    """Tables with the figures below them."""
    sections: list[tuple[Table, list[str]]] = []
    trials = [(trial, outcome) for trial, outcome in found.items() if trial.tuning]
    by_network: dict[tuple[str, str], list[Result]] = {}
    for result in made:
        by_network.setdefault((result.row.model, result.row.data), []).append(result)
    for (model, data), rows in by_network.items():
        tuned = [
            (trial.row, trial.lr, outcome.validation)
            for trial, outcome in trials
            if (trial.row.model, trial.row.data) == (model, data)
        ]
        drawn = [figures.curves(rows), figures.by_stages(model, rows), figures.rates(tuned, model)]
        sections.append((tables.quality_table(model, rows), [figure for figure in drawn if figure]))
    errors = tables.error_table(made)
    if errors.rows:
        drawn = [figures.reconstruction(made)]
        sections.append((errors, [figure for figure in drawn if figure]))
    survived = tables.survival_table(made, [(trial.row, trial.lr, outcome.diverged) for trial, outcome in trials])
    if survived.rows:
        sections.append((survived, []))
    sections.append((tables.stability_table(), []))
    for rows in by_network.values():
        memory = tables.memory_table(rows, root)
        if memory.rows:
            sections.append((memory, []))
    sections.append((tables.methods_table(made), []))
    return sections


def _summary(spec: Spec, made: Sequence[Result]) -> str:
    diverged = sum(result.diverged or not result.outcomes for result in made)
    seeds = f"{len(spec.seeds)} seed{'s' if len(spec.seeds) > 1 else ''} each"
    missing = len(spec.rows) - len(made)
    text = (
        f"{len(made)} rows, {seeds}, learning rates chosen per row by validation with a seed of its own. "
        "Training is simulated: gradients are as late as in a pipeline, in one process. "
        f"Rows with a seed that diverged: {diverged}."
    )
    if missing:
        text += f" {missing} rows are not finished: the same command goes on."
    return f"<p>{html.escape(text)}</p>\n"


def _reproduce(spec: Spec, found: Found, sittings: Sequence[dict[str, Any]]) -> str:
    """The last page: commands, versions, machine and time."""
    hours = sum(outcome.seconds for outcome in found.values()) / 3600
    lines = [
        f"{s['date']}: layerpipe {s['layerpipe']}, torch {s['torch']}, Python {s['python']}, {s['processor']}, "
        f"{s['cores']} cores\n    {s['command']}"
        for s in sittings
    ]
    rates = "\n".join(f"    {name}: {', '.join(f'{lr:g}' for lr in lrs)}" for name, lrs in spec.learning_rates.items())
    text = (
        "\n".join(lines) + f"\n\nlearning rates that were tried:\n{rates}\nseeds: {', '.join(map(str, spec.seeds))}; "
        f"learning rates chosen with seed {spec.tuning_seed}"
    )
    return (
        f'<section id="reproduce">\n<h2>To reproduce</h2>\n<pre>{html.escape(text)}</pre>\n'
        f'<p class="note">{len(found)} trainings took {hours:.2f} hours of one core, one thread each. '
        "<code>study.json</code> beside this page holds all options, <code>trials/</code> every training.</p>\n"
        "</section>\n"
    )
