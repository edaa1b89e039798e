"""Where a run writes: one JSON object per line, TensorBoard events, the config."""

from __future__ import annotations

import json
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
from layerpipe.cli.config import TrainConfig
from layerpipe.cli.training import Result
from layerpipe.errors import UsageError


class RunDirectory:
    """``runs/<name>/``: ``config.json``, ``metrics.jsonl`` and TensorBoard's event file.

    Every line of metrics is on disk when it is written, so that an interrupted run leaves a readable file.

    Raises:
        ValueError: the directory holds another run, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise UsageError(f"--out {path} is not a directory")
        if (path / "metrics.jsonl").exists():
            raise UsageError(f"--out {path} already holds a run; choose another directory or remove it")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._metrics = (path / "metrics.jsonl").open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise UsageError(f"--out {path} cannot be written: {error.strerror}") from error
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(path))

    def config(self, config: TrainConfig, **more: Any) -> None:
        """What was asked for, and on what it ran."""
        machine = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
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
        self._metrics.write(json.dumps({"run": run, "event": event, **values}) + "\n")

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


def default_path(*parts: str) -> Path:
    """``runs/<parts>-<date>``, not there yet."""
    base = "-".join([*parts, time.strftime("%Y%m%d-%H%M%S")])
    path, count = Path("runs") / base, 1
    while path.exists():
        count += 1
        path = Path("runs") / f"{base}-{count}"
    return path
