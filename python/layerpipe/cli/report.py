"""The tables a run ends with."""

from __future__ import annotations

from rich.filesize import decimal
from rich.table import Table

from layerpipe.cli.training import Result, StageResult


def error_text(error: float | None) -> str:
    """A relative mean-square error, as short as it is exact."""
    if error is None:
        return "–"
    return "0 (exact)" if error == 0 else f"{error:.2g}"


def measured_text(stage: StageResult) -> str:
    """The delay that the backwards saw once the pipe was full."""
    if not stage.measured:
        return "–"
    n, count = max(stage.measured.items(), key=lambda item: item[1])
    return f"{n} ({count}×)"


def stage_table(result: Result) -> Table:
    """Per stage: layers, delay by the rule and as measured, error of the past weights, memory."""
    table = Table(title="Stages", title_justify="left", caption=(
        "n: updates between a minibatch's forward and its backward. Past-weight error: mean-square error of the "
        "weights the backward saw, relative to using the latest weights (1.0)."
    ), caption_justify="left")  # fmt: skip
    for name in ("stage", "layers"):
        table.add_column(name)
    for name in ("n rule", "n measured", "past-weight\nerror", "weights", "history", "optimizer", "scratch",
                 "activations", "stashing\nwould keep"):  # fmt: skip
        table.add_column(name, justify="right")
    for i, stage in enumerate(result.stages):
        m = stage.memory
        table.add_row(
            str(i), stage.layers, str(stage.delay), measured_text(stage), error_text(stage.error),
            *(decimal(x) for x in (m.weights, m.history, m.optimizer, m.scratch, m.activations, m.stash)),
            end_section=i == len(result.stages) - 1,
        )  # fmt: skip
    columns = zip(*(s.memory for s in result.stages), strict=True)
    table.add_row("all", "", "", "", "", *(decimal(sum(column)) for column in columns))
    return table


def kept_sentence(result: Result) -> str:
    """The weight memory beside that of weight stashing, from the tensors that were there."""
    weights = sum(s.memory.weights for s in result.stages)
    stashing = weights + sum(s.memory.stash for s in result.stages)
    scratch = max((s.memory.scratch for s in result.stages), default=0)
    return (
        f"Weights and their past: {decimal(result.kept_bytes)} kept (+ {decimal(scratch)} scratch); weight stashing "
        f"keeps {decimal(stashing)}. That is {result.kept_bytes / stashing:.2f} of it."
    )
