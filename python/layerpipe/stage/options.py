"""A stage's optimizer: its options as they change from tick to tick, and what it must be like."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerpipe.stage.step import check_step
from layerpipe_kernels.optim.checkpoint import GROUP_STATE

#: Of one stage: a dict per parameter group.
Options = list[dict[str, Any]]

#: What does not travel between the common view and a stage, whose own optimizer counts its updates.
OWN = ("params", "param_names", *GROUP_STATE)

_OWN = frozenset(OWN)
_MISSING = object()
_PLAIN = frozenset((bool, int, float, str, type(None)))  # nothing else is to be known of a value of these


class StageOptions:
    """The options of one stage's parameter groups. Two sides change them: the caller, on the common view of all
    stages, and the optimizer itself, where its step keeps a count or an estimate there.

    What the caller has changed goes into the groups and nothing else does; what the optimizer has changed is shown in
    the view by :meth:`show`. Where both have changed one option, the caller's value counts.

    Args:
        optimizer: the stage's.

    Attributes:
        taken: the caller's options that :meth:`take` was last given.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.reset()

    def reset(self) -> None:
        """The groups have been replaced, by a checkpoint's: the caller has changed nothing of them yet."""
        self.taken = [frozen_options(group) for group in self.optimizer.param_groups]

    def take(self, options: Options) -> None:
        """Give the groups what the caller changed between the options taken before and these, which are all of them."""
        for group, before, now in zip(self.optimizer.param_groups, self.taken, options, strict=True):
            for key in [key for key, value in now.items() if before.get(key, _MISSING) is not value]:
                if not same(before.get(key, _MISSING), now[key]):
                    _put(group, key, now[key])
        self.taken = options

    def show(self, views: Sequence[dict[str, Any]]) -> None:
        """Write what the optimizer changed into the caller's view of the groups. No step may run meanwhile."""
        shown = [{**taken} for taken in self.taken]  # others may hold what was taken
        for group, taken, view in zip(self.optimizer.param_groups, shown, views, strict=True):
            for key, value in group.items():
                old = taken.get(key, _MISSING)
                if key in OWN or same(old, value) or not same(view.get(key, old), old):
                    continue
                _put(view, key, on_host(key, value))
                taken[key] = frozen(value)
        self.taken = shown


def on_host(key: str, value: Any) -> Any:
    """An option for the caller's view, which shares no memory with the optimizer's that either side may write to. Only
    a learning rate on the CPU stays the tensor that it is: a scheduler fills it."""
    return value if key == "lr" and isinstance(value, Tensor) and value.is_cpu else frozen(value)


def frozen(value: Any) -> Any:
    """An option as it is now: of a tensor with one element the number, of all else that may change in place a copy."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.detach().cpu().clone()
    return copy.deepcopy(value) if changes_in_place(value) else value


def frozen_options(group: dict[str, Any]) -> dict[str, Any]:
    """All options of a group as they are now."""
    plain = _PLAIN
    return {k: v if type(v) in plain else frozen(v) for k, v in group.items() if k not in _OWN}


def holds_what_changes(group: dict[str, Any]) -> bool:
    """Return whether an option of a group may change and stay the same object."""
    plain = _PLAIN
    return any(changes_in_place(v) for k, v in group.items() if type(v) not in plain and k not in _OWN)


def changes_in_place(value: Any) -> bool:
    """Return whether a value may change and stay the same object: a tensor, an array, a list."""
    if type(value) in _PLAIN:
        return False
    if isinstance(value, Tensor):
        return True
    try:
        hash(value)
    except TypeError:
        return True
    return False


def same(a: Any, b: Any) -> bool:
    """Return whether two values of an option are equal; a number and a tensor of one element, in the tensor's
    precision."""
    if a is b:
        return True
    if isinstance(b, Tensor):
        a, b = b, a
    if isinstance(a, Tensor):
        if isinstance(b, Tensor):
            return a.shape == b.shape and torch.equal(a.detach().cpu(), b.detach().cpu())
        if not isinstance(b, int | float) or a.numel() != 1:
            return False
        return bool(a.item() == (torch.tensor(b, dtype=a.dtype).item() if a.is_floating_point() else b))
    try:
        return bool(a == b)
    except Exception:  # arrays of other shapes, of several elements
        return False


def _put(group: dict[str, Any], key: str, value: Any) -> None:
    """A tensor stays the object that it is and changes its values, where they fit."""
    old = group.get(key)
    if isinstance(old, Tensor) and isinstance(value, int | float) and old.numel() == 1:
        old.detach().fill_(value)
    elif isinstance(old, Tensor) and isinstance(value, Tensor) and old.shape == value.shape:
        old.detach().copy_(value)
    else:
        group[key] = copy.deepcopy(value) if changes_in_place(value) else value


def set_staleness(optimizer: Any, updates: float) -> None:
    """Tell an optimizer that wants to know how many updates late its gradients come from the next minibatch on."""
    tell = getattr(optimizer, "set_staleness", None)
    if tell is not None:
        tell(updates)


def check_stage(stage: str, module: nn.Module, optimizer: Any, delay: int, accumulate: int = 1) -> None:
    """Refuse an optimizer that a stage's factory made and that cannot serve it.

    Raises:
        ValueError: it lacks a parameter, or a group was made for another delay or for none.
        TypeError: its step needs a closure, or a delay needs past weights, and it does not know them or cannot begin
            them anew, or, where gradients accumulate, knows only those of the delay.
    """
    check_step(stage, optimizer)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in module.named_parameters() if p.requires_grad and p not in held]
    if missing:
        raise ValueError(f"{stage}: the optimizer was given {missing[0]}, but holds it in no parameter group")
    if not delay:
        return
    advice = "optimizer=lambda params, **past: layerpipe_kernels.SGD(params, lr=..., **past)"
    for method in ("past_view", "restart_history"):
        if not hasattr(optimizer, method):
            raise TypeError(
                f"{stage} gets its gradients {delay} updates late, and {type(optimizer).__name__} does not know its "
                f"past weights: it has no {method}; use layerpipe_kernels.SGD and pass it the pipeline's keywords: "
                f"{advice}"
            )
    if accumulate > 1 and len(inspect.signature(optimizer.past_view).parameters) < 2:
        raise TypeError(
            f"{stage} makes one update in {accumulate} minibatches, which come back different numbers of updates late, "
            f"and {type(optimizer).__name__}.past_view takes no such number; use an optimizer of layerpipe_kernels, or "
            "layerpipe_kernels.PastWeights around another one"
        )
    for group in optimizer.param_groups:
        if group.get("delay") != delay:
            raise ValueError(
                f"{stage} has a delay of {delay}, a parameter group of its optimizer one of {group.get('delay')}; pass "
                f"the pipeline's keywords on: {advice}"
            )
