"""Seconds to equal loss: what the bench makes of what was measured."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("rich")
from bench import staleness, time_to_loss
from layerpipe.study.settings import Settings


def results() -> staleness.Results:
    run = lambda **options: staleness.Run(settings=Settings(optimizer="soap"), **options)
    return {
        run(schedule="sequential", steps=400): {"quality": 3.0},
        run(schedule="sequential", steps=1600): {"quality": 1.0},
        run(steps=600, stages=8): {"quality": 2.9},
        run(steps=1600, stages=8, seed=0): {"quality": 1.9},
        run(steps=1600, stages=8, seed=1): {"quality": 2.1},
        run(steps=1600, stages=8, sync_steps=50): {"quality": 2.5},
        run(steps=1600, stages=8, width=32): {"quality": 1.5},
    }


def test_extra_minibatches_are_those_of_the_best_longest_run() -> None:
    assert time_to_loss.extra_minibatches(results(), "gpt", "soap", 8) == pytest.approx(2.0)
    assert math.isnan(time_to_loss.extra_minibatches(results(), "gpt", "soap", 4))
    assert math.isnan(time_to_loss.extra_minibatches(results(), "gpt", "soap", 8, microbatches=2))
    assert math.isnan(time_to_loss.extra_minibatches(results(), "gpt", "adam", 8))


def test_a_synchronous_pipeline_has_a_bubble_and_an_asynchronous_one_none() -> None:
    measured = {parts: {"forward": 1.0 / parts, "backward": 2.0 / parts, "update": 0.0} for parts in (1, 2, 8)}
    found = time_to_loss.simulated(measured, 4)
    assert found["microbatches"] == 8
    assert found["synchronous"] == pytest.approx(3 / 4 * (8 + 3) / 8)
    assert found["asynchronous"] == pytest.approx(3 / 4)
    slower = {**measured, 2: {"forward": 0.6, "backward": 1.2, "update": 0.8}}
    assert time_to_loss.simulated(slower, 4, microbatches=2)["asynchronous"] == pytest.approx(2 * (1.8 + 0.4) / 4)


def test_the_best_of_a_kind_is_compared() -> None:
    seconds = {
        "asynchronous, 1f1b": [0.5, 0.5],
        "plain, 1": [1.2, 1.2],
        "plain, 2": [1.0, 1.0],
        "synchronous, gpipe 2": [0.8, 0.8],
        "synchronous, 1f1b 2": [2.0, 2.0],
    }
    result = {"task": "gpt", "optimizer": "soap", "stages": 2, "microbatches": 1, "seconds": seconds}
    table = time_to_loss.measured_table([result], lambda *_: 1.25)
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["method"] == ["plain, 2", "synchronous, gpipe 2", "asynchronous, 1f1b"]
    assert columns["to equal loss"] == ["1.00x faster", "1.25x faster", "1.60x faster"]
