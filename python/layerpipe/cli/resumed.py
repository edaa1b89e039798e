"""An interrupted run's directory, checked whole before anything is written there."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from layerpipe import checkpoint as checkpoints
from layerpipe.cli.config import TrainConfig
from layerpipe.cli.training import Earlier, Step
from layerpipe.errors import UsageError
from layerpipe.stage.probe import Reading

#: Events that a resumed run takes over.
KEPT = ("step", "test")
_TYPES = {name: int if name == "step" else str if name == "phase" else float for name in Step._fields}


class Left(NamedTuple):
    """The files of one interrupted run."""

    lines: list[bytes]  # of its metrics, up to the checkpoint
    earlier: Earlier


def sign(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values and their checksum."""
    return {**values, "checksum": _checksum(values)}


def read_config(path: Path) -> tuple[TrainConfig, bool]:
    """The options of a run, and whether it has a baseline.

    Raises:
        UsageError: the file cannot be read, is not what was written, or is of a run that cannot go on.
    """
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"--resume {path}: its config.json cannot be read ({error or type(error).__name__})"
        ) from error
    if not isinstance(values, dict):
        raise UsageError(f"--resume {path}: its config.json holds no options")
    if "seeds" in values:
        raise UsageError(f"--resume {path}: a run of layerpipe compare, which cannot go on")
    checksum = values.pop("checksum", None)
    if checksum is not None and checksum != _checksum(values):  # files of earlier versions have none
        raise UsageError(f"--resume {path}: its config.json is not what was written, the checksum is another's")
    baseline = values.pop("baseline", True)
    if not isinstance(baseline, bool):
        raise UsageError(f"--resume {path}: the run's config.json has baseline={baseline!r}, which cannot be")
    values.pop("environment", None)
    config = TrainConfig.from_json(values)
    if config.checkpoint_every is None:
        raise UsageError(f"--resume {path}: the run wrote no checkpoints; it was started without --checkpoint-every")
    return config, baseline


def read(path: Path, runs: Mapping[str, TrainConfig], images: int, data: str) -> dict[str, Left]:
    """Return what is left of each of these runs that came to a checkpoint.

    Args:
        runs: their options.
        images: in the training data.
        data: the data's checksum.

    Raises:
        UsageError: the directory holds no run, or what it holds does not fit together.
        CheckpointError: a checkpoint is damaged.
    """
    metrics = path / "metrics.jsonl"
    if not metrics.exists():
        raise UsageError(f"{path} holds no run")
    try:
        lines = _by_run(metrics)
    except OSError as error:
        raise UsageError(f"{metrics} cannot be read: {error.strerror}") from error
    left = {}
    for name, config in runs.items():
        file = path / f"{name}.checkpoint"
        own = lines.get(name, [])
        if file.exists():
            content = checkpoints.read(file)
            try:
                checkpoints.check_whole(content)
            except ValueError as error:
                raise UsageError(f"{file}: {error}") from error
            extra = content["extra"]
            left[name] = _left(file, metrics, extra, own, config, config.total_steps(images), data)
        elif config.checkpoint_every is not None and any(said["step"] > config.checkpoint_every for _, said in own):
            raise UsageError(f"{file} is missing, and {metrics} says that the run went on after it was written")
    return left


def _left(
    file: Path,
    metrics: Path,
    extra: dict[str, Any],
    lines: list[tuple[bytes, dict[str, Any]]],
    config: TrainConfig,
    total: int,
    data: str,
) -> Left:
    every = config.checkpoint_every or 1
    step = extra.get("step")
    if not isinstance(step, int) or not 1 <= step <= total or step % every:
        raise UsageError(f"{file} is of step {step!r}; the run has {total}, and a checkpoint every {every}")
    seconds, readings = extra.get("seconds"), extra.get("readings")
    if not _finite(seconds) or not isinstance(extra.get("scheduler"), dict):
        raise UsageError(f"{file} does not say how long the run took, or what its learning rates were")
    if extra["scheduler"].get("last_epoch") != min(step, total - 1):
        raise UsageError(f"{file} is of step {step}, its learning rate of another")
    if not isinstance(readings, list) or len(readings) != config.stages or not all(map(_readings, readings)):
        raise UsageError(f"{file} holds no readings of {config.stages} stages")
    theirs, ours = extra.get("config"), config.to_json()
    if not isinstance(theirs, dict | None):
        raise UsageError(f"{file} holds no options of a run")
    if theirs is not None:  # checkpoints of earlier versions do not say
        for option, value in ours.items():
            if option != "data_dir" and theirs.get(option, value) != value:
                raise UsageError(
                    f"{file} was made with {option}={theirs[option]!r}, the run's config.json has {option}={value!r}"
                )
    if extra.get("data", data) != data:
        raise UsageError(f"{file} was made with other data than --data {config.data} gives here")
    kept = [line for line in lines if line[1]["step"] <= step]
    if isinstance(extra.get("metrics"), dict):
        kept = lines[: extra["metrics"].get("lines", 0)]
        if Tally(line for line, _ in kept).to_json() != extra["metrics"]:
            raise UsageError(f"{metrics} is damaged: it is not what {file.name} was written after")
    steps = [_step(metrics, said) for _, said in kept if said["event"] == "step"]
    if [s.step for s in steps] != list(range(1, step + 1)):
        raise UsageError(f"{metrics} does not have each step of {file.stem} up to its checkpoint, {step}, once")
    tests = [(said["step"], said["accuracy"]) for _, said in kept if said["event"] == "test" and said["step"] < total]
    if not all(_finite(accuracy) for _, accuracy in tests):
        raise UsageError(f"{metrics} has an accuracy that is no number")
    return Left([line for line, _ in kept], Earlier(file, steps, tests))


class Tally:
    """Number of lines of metrics, and their checksum: what a checkpoint says of those that came before it."""

    def __init__(self, lines: Iterable[bytes] = ()) -> None:
        self._count, self._digest = 0, hashlib.sha256()
        for line in lines:
            self.add(line)

    def add(self, line: bytes) -> None:
        self._count += 1
        self._digest.update(line + b"\n")

    def to_json(self) -> dict[str, Any]:
        return {"lines": self._count, "sha256": self._digest.hexdigest()}


def _by_run(metrics: Path) -> dict[str, list[tuple[bytes, dict[str, Any]]]]:
    """The lines of each run that a resumed one takes over, and what they say.

    What cannot be read is left out: the last line of a run that was killed; another one is missed by the checkpoint.
    """
    found: dict[str, list[tuple[bytes, dict[str, Any]]]] = {}
    for line in metrics.read_bytes().split(b"\n"):
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(said, dict) or not {"run", "event"} <= said.keys() or not isinstance(said["run"], str):
            raise UsageError(f"{metrics} has lines that are not of a run")
        if said["event"] in KEPT and type(said.get("step")) is int:
            found.setdefault(said["run"], []).append((line, said))
    return found


def _step(metrics: Path, said: dict[str, Any]) -> Step:
    for name, kind in _TYPES.items():
        value = said.get(name)
        if not (isinstance(value, float | int) if kind is float else type(value) is kind):
            raise UsageError(f"{metrics} has a step with {name}={value!r}")
    return Step(*(said[name] for name in Step._fields))


def _readings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(r, tuple) and len(r) == len(Reading._fields) for r in value)


def _finite(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
