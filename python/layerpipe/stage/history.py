"""Finds the parameters of a stage that have a past."""

from __future__ import annotations

from typing import Any

from torch import nn

from layerpipe_kernels.optim import PastWeights
from layerpipe_kernels.optim.checkpoint import GROUP_STATE


def drop_history(optimizer: Any, params: set[nn.Parameter]) -> set[nn.Parameter]:
    """Give these parameters of an optimizer a delay of 0, in a group of their own where others share theirs; returns
    those that have it then. A wrapped optimizer's groups are not divided: it may keep what belongs to a whole group."""
    dropped: set[nn.Parameter] = set()
    for group in list(optimizer.param_groups):
        ours = [p for p in group["params"] if p in params]
        whole = len(ours) == len(group["params"])
        if not ours or (isinstance(optimizer, PastWeights) and not whole):
            continue
        dropped.update(ours)
        if whole:
            group["delay"] = 0
            continue
        names = group.pop("param_names", None)
        kept = [i for i, p in enumerate(group["params"]) if p not in params]
        moved = [i for i, p in enumerate(group["params"]) if p in params]
        # Their gradients are as late as the others'.
        options = {k: v for k, v in group.items() if k not in ("params", *GROUP_STATE) or k == "staleness"}
        members: list[Any] = group["params"]
        group["params"] = [members[i] for i in kept]
        added = [members[i] for i in moved]
        if names is not None:
            group["param_names"] = [names[i] for i in kept]
            added = [(names[i], members[i]) for i in moved]
        optimizer.add_param_group({**options, "params": added, "delay": 0})
    return dropped
