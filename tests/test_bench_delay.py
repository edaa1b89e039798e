"""A bench of many runs loses none of them when it is interrupted."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
from bench import delay
from examples import gpt


class Here:
    """A pool in this process."""

    def Pool(self, *_: Any) -> contextlib.AbstractContextManager[Here]:
        return contextlib.nullcontext(self)

    def imap_unordered(self, function: Callable[[Any], Any], given: Sequence[Any]) -> Iterator[Any]:
        return map(function, given)


def test_an_interrupted_bench_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undelayed, delayed = (1, "lockstep", "adamw", "blend"), (2, "lockstep", "adamw", "blend")
    monkeypatch.setattr(delay, "CONFIGURATIONS", [undelayed, delayed])
    monkeypatch.setattr(gpt, "CONTEXT", 8)
    monkeypatch.setattr(gpt, "BATCH", 2)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: Here())
    file = tmp_path / "results" / "delay.json"
    begun: list[delay.Run] = []
    measure = delay.measure

    def bench(steps: int, seeds: int, runs: int) -> None:
        """The bench, until it begins a run more than ``runs``."""

        def counted(run: delay.Run) -> tuple[delay.Run, dict[str, Any]]:
            begun.append(run)
            if len(begun) > runs:
                raise KeyboardInterrupt
            return measure(run)

        begun.clear()
        monkeypatch.setattr(delay, "measure", counted)
        monkeypatch.setattr(sys, "argv", ["delay", f"--steps={steps}", f"--seeds={seeds}", f"--json={file}"])
        delay.main()

    with pytest.raises(KeyboardInterrupt):
        bench(steps=2, seeds=2, runs=2)
    first = delay.load(file)
    assert list(first) == [delay.Run(*undelayed, 0, 2), delay.Run(*delayed, 0, 2)]
    bench(steps=2, seeds=2, runs=2)
    assert begun == [delay.Run(*undelayed, 1, 2), delay.Run(*delayed, 1, 2)]
    both = delay.load(file)
    assert first.items() <= both.items()
    assert [result["delays"] for result in both.values()] == [[0], [2, 0], [0], [2, 0]]
    assert all(0 < result["loss"] < 7 for result in both.values())
    assert "2, 0" in capsys.readouterr().out
    bench(steps=2, seeds=2, runs=0)
    with pytest.raises(KeyboardInterrupt):
        bench(steps=3, seeds=2, runs=0)  # other settings are other runs


def test_a_delay_is_compared_within_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    undelayed, delayed = (1, "lockstep", "nadam", "blend"), (4, "lockstep", "nadam", "blend")
    monkeypatch.setattr(delay, "CONFIGURATIONS", [undelayed, delayed])
    losses = {undelayed: [1.0, 2.0], delayed: [1.5, 2.5]}
    found = {
        delay.Run(*configuration, seed, 100): {"loss": losses[configuration][seed], "delays": [0], "kept_bytes": 0}
        for configuration in losses
        for seed in range(2)
    }
    columns = {column.header: list(column.cells) for column in delay.table(found, seeds=2, steps=100).columns}
    assert columns["loss"] == ["1.500 ± 0.707", "2.000 ± 0.707"]
    assert columns["beside one stage"] == ["–", "+0.500 ± 0.000"]
