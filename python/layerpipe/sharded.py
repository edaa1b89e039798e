"""A drained pipeline in a directory that every process writes its own stages into, by torch.distributed.checkpoint.

Nothing but tensors is in it, of which whatever else a state holds is one, as bytes. The directory is renamed to its
name when it is whole; until the one before it is removed, that is ``<name>.old``, read where ``<name>`` is missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader as loader
from torch.distributed.checkpoint import state_dict_saver as saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils import _pytree as pytree

from layerpipe import checkpoint, checkpoint_file
from layerpipe.errors import CheckpointError

if TYPE_CHECKING:
    from layerpipe.pipeline import Pipeline

#: Beside torch's files: what each of them hashes to.
SUMS = "layerpipe.json"
_FORMAT = 1
_STRUCTURE = "structure"  # of what was packed: everything but its tensors, whose places have their numbers
_PLACE = "\0tensor "


def save(pipe: Pipeline, path: Path, extra: dict[str, Any]) -> None:
    """Write everything that a drained pipeline goes on from. All processes call it, with a path on one file system.

    Raises:
        CheckpointError: the directory cannot be written, or other processes' files are not there.
        TypeError: ``extra`` holds something that would not be read again.
    """
    ranks = pipe.ranks
    common, own = checkpoint.content_of(pipe, extra)
    partial, first = path.with_name(path.name + ".partial"), checkpoint.own_optimizers(pipe).start
    entries: dict[str, Tensor] = {}
    if not ranks.process:
        _together(pipe, lambda: _begin(path, partial, common))
        entries.update(packed("run", common))
    else:
        _together(pipe, lambda: None)
    if not ranks.replica:  # the others have the same
        entries.update({f"model.{name}": value.detach() for name, value in own["model"].items()})  # type: ignore[union-attr]
        for i, state in enumerate(own["optimizers"], start=first):
            entries.update(packed(f"optimizers.{i}", state))
        for i, state in zip(ranks.own, own["accumulated"], strict=True):
            entries.update(packed(f"accumulated.{i}", state))
    sums = ranks.gather_all(_together(pipe, lambda: _write(pipe, partial, entries)))
    _together(pipe, lambda: None if ranks.process else _finish(path, partial, sums))


def load(pipe: Pipeline, path: Path) -> dict[str, Any]:
    """Put a directory's content into a drained pipeline of the same stages, in whatever processes.

    Returns:
        What else it holds, its ``extra``.

    Raises:
        CheckpointError: it is no checkpoint, damaged, or one of another pipeline. Nothing has been loaded then.
    """
    own, optimizers = pipe.own_state(), checkpoint.own_optimizers(pipe)
    names = {f"model.{name}" for name in own}
    parts = ["run", *(f"optimizers.{i}" for i in optimizers), *(f"accumulated.{i}" for i in pipe.ranks.own)]

    def ours(name: str) -> bool:
        return name in names or name.rpartition(".")[0] in parts

    found = _together(pipe, lambda: _read(existing(path), ours))
    content: dict[str, Any] = unpacked("run", found)
    kinds = content.get("optimizer", {}).get("kinds", [])
    states = [unpacked(f"optimizers.{i}", found) if i in optimizers else {} for i in range(len(kinds))]
    content["optimizer"] = {**content["optimizer"], "stages": states}
    content["accumulated"] = [
        unpacked(f"accumulated.{i}", found) if i in pipe.ranks.own else (0, []) for i in range(len(content["versions"]))
    ]
    content["model"] = {name.removeprefix("model."): found[name] for name in names if name in found}
    return checkpoint.put(pipe, path, content, checkpoint.kinds_of(own))


def state_dict_of(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights and buffers of a checkpoint, file or directory, as an ordinary ``state_dict`` of the whole model.

    For instance for ``safetensors.torch.save_file``.

    Raises:
        FileNotFoundError: it is not there.
        CheckpointError: it is no checkpoint, or damaged.
    """
    where = existing(Path(path))
    if not where.is_dir():
        model: dict[str, Tensor] = checkpoint_file.read(where)["model"]
        return model
    found = _read(where, lambda name: name.startswith("model."))
    return {name.removeprefix("model."): value for name, value in found.items()}


def existing(path: Path) -> Path:
    """The checkpoint of this name, or the one before it where somebody was stopped between the two."""
    old = path.with_name(path.name + ".old")
    return old if old.exists() and not path.exists() else path


def packed(prefix: str, value: Any) -> dict[str, Tensor]:
    """A structure of tensors, numbers, strings, lists and dicts as named tensors."""
    tensors: list[Tensor] = []

    def place(tensor: Tensor) -> str:
        tensors.append(tensor.detach())
        return f"{_PLACE}{len(tensors) - 1}"

    file = io.BytesIO()
    torch.save(pytree.tree_map_only(Tensor, place, value), file)
    structure = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return {f"{prefix}.{_STRUCTURE}": structure, **{f"{prefix}.{i}": tensor for i, tensor in enumerate(tensors)}}


def unpacked(prefix: str, found: dict[str, Tensor]) -> Any:
    """Return what :func:`packed` was given.

    Raises:
        CheckpointError: it is not there.
    """

    def placed(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(_PLACE):
            return found[f"{prefix}.{value.removeprefix(_PLACE)}"]
        return value

    try:
        file = io.BytesIO(found[f"{prefix}.{_STRUCTURE}"].numpy().tobytes())
        return pytree.tree_map(placed, torch.load(file, weights_only=True))
    except KeyError as error:
        raise CheckpointError(f"the checkpoint has no {error}: it is of another pipeline") from None


def _together(pipe: Pipeline, call: Callable[[], Any]) -> Any:
    """Return what a call returns here; where it raises in one process, it does in all."""
    value, error = None, None
    try:
        value = call()
    except Exception as caught:
        error = caught
    pipe.ranks.agree(error, CheckpointError)
    return value


def _begin(path: Path, partial: Path, common: dict[str, Any]) -> None:
    if path.is_file():
        raise CheckpointError(f"{path} is a file; a sharded checkpoint is a directory")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    checkpoint_file.write(partial / "check", common)  # raises where it would not be read again
    (partial / "check").unlink()


def _write(pipe: Pipeline, partial: Path, entries: dict[str, Tensor]) -> dict[str, str]:
    """Write this process's entries; what its files hash to."""
    group = pipe.ranks.everyone
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group, where there is one process
        saver.save(entries, storage_writer=FileSystemWriter(partial), process_group=group, no_dist=group is None)
    return {file.name: _sum(file) for file in partial.glob(f"__{pipe.ranks.process}_*")}


def _finish(path: Path, partial: Path, sums: list[dict[str, str]]) -> None:
    """Give the directory its name."""
    known = {name: value for each in sums for name, value in each.items()}
    missing = sorted(known.keys() - {file.name for file in partial.iterdir()})
    if missing:
        raise CheckpointError(f"{missing[0]} of another process is not in {partial}: all must share its file system")
    known[".metadata"] = _sum(partial / ".metadata")
    with (partial / SUMS).open("w") as file:
        json.dump({"layerpipe": _FORMAT, "sha256": known}, file)
        file.flush()
        os.fsync(file.fileno())
    old = path.with_name(path.name + ".old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def _read(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The entries whose names are wanted, from files that are as they were written."""
    if not path.exists():
        raise FileNotFoundError(2, "no such checkpoint", str(path))
    try:
        sums = json.loads((path / SUMS).read_text())
        if sums["layerpipe"] != _FORMAT:
            raise CheckpointError(f"{path} has format {sums['layerpipe']}, this version reads {_FORMAT}")
        _check(path, ".metadata", sums["sha256"])
        reader = FileSystemReader(path)
        metadata = reader.read_metadata()
        known = {
            name: kind
            for name, kind in metadata.state_dict_metadata.items()
            if wanted(name) and isinstance(kind, TensorStorageMetadata)
        }
        files = {info.relative_path for index, info in metadata.storage_data.items() if index.fqn in known}
        for name in sorted(files):
            _check(path, name, sums["sha256"])
        entries = {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in known.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader.load(entries, storage_reader=reader, no_dist=True)
    except CheckpointError:
        raise
    except Exception as error:  # of what is something else, readers may raise anything
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{path} is no checkpoint: {type(error).__name__} {reason}") from error
    return entries


def _check(path: Path, name: str, sums: dict[str, str]) -> None:
    if not (path / name).exists() or _sum(path / name) != sums.get(name):
        raise CheckpointError(
            f"{path} is damaged: {name} does not have the checksum that it was written with; go on from a copy, or "
            "begin anew"
        )


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
