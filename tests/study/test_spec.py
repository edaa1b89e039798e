"""What a study is asked for, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerpipe.errors import UsageError
from layerpipe.study import spec
from layerpipe.study.methods import METHODS
from layerpipe.study.trial import Row, Trial


def test_a_grid_is_all_combinations_beside_its_undelayed_rows() -> None:
    made = spec.make({"grid": [{"method": ["stash", "blend"], "stages": [2, 4], "optimizer": "sgd"}], "seeds": 2})
    assert [(row.optimizer, row.stages, row.past) for row in made.rows] == [
        ("sgd", 1, "stash"), ("adamw", 1, "stash"),
        ("sgd", 2, "stash"), ("sgd", 4, "stash"), ("sgd", 2, "blend"), ("sgd", 4, "blend"),
    ]  # fmt: skip
    assert made.seeds == (0, 1)
    assert made.tuning_seed not in made.seeds


def test_rows_that_are_the_same_training_are_one() -> None:
    made = spec.make({"past": ["stash", "blend"], "method": ["latest", "ours"], "optimizer": ["adamw", "soap"]})
    delayed = [(row.optimizer, row.method) for row in made.rows if row.delay]
    assert sorted(delayed) == [("adamw", "latest"), ("soap", "latest"), ("soap", "ours")]


@pytest.mark.parametrize(("schedule", "stages", "expected"), [("1f1b", 8, 8), ("1f1b", 4, 4), ("lockstep", 4, 8)])
def test_accumulation_makes_the_largest_delay_one_update_at_most(schedule: str, stages: int, expected: int) -> None:
    (row,) = [
        row for row in spec.make({"method": "accumulation", "schedule": schedule, "stages": stages}).rows if row.delay
    ]
    assert row.accumulate == expected
    assert row.delay <= 1


@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
def test_every_method_is_a_row_of_its_own(method: str) -> None:
    optimizer = METHODS[method].optimizer or "adamw"
    rows = spec.make({"method": [method, "none"], "optimizer": optimizer}).rows
    assert sum(row.delay > 0 for row in rows) == 2
    row = next(row for row in rows if row.method == method and row.delay)
    row.settings(0.01)
    assert METHODS[method].formula
    assert METHODS[method].source


def test_a_trials_name_hangs_on_all_its_options() -> None:
    row = Row.make(model="mlp", data="digits", width=2, batch_size=8, steps=10, warmup=1)
    trials = [Trial(row, 0.1, 0), Trial(row, 0.2, 0), Trial(row, 0.1, 1), Trial(row, 0.1, 0, tuning=True)]
    assert len({trial.key for trial in trials}) == 4
    assert Trial.from_json(trials[0].to_json()) == trials[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimiser": "sgd"}, "a study has no optimiser"),
        ({"grid": [{"seeds": 3}]}, "a grid has no seeds"),
        ({"method": "magic"}, "method 'magic' is unknown"),
        ({"model": "lenet"}, "model 'lenet' is unknown"),
        ({"past": "blend:order=9"}, "order must be 1, 2 or 3"),
        ({"stages": "four"}, "stages='four' is not of type int"),
        ({"stages": 0}, "stages=0 is less than 1"),
        ({"warmup": 400}, "longer than the training"),
        ({"accumulate": 3}, "cannot be cut into 3 microbatches"),
        ({"lr": {"adam": [0.1]}}, "not 'adam'"),
        ({"lr": [0.1, -1]}, "more than 0"),
        ({"seeds": 0}, "at least one seed"),
    ],
)
def test_what_does_not_fit_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        spec.make(values)


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    with pytest.raises(UsageError, match="cannot be read"):
        spec.read(file)
    file.write_text("seeds = [")
    with pytest.raises(UsageError, match="is no TOML"):
        spec.read(file)
    file.write_text("lr = {adamw = [0.001]}\n[[grid]]\nstages = [2]\n")
    assert spec.make(spec.read(file)).learning_rates["adamw"] == (0.001,)
