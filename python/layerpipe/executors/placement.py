"""The device of each stage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def place(stages: Sequence[nn.Module], devices: Sequence[Any] | None, own: range | None = None) -> list[torch.device]:
    """Move every stage to its device, or find out where they are; the devices, one per stage.

    Args:
        stages: modules.
        devices: one per stage, or ``None`` to leave them where they are. A stage without weights is then where the one
            before it is.
        own: the stages of this process, by default all; the others' devices are theirs to check.

    Raises:
        ValueError: another number of devices, or one that is not there. Nothing has been moved then.
    """
    if devices is None:
        found = [_of(module) for module in stages]
        if own is not None:  # another process's stages may have no memory here
            found = [d if i in own or d is None or d.type != "meta" else None for i, d in enumerate(found)]
        last = next((device for device in found if device is not None), torch.device("cpu"))
        return [last := device or last for device in found]
    if isinstance(devices, str) or len(devices) != len(stages):
        raise ValueError(f"devices must be one per stage, {len(stages)} in all, got {devices!r}")
    own = range(len(stages)) if own is None else own
    known = [_check(i, device) if i in own else torch.device(device) for i, device in enumerate(devices)]
    for i in own:
        stages[i].to(known[i])
    return known


def _of(module: nn.Module) -> torch.device | None:
    return next((t.device for t in itertools.chain(module.parameters(), module.buffers())), None)


def _check(i: int, name: Any) -> torch.device:
    try:
        return torch.empty(0, device=name).device  # with its number
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"devices[{i}]={name!r}: {next(iter(str(error).splitlines()), '')}") from error
