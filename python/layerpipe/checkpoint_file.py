"""The file that a checkpoint is: always whole, and refused if a single bit of it is another.

What ``torch.save`` writes is a zip archive. Its comment, the last bytes of the file, is the SHA-256 of all bytes
before; ``torch.load`` reads it as any other.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from layerpipe.errors import CheckpointError

#: Format 1 had no checksum of its own.
FORMAT = 2
_MARK = b"sha256:"
_HEX = 64  # characters of a SHA-256
_END = struct.Struct("<4s16xH")  # a zip archive's last record: its signature, and the length of the comment after it


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file in one move, once all of it is on the disk: whoever dies meanwhile leaves the one before.

    What is half written lies beside it as ``<name>.partial`` and is overwritten the next time.

    Raises:
        OSError: it cannot be written. The file before is still there, as it is after a
        TypeError: the content holds something that :func:`read` would refuse.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb+") as file:
            _save({"layerpipe": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(partial):
            raise TypeError(
                f"{path} would not be readable with {', '.join(unsafe)} in it; give checkpoint() tensors, numbers, "
                "strings, lists and dicts of them"
            )
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
    """Return what :func:`write` wrote, on the CPU. Runs no code from the file.

    Files of format 1, which have no checksum, are held to those that their zip archive has of every tensor.

    Raises:
        FileNotFoundError: it is not there.
        CheckpointError: it is something else, damaged, or of a version that this one does not know.
    """
    try:
        with path.open("rb") as file:
            signed = _check(path, file)
            try:
                content = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # of bytes that are something else, the unpickler may raise anything
                reason = next(iter(str(error).splitlines()), "")
                raise CheckpointError(f"{path} is no checkpoint: {type(error).__name__} {reason}") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict) or "layerpipe" not in content:
        raise CheckpointError(f"{path} is no checkpoint of layerpipe")
    if content["layerpipe"] not in (1, FORMAT):
        raise CheckpointError(f"{path} has format {content['layerpipe']}, this version reads 1 to {FORMAT}")
    if content["layerpipe"] == FORMAT and not signed:
        raise _damaged(path, "its checksum is missing")
    return content


class _Disk:
    """A file for torch, which of a full disk says that it met something unexpected: keeps what the disk said."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(content: dict[str, Any], file: BinaryIO) -> None:
    """Write the archive, and its checksum into the comment that ends it."""
    disk = _Disk(file)
    try:
        torch.save(content, disk)  # type: ignore[arg-type]
    except RuntimeError:
        if disk.error is not None:
            raise disk.error from None
        raise
    file.seek(-_END.size, os.SEEK_END)
    signature, comment = _END.unpack(file.read())
    assert (signature, comment) == (b"PK\5\6", 0)
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", len(_MARK) + _HEX) + _MARK)
    end = file.tell()
    digest = _digest(file, end)
    file.seek(end)
    file.write(digest)


def _check(path: Path, file: BinaryIO) -> bool:
    """Return whether the file has a checksum; it is left at its beginning.

    Raises:
        CheckpointError: the checksum, or one of the archive's own, is not that of what is there.
    """
    end = file.seek(0, os.SEEK_END) - _HEX
    if end < _END.size + len(_MARK):
        raise CheckpointError(f"{path} is no checkpoint: it has {end + _HEX} bytes")
    file.seek(end - len(_MARK))
    mark, digest = file.read(len(_MARK)), file.read(_HEX)
    signed = mark == _MARK
    if signed:
        if _digest(file, end) != digest:
            raise _damaged(path, "its bytes do not have the checksum that they were written with")
    elif zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as archive:
                record = archive.testzip()
        except Exception as error:  # of bytes that are something else, it may raise anything
            raise _damaged(path, f"{type(error).__name__} {error}") from error
        if record is not None:
            raise _damaged(path, f"{record} does not have the checksum that it was written with")
    file.seek(0)
    return signed


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {how}; go on from a copy, or begin anew")


def _digest(file: BinaryIO, end: int) -> bytes:
    """The SHA-256 of the bytes up to there, as text."""
    digest, left = hashlib.sha256(), end
    file.seek(0)
    while left and (block := file.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest().encode()
