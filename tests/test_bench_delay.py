"""What a delay costs: runs, their table, and a bench that is interrupted."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from layerpipe.models.gpt import GPT

pytest.importorskip("rich")
from bench import delay
from examples import gpt

UNDELAYED, DELAYED = (1, "lockstep", "nadam", "blend"), (2, "lockstep", "nadam", "blend")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delay, "CONFIGURATIONS", [UNDELAYED, DELAYED])


class Here:
    """A pool in this process."""

    def Pool(self, *_: Any) -> contextlib.AbstractContextManager[Here]:
        return contextlib.nullcontext(self)

    def imap_unordered(self, function: Callable[[Any], Any], given: Sequence[Any]) -> Iterator[Any]:
        return map(function, given)


def result(loss: float) -> dict[str, Any]:
    return {"delays": [0], "loss": loss, "kept_bytes": 0}


def test_an_interrupted_bench_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results" / "delay.json"
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: Here())

    def bench(steps: int, runs: int) -> list[delay.Run]:
        """What the bench runs, which is interrupted at a run more than ``runs``."""
        begun: list[delay.Run] = []

        def measure(run: delay.Run) -> tuple[delay.Run, dict[str, Any]]:
            if len(begun) == runs:
                raise KeyboardInterrupt
            begun.append(run)
            return run, result(1.0)

        monkeypatch.setattr(delay, "measure", measure)
        monkeypatch.setattr(sys, "argv", ["delay", f"--steps={steps}", "--seeds=2", f"--json={file}"])
        with contextlib.suppress(KeyboardInterrupt):
            delay.main()
        return begun

    every = [delay.Run(*configuration, seed, 200) for seed in range(2) for configuration in (UNDELAYED, DELAYED)]
    assert bench(steps=200, runs=3) == every[:3]
    assert bench(steps=200, runs=3) == every[3:]
    assert bench(steps=200, runs=3) == []
    assert list(delay.load(file)) == every
    assert bench(steps=300, runs=1) == [delay.Run(*UNDELAYED, 0, 300)]  # other settings are other runs
    assert len(delay.load(file)) == 5


def test_a_delay_is_compared_within_a_seed() -> None:
    losses = {UNDELAYED: [1.0, 2.0], DELAYED: [1.5, 2.5]}
    found = {delay.Run(*kind, seed, 100): result(losses[kind][seed]) for kind in losses for seed in range(2)}
    columns = {column.header: list(column.cells) for column in delay.table(found, seeds=2, steps=100).columns}
    assert columns["loss"] == ["1.500 ± 0.707", "2.000 ± 0.707"]
    assert columns["beside one stage"] == ["–", "+0.500 ± 0.000"]


def test_a_run_trains_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.arange(1000) % 256
    monkeypatch.setattr(gpt, "sources", lambda: (text, text))
    monkeypatch.setattr(gpt, "CONTEXT", 8)
    monkeypatch.setattr(gpt, "GPT", lambda **size: GPT(**{**size, "width": 16}))
    run = delay.Run(*DELAYED, seed=0, steps=3)
    same, found = delay.measure(run)
    assert same == run
    assert found["delays"] == [2, 0]
    assert found["kept_bytes"] > 0
    assert 0 < found["loss"] < 6  # log 256 is 5.55
