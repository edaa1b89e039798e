"""Checkpoints that torch's optimizers and ours can read of each other, and in which nothing is lost."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerpipe_kernels import reference
from layerpipe_kernels.past import Past

if TYPE_CHECKING:
    from layerpipe_kernels.optim.base import PastOptimizer
    from layerpipe_kernels.optim.options import Group

StateDict = dict[str, Any]

#: What a parameter's state holds for its past; the rest is the optimizer's own.
HISTORY_KEYS = ("ema", "stash", "past", "norms")

#: Where a matrix is preconditioned: its gradients' products with themselves, and the bases that it is turned into.
PRECONDITIONER = ("gram_left", "gram_right", "basis_left", "basis_right")

#: And for the prediction of its weights: the last update, and in evaluation the weights to train with; for an optimizer
#: around another one, the last update that the other one made.
PREDICTION_KEYS = ("previous_update", "train_weight", "wrapped_update")

#: State that need not be of its parameter's dtype, which torch gives it when it loads.
FULL_PRECISION = (
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema", "master", "norms"),
    *("previous_update", "wrapped_update"),
    *PRECONDITIONER,
)

#: State that an option may have in 16 bits.
_MAY_BE_NARROW = ("ema", *PRECONDITIONER)

#: A group's place in time, and the correlation of updates that its averages were designed for: SGD's momentum or Adam's
#: beta1, which a schedule may move; ``None`` asks for a new design. As they begin. These go with the averages and not
#: with the options.
CLOCK: dict[str, Any] = {"updates": 0, "last_lr": 0.0, "designed_for": None}

#: All that a group holds besides its options and parameters, as it begins: its clock, how late its gradients are
#: (``None``: by its delay), by how many updates its weights are predicted, and whether they are those to train with.
GROUP_STATE: dict[str, Any] = {**CLOCK, "staleness": None, "horizon": 0.0, "horizon_at": None, "train_mode": True}

#: In a checkpoint: the last update did not reach this parameter, so its momentum buffer is not the newest update.
NOT_UPDATED = "not_updated"


def by_parameter(state: Mapping[Any, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    """Returns the parameters' entries of an optimizer's state, which may have others, as torch allows."""
    return [(param, entry) for param, entry in state.items() if isinstance(param, Tensor)]


def without(names: Collection[str], entry: Any) -> Any:
    """Returns a parameter's entry of an optimizer's state without these arrays; another entry as it is."""
    return {k: v for k, v in entry.items() if k not in names} if isinstance(entry, dict) else entry


def without_unmoved(packed: StateDict, keeps_state: list[bool]) -> StateDict:
    """Returns a state_dict without the history of parameters that never had a gradient.

    torch's optimizers expect their own state wherever there is any, and the past of these is their present.

    Args:
        packed: a state_dict.
        keeps_state: per group, whether a step gives its parameters state of the optimizer's own.
    """
    indices = {
        i for group, own in zip(packed["param_groups"], keeps_state, strict=True) if own for i in group["params"]
    }
    state = {i: s for i, s in packed["state"].items() if i not in indices or not s.keys() <= {*HISTORY_KEYS}}
    return {**packed, "state": state}


def mark(packed: StateDict, params: list[Tensor], without_grad: set[Tensor], fresh: set[Tensor]) -> StateDict:
    """Returns a state_dict with marks for parameters that were not updated; an empty momentum buffer is ``None``."""
    indices = [index for group in packed["param_groups"] for index in group["params"]]
    state = dict(packed["state"])
    for index, param in zip(indices, params, strict=True):
        entry = state.get(index)
        if not entry or "momentum_buffer" not in entry:
            continue
        if param in without_grad:
            state[index] = {**entry, NOT_UPDATED: True}
        if param in fresh:
            state[index] = {**state[index], "momentum_buffer": None}
    return {**packed, "state": state}


def without_functions(packed: StateDict) -> StateDict:
    """Returns a state_dict that can be loaded with ``weights_only=True``, without a past whose decay is a function: the
    optimizer that loads it keeps its own."""
    groups = [{k: v for k, v in g.items() if not isinstance(v, Past)} for g in packed["param_groups"]]
    return {**packed, "param_groups": groups}


def with_options(groups: list[Group], state_dict: StateDict) -> StateDict:
    """Options that a torch checkpoint does not have stay as they are here; a clock that it does not have starts. The
    backend stays in any case: it is a matter of the machine."""
    saved = state_dict["param_groups"]
    if len(groups) != len(saved):
        return state_dict  # torch says what does not fit
    kept = [{k: v for k, v in own.items() if k not in ("params", "param_names", *GROUP_STATE)} for own in groups]
    merged = [{**own, **other, "backend": own["backend"]} for own, other in zip(kept, saved, strict=True)]
    return {**state_dict, "param_groups": merged}


def restore_precision(groups: list[Group], state: dict[Tensor, Any], saved: StateDict) -> None:
    """Take state from the checkpoint again in its dtype, which torch has cast to the parameter's."""
    for own, other in zip(groups, saved["param_groups"], strict=True):
        for param, index in zip(own["params"], other["params"], strict=True):
            for key in FULL_PRECISION:
                value = saved["state"].get(index, {}).get(key)
                if value is None:
                    continue
                if key == "master" and reference.state_dtype(param.dtype) == param.dtype:
                    del state[param][key]  # the weight itself is as precise
                    continue
                dtype = kept_dtype(key, value, param)
                if state[param][key].dtype != dtype:
                    state[param][key] = value.to(device=param.device, dtype=dtype, copy=True)


def kept_dtype(key: str, value: Tensor, param: Tensor) -> torch.dtype:
    """Returns the dtype in which a parameter's state keeps what was saved, perhaps for a parameter of another dtype."""
    full = reference.state_dtype(param.dtype)
    if key not in FULL_PRECISION:
        return param.dtype
    return value.dtype if key in _MAY_BE_NARROW and value.dtype == torch.bfloat16 and full == torch.float32 else full


def restart_where_lost(optimizer: PastOptimizer, state: dict[Tensor, Any], saved: StateDict) -> None:
    """Let a group that trained without averages fill its delay anew, with a warning."""
    for i, (own, other) in enumerate(zip(optimizer.param_groups, saved["param_groups"], strict=True)):
        history = optimizer.history(own)
        # Norms alone are those of a parameter that never had a gradient.
        indices = zip(own["params"], other["params"], strict=True)
        trained = [p for p, index in indices if saved["state"].get(index, {}).keys() - {"norms"}]
        if history is None or not trained:
            continue
        if "updates" in other and all(history.remembers(state.get(p, {})) for p in trained):
            continue
        own.update(CLOCK)
        if history.settings.past.kind != "latest":
            warnings.warn(
                f"the loaded state of param_groups[{i}] has no past (past={own['past']!r}, delay={own['delay']}); it "
                f"begins anew, as if the next update were the first",
                stacklevel=3,
            )


def move_clock(group: Group, device: torch.device) -> None:
    """Move a group's clock, and the rest of its state, to the device of its parameters."""
    for key in GROUP_STATE:
        if isinstance(group[key], Tensor):
            group[key] = group[key].to(device, copy=True)
