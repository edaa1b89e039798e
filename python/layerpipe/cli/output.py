"""Where a run writes: one JSON object per line, TensorBoard events, the config."""

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
from layerpipe import checkpoint as checkpoints
from layerpipe.cli.config import TrainConfig
from layerpipe.cli.training import Earlier, Result, Step
from layerpipe.errors import UsageError
from layerpipe.machine import processor


class RunDirectory:
    """``runs/<name>/``: ``config.json``, ``metrics.jsonl``, checkpoints and TensorBoard's event file.

    Every line of metrics is on disk when it is written, so that an interrupted run leaves a readable file. What a
    resumed run does again is taken out when it writes its first line: one that is refused leaves all as it was.

    Args:
        path: made new, or with ``resume`` the directory of an interrupted run.

    Raises:
        UsageError: the directory holds another run, or none to resume, or cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path
        self._earlier: list[dict[str, Any]] = []
        self._shortened = not resume
        if path.exists() and not path.is_dir():
            raise UsageError(f"--out {path} is not a directory")
        metrics = path / "metrics.jsonl"
        if metrics.exists() != resume:
            why = "already holds a run; choose another directory or remove it" if not resume else "holds no run"
            raise UsageError(f"{path} {why}")
        try:
            path.mkdir(parents=True, exist_ok=True)
            if resume:
                self._earlier = _up_to_checkpoints(path)
            self._metrics = metrics.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise UsageError(f"--out {path} cannot be written: {error.strerror}") from error
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(path))

    def checkpoint(self, run: str) -> Path:
        return self.path / f"{run}.checkpoint"

    def earlier(self, run: str, total: int) -> Earlier | None:
        """What an interrupted run of this name left, if it came to a checkpoint."""
        if not self.checkpoint(run).exists():
            return None
        mine = [line for line in self._earlier if line["run"] == run]
        steps = [Step(*(line[name] for name in Step._fields)) for line in mine if line["event"] == "step"]
        tests = [(line["step"], line["accuracy"]) for line in mine if line["event"] == "test" and line["step"] < total]
        return Earlier(self.checkpoint(run), steps, tests)

    def config(self, config: TrainConfig, **more: Any) -> None:
        """What was asked for, and on what it ran."""
        machine = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "kernels": layerpipe_kernels.build_info(),
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        text = json.dumps({**config.to_json(), **more, "environment": machine}, indent=2)
        (self.path / "config.json").write_text(text + "\n", encoding="utf-8")

    def summary(self, results: Mapping[str, Sequence[Result]]) -> None:
        """What the table shows, for machines, with the spread and the errors of every stage: ``summary.json``."""
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
        self._metrics.write(json.dumps({"run": run, "event": event, **values}) + "\n")

    def _shorten(self) -> None:
        metrics, partial = self.path / "metrics.jsonl", self.path / "metrics.jsonl.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in self._earlier), encoding="utf-8")
        self._metrics.close()
        os.replace(partial, metrics)
        self._metrics = metrics.open("a", encoding="utf-8", buffering=1)
        self._shortened = True

    def scalars(self, run: str, step: int, **values: float) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{name}/{run}", value, step)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._board.close()


def _up_to_checkpoints(path: Path) -> list[dict[str, Any]]:
    """What the metrics say of each run up to its last checkpoint; what came after will be written again."""
    last = {file.stem: checkpoints.read(file)["extra"]["step"] for file in path.glob("*.checkpoint")}
    found = []
    for line in (path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if not isinstance(said, dict) or not said.keys() >= {"run", "event"}:
            raise UsageError(f"{path}/metrics.jsonl has lines that are not of a run")
        if said["event"] in ("step", "test") and said["step"] <= last.get(said["run"], 0):
            found.append(said)
    return found


def default_path(*parts: str) -> Path:
    """``runs/<parts>-<date>``, not there yet."""
    base = "-".join([*parts, time.strftime("%Y%m%d-%H%M%S")])
    path, count = Path("runs") / base, 1
    while path.exists():
        count += 1
        path = Path("runs") / f"{base}-{count}"
    return path
