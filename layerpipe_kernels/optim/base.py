"""What our optimizers share: a history per parameter group and a clock that counts its updates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels import backend, history, reference

Group = dict[str, Any]

#: The options that every optimizer here takes besides torch's own.
PAST_DEFAULTS: dict[str, Any] = {
    "delay": 0,
    "past": "blend",
    "order": 2,
    "ema_decay": None,
    "ema_of": "update",
    "ema_dtype": None,
    "materialize": False,
    "master_weights": False,
    "backend": "auto",
    "seed": 0,
}

#: The options that decide how a group has its past weights.
_DESIGNED_BY = ("delay", "past", "order", "ema_decay", "ema_of", "materialize", "backend", "seed", "nesterov")

#: State that need not be of its parameter's dtype, which torch gives it when it loads.
FULL_PRECISION = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema", "master")

#: What a parameter's state holds for its past; the rest is the optimizer's own.
HISTORY_KEYS = ("ema", "stash", "past")


class PastOptimizer(torch.optim.Optimizer):
    """A :class:`torch.optim.Optimizer` whose step also keeps what past weights are made of.

    Every parameter group has a clock, ``group["updates"]``: the number of updates since the delays began to fill. All
    its parameters age together; one without a gradient in some step was updated by zero there.

    With ``delay=0`` nothing extra is kept and :meth:`past_weight` is the weight itself.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._reset_caches()

    def _reset_caches(self) -> None:
        self._histories: dict[int, tuple[Any, history.History]] = {}
        self._group_of: dict[Tensor, Group] = {}
        # Per group: what its past weights are made with after the update that the clock shows.
        self._ready: dict[int, tuple[history.Clock, history.History | None, history.Mixture | None]] = {}
        self._still: set[Tensor] = set()  # parameters without a gradient in the last step

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in {**PAST_DEFAULTS, "updates": 0, "last_lr": 0.0}.items():
                group.setdefault(key, value)
        self._reset_caches()

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("updates", 0)
        group.setdefault("last_lr", 0.0)
        try:
            self._check_group(group)
        except Exception:
            self.param_groups.pop()
            raise
        self._reset_caches()

    def _check_group(self, group: Group) -> None:
        delay = group["delay"]
        if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
            raise ValueError(f"delay must be a whole number of updates, at least 0, got {delay!r}")
        for i, param in enumerate(group["params"]):
            if not param.dtype.is_floating_point:
                raise TypeError(
                    f"parameter {self.name(group, i)} of dtype {param.dtype} is not supported; "
                    "only real floating-point parameters are"
                )
        if group["ema_dtype"] not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"ema_dtype must be torch.float32 or torch.bfloat16, got {group['ema_dtype']}")
        if group["past"] not in history.KINDS:
            raise ValueError(f"past={group['past']!r} is unknown; there are: {', '.join(history.KINDS)}")
        backend.choose(group["params"][0], group["backend"])
        if delay:
            history.make(group["past"], self._settings(group))

    def _settings(self, group: Group) -> history.Settings:
        momentum = group.get("momentum", 0.0)
        return history.Settings(
            delay=group["delay"],
            order=group["order"],
            ema_decay=group["ema_decay"],
            ema_of=group["ema_of"],
            momentum=momentum,
            nesterov=group.get("nesterov", False),
            correlation=group["betas"][0] if "betas" in group else momentum,
            newest=momentum > 0 and not group.get("nesterov", False),
            materialize=group["materialize"],
            backend=group["backend"],
            seed=group["seed"],
        )

    def name(self, group: Group, i: int) -> str:
        """How messages call a group's ``i``-th parameter."""
        if "param_names" in group:
            return repr(group["param_names"][i])
        at = next((k for k, g in enumerate(self.param_groups) if g is group), len(self.param_groups))
        return f"param_groups[{at}]['params'][{i}]"

    def history(self, group: Group) -> history.History | None:
        """How this group has its past weights; ``None`` for a delay of 0."""
        if not group["delay"]:
            return None
        # A schedule may move the momentum in every step; a design for the first one stays good, and its averages valid.
        made_for = (*map(group.get, _DESIGNED_BY), bool(group.get("momentum", 0.0)))
        made = self._histories.get(id(group))
        if made is None or made[0] != made_for:
            made = self._histories[id(group)] = made_for, history.make(group["past"], self._settings(group))
        return made[1]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, of this optimizer or of torch's.

        Options that a torch checkpoint does not have stay as they are here. State of half-precision parameters keeps
        its float32, which torch would round to the parameters' dtype.
        """
        groups = [
            {**{k: v for k, v in own.items() if k not in ("params", "param_names")}, **saved}
            for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False)
        ]
        if len(groups) == len(state_dict["param_groups"]):  # else torch says what does not fit
            state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict(state_dict)
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, index in zip(own["params"], saved["params"], strict=True):
                full = reference.state_dtype(param.dtype)
                for key in FULL_PRECISION:
                    value = state_dict["state"].get(index, {}).get(key)
                    dtype = value.dtype if key == "ema" and value is not None else full
                    if value is not None and self.state[param][key].dtype != dtype:
                        self.state[param][key] = value.to(device=param.device, dtype=dtype, copy=True)

    def past_view(self, param: Tensor) -> Tensor:
        """Like :meth:`past_weight`, but may return memory that the next step overwrites. For one backward."""
        return self._past(param, None)

    def _past(self, param: Tensor, out: Tensor | None) -> Tensor:
        group = self._find(param)
        clock = history.Clock(group["updates"], group["last_lr"])
        ready = self._ready.get(id(group))
        if ready is None or ready[0] != clock:
            past = self.history(group)
            ready = self._ready[id(group)] = clock, past, past.mixture(clock) if past is not None else None
        _, past, mixture = ready
        if past is None or mixture is None:
            return history.copy_into(out, param.detach())
        state = self.state[param]
        if "past" in state and group["updates"]:
            return history.copy_into(out, state["past"])
        return past.past(param, state, mixture, moved=param not in self._still, out=out)

    def past_weight(self, param: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The weights of ``min(updates, delay)`` updates ago, as this parameter's history has them.

        Args:
            param: one of this optimizer's parameters, ``(*)``.
            out: ``(*)``, its dtype and device; written and returned. A fresh tensor if not given.

        Raises:
            KeyError: the parameter is not in this optimizer.
            ValueError: ``out`` does not fit.
        """
        if out is not None and (out.shape, out.dtype, out.device) != (param.shape, param.dtype, param.device):
            raise ValueError(
                f"out must be {tuple(param.shape)} {param.dtype} on {param.device}, "
                f"got {tuple(out.shape)} {out.dtype} on {out.device}"
            )
        return self._past(param, torch.empty_like(param, requires_grad=False) if out is None else out)

    def _find(self, param: Tensor) -> Group:
        if not self._group_of:
            self._group_of = {p: group for group in self.param_groups for p in group["params"]}
        group = self._group_of.get(param)
        if group is None:
            raise KeyError(f"the parameter of shape {tuple(param.shape)} is not in this optimizer")
        return group

    def restart_history(self) -> None:
        """Forget the past: the pipeline is empty, and the next ``delay`` updates are exact again."""
        for group in self.param_groups:
            group["updates"] = 0

    def history_bytes(self) -> int:
        """Bytes kept for past weights, the weights themselves and the optimizer's own state not counted."""
        return sum(s[k].nbytes for s in self.state.values() for k in HISTORY_KEYS if k in s)

    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's own state."""
        return sum(
            v.nbytes
            for s in self.state.values()
            for k, v in s.items()
            if k not in HISTORY_KEYS and isinstance(v, Tensor)
        )


def require_finite(group: Group, names: Iterable[str]) -> None:
    """Refuse a NaN hyperparameter before it reaches the weights."""
    for name in names:
        value = float(group[name])
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; refusing to step")
