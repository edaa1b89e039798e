"""Stages on the meta device, of which a process makes only its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from layerpipe.executors.ranks import Ranks

#: Gives the modules of a process, in order, memory and values.
Materialize = Callable[[list[nn.Module]], Any]


def materialize(stages: Sequence[nn.Module], ranks: Ranks, make: Materialize | None) -> None:
    """Have this process's stages made, where they are on the meta device.

    Raises:
        ValueError: one of them is there afterwards.
        Exception: what ``make`` raised; a RuntimeError where it was in another process.
    """
    error: Exception | None = None
    own = {i: stages[i] for i in ranks.own}
    try:
        if make is not None:
            make(list(own.values()))
        for i, module in own.items():
            for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
                if tensor.is_meta:
                    raise ValueError(
                        f"{name} of stage {i} ({type(module).__name__}) is on the meta device and has no values; give "
                        "materialize= the method of that name of layerpipe.deferred_init(), or a function of your own "
                        "that loads the stages it is given"
                    )
    except Exception as caught:
        error = caught
    ranks.agree(error, RuntimeError)
