"""Saved-tensor hooks that a forward sets itself, besides those of its stage.

torch has one stack of such hooks per thread, and only the topmost are called. So what is saved under hooks that a
forward enters itself (``save_on_cpu``, ``torch.utils.checkpoint``) passes a stage's by, and ``torch.func`` refuses to
run under any. torch says nothing about either afterwards: its functions have to say so when they are called.
"""

from __future__ import annotations

import functools
import threading
from typing import Any, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointFunction

_C: Any = torch._C._autograd
running = threading.local()  # .stage: whose forward this thread runs


class Watched(Protocol):
    """The hooks of one stage."""

    unseen: bool  # whether anything may have been saved that they have not seen
    lifted: bool  # whether they are off the stack

    def push(self) -> None: ...

    def pop(self) -> None: ...

    def on_top(self) -> bool: ...


def _told() -> Watched | None:
    return getattr(running, "stage", None)


@functools.cache
def tell_of_other_hooks() -> None:
    """Let torch tell a running stage of hooks and reentrant checkpoints within its forward, and take its own hooks away
    where none are allowed.

    Outside a stage's forward everything is as it was.
    """
    enter, disable, enable = (
        saved_tensors_hooks.__enter__,
        _C._saved_tensors_hooks_disable,
        _C._saved_tensors_hooks_enable,
    )

    @functools.wraps(enter)
    def told_enter(hooks: saved_tensors_hooks) -> None:
        stage = _told()
        if stage is not None:
            stage.unseen = True
        enter(hooks)

    @functools.wraps(disable)
    def told_disable(*args: Any, **kwargs: Any) -> None:
        stage = _told()
        if stage is not None and not stage.lifted and stage.on_top():
            stage.unseen = stage.lifted = True
            stage.pop()
        disable(*args, **kwargs)

    @functools.wraps(enable)
    def told_enable() -> None:
        enable()
        stage = _told()
        if stage is not None and stage.lifted:
            stage.lifted = False
            stage.push()

    recomputed: Any = CheckpointFunction.forward

    @functools.wraps(recomputed)
    def told_forward(*args: Any, **kwargs: Any) -> Any:
        stage = _told()
        if stage is not None:
            stage.unseen = True
        return recomputed(*args, **kwargs)

    CheckpointFunction.forward = staticmethod(told_forward)  # type: ignore[method-assign]
    saved_tensors_hooks.__enter__ = told_enter  # type: ignore[method-assign]
    _C._saved_tensors_hooks_disable, _C._saved_tensors_hooks_enable = told_disable, told_enable
