"""Sizes that a model cannot have: beyond what torch counts in, or what the memory holds."""

from __future__ import annotations

import torch

#: More layers than this are not made one after the other.
MOST_LAYERS = 10_000

#: What torch raises for a size of the wrong type, one of more than 64 bits, or a tensor that it cannot allocate.
IMPOSSIBLE = (TypeError, RuntimeError, MemoryError, OverflowError)


def reason(error: BaseException) -> str:
    """The first line of what torch says; frames of C++ may follow."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of a device was too small; the CPU's allocator has no exception of its own for that."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
