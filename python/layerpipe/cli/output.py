"""The directory of a run: one JSON object per line, TensorBoard events, the config."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import layerpipe_kernels
from layerpipe.cli.board import Board
from layerpipe.cli.config import TrainConfig
from layerpipe.cli.resumed import KEPT, Left, Tally, sign
from layerpipe.cli.training import Earlier, Result
from layerpipe.errors import UsageError
from layerpipe.machine import processor


class RunDirectory:
    """``runs/<name>/``: ``config.json``, ``metrics.jsonl``, checkpoints and TensorBoard's event file.

    Every line of metrics is on disk when it is written, so that an interrupted run leaves a readable file. What a
    resumed run does again is taken out when it writes its first line: one that is refused leaves all as it was.

    Args:
        path: made new, or the directory of an interrupted run.
        left: what that left, of each of its runs that came to a checkpoint.

    Raises:
        UsageError: the directory holds another run, or cannot be written.
    """

    def __init__(self, path: Path, left: Mapping[str, Left] | None = None) -> None:
        self.path = path
        self._left = dict(left or {})
        self._tallies = {name: Tally(one.lines) for name, one in self._left.items()}
        if path.exists() and not path.is_dir():
            raise UsageError(f"--out {path} is not a directory")
        metrics = path / "metrics.jsonl"
        if metrics.exists() and left is None:
            raise UsageError(f"{path} already holds a run; choose another directory or remove it")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._metrics = metrics.open("ab", buffering=0)
        except OSError as error:
            raise UsageError(f"--out {path} cannot be written: {error.strerror}") from error
        self._shortened = left is None
        self._board = Board(path)

    def checkpoint(self, run: str) -> Path:
        return self.path / f"{run}.checkpoint"

    def earlier(self, run: str) -> Earlier | None:
        """Return what an interrupted run of this name left, if it came to a checkpoint."""
        left = self._left.get(run)
        return None if left is None else left.earlier

    def metrics_so_far(self, run: str) -> dict[str, Any]:
        """The metrics that were written so far, as a checkpoint notes them, see :mod:`layerpipe.cli.resumed`."""
        return self._tallies.setdefault(run, Tally()).to_json()

    def config(self, config: TrainConfig, **more: Any) -> None:
        """Write the options of the run and the machine."""
        machine = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "kernels": layerpipe_kernels.build_info(),
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        text = json.dumps(sign({**config.to_json(), **more, "environment": machine}), indent=2)
        partial = self.path / "config.json.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, self.path / "config.json")

    def summary(self, results: Mapping[str, Sequence[Result]]) -> None:
        """Write what the table shows, for machines, with the spread and the errors of every stage: ``summary.json``."""
        config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        kinds = {
            name: {
                "test_accuracy": [result.test_accuracy for result in found],
                "tests": [result.tests for result in found],
                "diverged": [result.diverged for result in found],
                "delays": [stage.delay for stage in found[0].stages],
                "past_weight_error": [[stage.error for stage in result.stages] for result in found],
                "kept_bytes": found[0].kept_bytes,
            }
            for name, found in results.items()
        }
        text = json.dumps({"config": config, "command": shlex.join(sys.argv), "results": kinds}, indent=1)
        (self.path / "summary.json").write_text(text + "\n", encoding="utf-8")

    def write(self, run: str, event: str, **values: Any) -> None:
        if not self._shortened:
            self._shorten()
        line = json.dumps({"run": run, "event": event, **values}).encode()
        self._append(line)
        if event in KEPT:
            self._tallies.setdefault(run, Tally()).add(line)

    def _append(self, line: bytes) -> None:
        left = line + b"\n"
        while left:  # a disk that is nearly full takes a part
            left = left[self._metrics.write(left) :]

    def _shorten(self) -> None:
        metrics, partial = self.path / "metrics.jsonl", self.path / "metrics.jsonl.partial"
        partial.write_bytes(b"".join(line + b"\n" for left in self._left.values() for line in left.lines))
        self._metrics.close()
        os.replace(partial, metrics)
        self._metrics = metrics.open("ab", buffering=0)
        self._shortened = True

    def scalars(self, run: str, step: int, **values: float) -> None:
        for name, value in values.items():
            self._board.scalar(f"{name}/{run}", value, step)
        self._board.flush()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._board.close()


def default_path(*parts: str) -> Path:
    """``runs/<parts>-<date>``, not there yet."""
    base = "-".join([*parts, time.strftime("%Y%m%d-%H%M%S")]).replace(":", ".")
    path, count = Path("runs") / base, 1
    while path.exists():
        count += 1
        path = Path("runs") / f"{base}-{count}"
    return path
