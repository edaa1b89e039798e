"""What the command line shows of a run."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from rich.console import Console
from rich.table import Table

from layerpipe.cli import plots, report
from layerpipe.cli.training import Result, StageResult, Step
from layerpipe.measured import StageMemory

MEMORY = StageMemory(123456, 234567, 345678, 456789, 567891, 678912)
STAGE = StageResult("features.first to features.last", 6, {6: 1234}, 0.0123, [], MEMORY)
FINISHED = Result([Step(1, 0.5, 0.5, 0.1, 1234.5, "steady")], [(1, 98.76)], [STAGE], [], 12.3)


@pytest.mark.parametrize("width", [50, 80])
@pytest.mark.parametrize(
    "table",
    [
        report.comparison_table({"blend+match+coupled lockstep": [FINISHED]}),
        report.memory_table(FINISHED),
        report.accuracy_table({"pipeline": FINISHED}),
        report.stage_table(FINISHED),
    ],
    ids=lambda table: str(table.title),
)
def test_narrow_tables_lose_no_digit(table: Table, width: int) -> None:
    wide, narrow = (io.StringIO() for _ in range(2))
    Console(file=wide, width=200).print(table)
    Console(file=narrow, width=width).print(table)
    for sign in "0123456789":
        assert narrow.getvalue().count(sign) == wide.getvalue().count(sign)
    assert "…" not in narrow.getvalue()


def test_a_run_that_ended_before_its_first_step_has_plots_without_warnings(tmp_path: Path) -> None:
    nothing = Result([], [], [STAGE._replace(measured={}, error=None)], [], 0.1, signal=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.loss(tmp_path / "loss.png", {"pipeline": nothing})
        plots.comparison(tmp_path / "comparison.png", {}, "nothing")
    assert report.history_sentence(nothing) is None
    assert report.history_sentence(FINISHED) is not None
