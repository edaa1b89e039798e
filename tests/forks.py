"""Processes that begin with everything imported, which takes seconds: forked from one that has done nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
#: What is not installed is left out.
_CONTEXT.set_forkserver_preload(
    ["layerpipe", "layerpipe.cli.app", "matplotlib.pyplot", "sklearn.datasets", "torch._dynamo"]
)


def start(function: Callable[..., Any], *args: Any) -> tuple[Any, Connection]:
    """A process that calls ``function(*args, pipe)``, and the other end of that pipe."""
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=function, args=(*args, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours
