"""Checkpoints of a drained pipeline: the one file that is written and read by any number of processes."""

from __future__ import annotations

import collections
import itertools
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from layerpipe.checkpoint_file import read, write
from layerpipe.errors import CheckpointError
from layerpipe.optimizer import holds_function, joined, part
from layerpipe.partition.split_stage import uncompiled

if TYPE_CHECKING:
    from layerpipe.pipeline import Pipeline

__all__ = ["load", "random_state", "read", "save", "set_random_state", "write"]

#: A tensor's dtype and shape.
Kind = tuple[torch.dtype, tuple[int, ...]]

_PARTS: dict[str, Any] = {
    "schedule": str, "model": dict, "optimizer": dict, "versions": list, "measured": list, "random": dict, "extra": dict
}  # fmt: skip

_OF_STAGES: dict[str, Any] = {
    "versions": int, "measured": dict, "stages": list, "accumulated": tuple | list,
    "random_of_stages": torch.Tensor | None,
}  # fmt: skip
_OF_OPTIMIZERS: dict[str, Any] = {"stages": dict, "options": dict, "kinds": str}


class Content(NamedTuple):
    """The state that a drained pipeline goes on from: what every process knows, and what only those of a stage have."""

    common: dict[str, Any]
    own: dict[str, list[Any] | dict[str, Any]]  # "model", "optimizers", "accumulated" of this process's stages


def content_of(pipe: Pipeline, extra: dict[str, Any]) -> Content:
    """Of a drained pipeline. Its replicas are alike afterwards."""
    ranks = pipe.ranks
    states = ranks.gather_all(random_state())
    generators = [s.random and s.random.generator.get_state() for s in pipe.stages]
    for stage in pipe.stages:
        if stage.replicas is not None and stage.accumulation.waiting:
            stage.replicas.average()  # of what the replicas do not share, the last
    optimizer = without_functions(pipe.optimizer.state_dict())
    common = {
        "schedule": pipe.schedule.name,
        "stages": _stages(pipe),
        "optimizer": joined(ranks.gather({**optimizer, "stages": []}), ranks.gather(pipe.optimizer.own)),
        "versions": ranks.by_stage([stage.version for stage in pipe.stages]),
        "accumulate": pipe.accumulate,
        "pacing": pipe.pacing.state_dict(),
        "loss": ranks.gather(pipe.loss_weights.state())[-1],
        "measured": pipe.measured_delays(),
        "random": states[0],
        "random_of_stages": ranks.by_stage(generators),
        "extra": extra,
    }
    if len(states) > 1:
        common["random_of_ranks"] = states
    if ranks.replicas > 1:
        common["random_of_replicas"] = _by_replica(pipe, generators)
    if any(stage.network_norm is not None for stage in pipe.stages):
        common["norms"] = ranks.by_stage([s.network_norm.known if s.network_norm else None for s in pipe.stages])
    own = {
        "model": pipe.own_state(),
        "optimizers": optimizer["stages"],
        "accumulated": [stage.accumulation.state(stage.params) for stage in pipe.stages],
    }
    return Content(common, own)


def save(pipe: Pipeline, path: Path | None, extra: dict[str, Any]) -> None:
    """Write everything that a drained pipeline goes on from into one file. Of several processes, the first that has a
    path writes.

    Raises:
        OSError, CheckpointError: the file cannot be written; in the processes that do not write it, the latter.
        TypeError: ``extra`` holds something that would not be read again.
        ValueError: no process has a path.
    """
    writer = _keeper(pipe, path)
    common, own = content_of(pipe, extra)
    parts: list[Any] = pipe.ranks.gather(own)
    stages = [state for part in parts for state in part["optimizers"]]
    content = {
        **common,
        "model": {name: value for part in parts for name, value in part["model"].items()},
        "optimizer": {**common["optimizer"], "stages": stages},
        "accumulated": [state for part in parts for state in part["accumulated"]],
    }
    error = None
    if pipe.ranks.process == writer:
        assert path is not None
        try:
            write(path, content)
        except Exception as caught:
            error = caught
    pipe.ranks.agree(error, CheckpointError)


def load(pipe: Pipeline, path: Path | None) -> dict[str, Any]:
    """Put a file's content into a drained pipeline, whatever processes it was written from.

    Of several processes, the first that has a path reads, and tells the others.

    Returns:
        What else the file holds, its ``extra``.

    Raises:
        FileNotFoundError: it is not there, in all processes alike.
        CheckpointError: it is no checkpoint, or one of another pipeline. Nothing has been loaded then.
        ValueError: no process has a path.
    """
    content: dict[str, Any] = {}
    error: Exception | None = None
    reader = _keeper(pipe, path)
    if pipe.ranks.process == reader:
        assert path is not None
        try:
            content = read(path)
        except Exception as caught:
            error = caught
    path, content, error = pipe.ranks.told_all((path, content, error), by=reader)
    if error is not None:
        raise error
    wanted = {name: kind for own in pipe.ranks.gather(kinds_of(pipe.own_state())) for name, kind in own.items()}
    return put(pipe, path, content, wanted)


def own_optimizers(pipe: Pipeline) -> range:
    """Return the numbers of the optimizers in this process, counted from the input."""
    counts = pipe.ranks.gather(sum(stage.optimizer is not None for stage in pipe.stages))
    first = sum(counts[: pipe.ranks.rank])
    return range(first, first + counts[pipe.ranks.rank])


def put(pipe: Pipeline, path: Any, content: dict[str, Any], wanted: dict[str, Kind]) -> dict[str, Any]:
    """Put a checkpoint's content, of which that of other processes' stages may be missing, into a drained pipeline.

    Args:
        path: for messages.
        wanted: the tensors of the model that the content must have.

    Returns:
        Its ``extra``.

    Raises:
        CheckpointError: it does not fit, in any process. Nothing has been loaded then.
    """
    error: Exception | None = None
    stages, own = _stages(pipe), own_optimizers(pipe)
    before, loads = pipe.optimizer.state_dict(), False
    try:
        _check(pipe, content, wanted, stages, own)
        loads = True
        pipe.optimizer.load_state_dict(part(content["optimizer"], own))
    except Exception as caught:
        how = str(caught)
        if not isinstance(caught, ValueError):
            how = f"holds what no checkpoint does, which raises {type(caught).__name__} {caught}"
        error = CheckpointError(f"{path}: {how}")
        error.__cause__ = caught
    try:
        pipe.ranks.agree(error, CheckpointError)
    except CheckpointError:
        if loads:
            pipe.optimizer.load_state_dict(before)
        raise
    _fill(pipe, content)
    extra: dict[str, Any] = content["extra"]
    return extra


def _keeper(pipe: Pipeline, path: Path | None) -> int:
    """The process that has the file."""
    keeper = pipe.ranks.first(path is not None)
    if keeper is None:
        raise ValueError("a checkpoint needs a path, in one process at least")
    return keeper


def _check(
    pipe: Pipeline,
    content: dict[str, Any],
    wanted: dict[str, Kind],
    stages: list[list[str]],
    own: range,
) -> None:
    """Refuse, with nothing loaded, what is of another pipeline or holds what no checkpoint does."""
    check_whole(content)
    theirs, ours = (content["schedule"], len(content["versions"])), (pipe.schedule.name, len(pipe.delays))
    if theirs != ours:
        raise ValueError(
            f"of {theirs[1]} stages and schedule {theirs[0]!r}, this pipeline has {ours[1]} and {ours[0]!r}"
        )
    if (every := content.get("accumulate", 1)) != pipe.accumulate:
        raise ValueError(f"of a pipeline with accumulate={every}, this one has accumulate={pipe.accumulate}")
    if "pacing" in content:
        pipe.pacing.check(content["pacing"])
    kinds = kinds_of(content["model"])
    if kinds != wanted:
        other = sorted(n for n in kinds.keys() | wanted.keys() if kinds.get(n) != wanted.get(n))
        raise ValueError(f"of another model, it differs in {', '.join(other)}")
    kinds, wanted = kinds_of(content.get("loss", {})), kinds_of(pipe.loss_weights.state())
    if kinds != wanted:
        other = sorted(n for n in kinds.keys() | wanted.keys() if kinds.get(n) != wanted.get(n))
        raise ValueError(f"of another loss, it differs in {', '.join(other)}")
    for i, (has, wants) in enumerate(zip(content.get("stages", stages), stages, strict=True)):
        if has != wants:
            raise ValueError(
                f"of the same model, cut elsewhere: stage {i} has {_shown(has)} there, here {_shown(wants)}; cut at "
                "the same layers, layerpipe.split takes at="
            )
    pipe.optimizer.check(part(content["optimizer"], own))


def check_whole(content: dict[str, Any]) -> None:
    """Refuse a file's content that no pipeline wrote, whichever it is of.

    Raises:
        ValueError: something is missing, or of another kind.
    """
    for name, kind in _PARTS.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"its {name!r} is missing or no {kind.__name__}")
    for name, kind in _OF_STAGES.items():
        values = content.get(name, content["versions"])
        if not isinstance(values, list) or len(values) != len(content["versions"]):
            raise ValueError(f"its {name!r} are not of {len(content['versions'])} stages")
        if name in content and not all(isinstance(value, kind) for value in values):
            raise ValueError(f"its {name!r} are no {kind}")
    for name, kind in _OF_OPTIMIZERS.items():
        values = content["optimizer"].get(name, [] if name == "kinds" else None)  # older files have none
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"its optimizer's {name!r} are missing or no {kind.__name__}")
    if not all(isinstance(one, tuple | list) and len(one) == 2 for one in content.get("accumulated", [])):
        raise ValueError("its 'accumulated' are no gradients")
    try:
        for state in (content["random"], *content.get("random_of_ranks", [])):
            check_random_state(state)
        for state in itertools.chain(content.get("random_of_stages", []), *content.get("random_of_replicas", [])):
            if state is not None:
                torch.Generator().set_state(state)
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"it holds no state of random numbers: {type(error).__name__} {error}") from error


def _fill(pipe: Pipeline, content: dict[str, Any]) -> None:
    pipe.load_state_dict(content["model"], strict=False)  # it has been checked, and may be of the own stages only
    if "pacing" in content:
        pipe.pacing.load_state_dict(content["pacing"])
    pipe.loss_weights.load(content.get("loss", {}))
    generators = content.get("random_of_stages", [None] * len(pipe.delays))
    if pipe.replica:  # one that is new begins with its own seed
        generators = dict(enumerate(content.get("random_of_replicas", []))).get(pipe.replica, [None] * len(generators))
    for stage in pipe.stages:
        stage.version = content["versions"][stage.index]
        stage.measured = collections.Counter(content["measured"][stage.index])
        accumulated = content["accumulated"][stage.index] if "accumulated" in content else (0, [])
        stage.accumulation.load_state(accumulated, stage.params)
        numbers = generators[stage.index]
        if stage.network_norm is not None and "norms" in content:
            stage.network_norm.known.copy_(content["norms"][stage.index])
        if stage.random is not None and numbers is not None:
            stage.random.generator.set_state(numbers)
    states = content.get("random_of_ranks", [])
    set_random_state(states[pipe.ranks.process] if len(states) == pipe.ranks.processes else content["random"])


def _by_replica(pipe: Pipeline, own: list[Any]) -> list[list[Any]]:
    """One value per replica and stage from the own stages' of every process."""
    found: list[list[Any]] = [[None] * len(pipe.delays) for _ in range(pipe.replicas)]
    for replica, stages, values in pipe.ranks.gather_all((pipe.replica, list(pipe.ranks.own), own)):
        for stage, value in zip(stages, values, strict=True):
            found[replica][stage] = value
    return found


def _stages(pipe: Pipeline) -> list[list[str]]:
    """The parameters' names of every stage."""
    return pipe.ranks.by_stage([[name for name, _ in uncompiled(s.module).named_parameters()] for s in pipe.stages])


def _shown(names: list[str]) -> str:
    return f"{len(names)} parameters, {names[0]} … {names[-1]}" if names else "no parameters"


def kinds_of(state: dict[str, Any]) -> dict[str, Kind]:
    return {n: (value.dtype, tuple(value.shape)) for n, value in state.items() if isinstance(value, torch.Tensor)}


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


def check_random_state(state: dict[str, Any]) -> None:
    """Raise what :func:`set_random_state` would, and set nothing that anybody draws from."""
    torch.Generator().set_state(state["torch"])
    random.Random().setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.RandomState().set_state((kind, keys.numpy().astype(np.uint32), *rest))


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])  # there may have been more


def without_functions(value: Any) -> Any:
    """A state_dict without the functions among its options, such as a decay rule: no file can hold those."""
    if isinstance(value, dict):
        return {k: without_functions(v) for k, v in value.items() if not holds_function(v)}
    if isinstance(value, list):
        return [without_functions(v) for v in value]
    return value
