"""A drained pipeline in one file that is always whole."""

from __future__ import annotations

import collections
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layerpipe.errors import CheckpointError

if TYPE_CHECKING:
    from layerpipe.pipeline import Pipeline

FORMAT = 1


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file in one move, once all of it is on the disk: whoever dies meanwhile leaves the one before.

    What is half written lies beside it as ``<name>.partial`` and is overwritten the next time.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save({"layerpipe": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # or the new name may be lost with the power
    finally:
        os.close(directory)


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote, on the CPU. Runs no code from the file.

    Raises:
        FileNotFoundError: it is not there.
        CheckpointError: it is something else, or of a version that this one does not know.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # of bytes that are something else, the unpickler may raise anything
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{path} is no checkpoint: {type(error).__name__} {reason}") from error
    if not isinstance(content, dict) or "layerpipe" not in content:
        raise CheckpointError(f"{path} is no checkpoint of layerpipe")
    if content["layerpipe"] != FORMAT:
        raise CheckpointError(f"{path} has format {content['layerpipe']}, this version reads {FORMAT}")
    return content


def of(pipe: Pipeline) -> dict[str, Any]:
    """Everything that a drained pipeline goes on from."""
    return {
        "schedule": pipe.schedule.name,
        "model": pipe.state_dict(),
        "optimizer": without_functions(pipe.optimizer.state_dict()),
        "versions": [stage.version for stage in pipe.stages],
        "measured": pipe.measured_delays(),
        "random": random_state(),
    }


def load(pipe: Pipeline, path: Path) -> dict[str, Any]:
    """Put a file's content into a drained pipeline.

    Returns:
        What else the file holds, its ``extra``.

    Raises:
        FileNotFoundError: it is not there.
        CheckpointError: it is no checkpoint, or one of another pipeline. Nothing has been loaded then.
    """
    content = read(path)
    try:
        _fill(pipe, content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    extra: dict[str, Any] = content["extra"]
    return extra


def _fill(pipe: Pipeline, content: dict[str, Any]) -> None:
    theirs, ours = (content["schedule"], len(content["versions"])), (pipe.schedule.name, len(pipe.stages))
    if theirs != ours:
        raise ValueError(
            f"of {theirs[1]} stages and schedule {theirs[0]!r}, this pipeline has {ours[1]} and {ours[0]!r}"
        )
    shapes, wanted = _shapes(content["model"]), _shapes(pipe.state_dict())
    if shapes != wanted:
        other = sorted(n for n in shapes.keys() | wanted.keys() if shapes.get(n) != wanted.get(n))
        raise ValueError(f"of another model, it differs in {', '.join(other)}")
    pipe.optimizer.load_state_dict(content["optimizer"])  # refuses another past before it changes anything
    pipe.load_state_dict(content["model"])
    for stage, version, measured in zip(pipe.stages, content["versions"], content["measured"], strict=True):
        stage.version = version
        stage.measured = collections.Counter(measured)
    set_random_state(content["random"])


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}


def random_state() -> dict[str, Any]:
    """Of every generator that training may draw from: torch's, Python's, NumPy's."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def without_functions(value: Any) -> Any:
    """A state_dict without the functions among its options, such as a decay rule: no file can hold those."""
    if isinstance(value, dict):
        return {k: without_functions(v) for k, v in value.items() if not callable(v)}
    if isinstance(value, list):
        return [without_functions(v) for v in value]
    return value
