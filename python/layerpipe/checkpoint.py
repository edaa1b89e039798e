"""A drained pipeline in one file that is always whole."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerpipe.errors import CheckpointError

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
