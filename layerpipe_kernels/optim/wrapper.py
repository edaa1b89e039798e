"""Past weights for every other optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from layerpipe_kernels import history, layout, reference
from layerpipe_kernels.optim import checkpoint
from layerpipe_kernels.optim.averaging import AveragingOptimizer
from layerpipe_kernels.optim.base import PastOptimizer
from layerpipe_kernels.optim.checkpoint import CLOCK, GROUP_STATE, HISTORY_KEYS, PREDICTION_KEYS
from layerpipe_kernels.optim.options import PAST_DEFAULTS, Group, PastOptions, past_options
from layerpipe_kernels.optim.prediction import horizon_of, newest_share, predicts
from layerpipe_kernels.past import Past

#: What this optimizer keeps in a parameter's state, beside the wrapped one's.
_OWN = (*HISTORY_KEYS, *PREDICTION_KEYS)


class PastWeights(AveragingOptimizer):
    """Wraps any :class:`torch.optim.Optimizer`, and returns its past weights.

    It steps the optimizer it is given and takes the difference of the weights before and after as the update. For that
    it holds one more copy of the weights during a step, unless the kind of past needs no updates (``"stash"``,
    ``"latest"``). Parameter groups are the optimizer's own, so schedulers may be given either; its state stays in
    ``optimizer.state``, and :meth:`state_dict` has both. That is why ``torch.distributed.checkpoint`` must not flatten
    it (``flatten_optimizer_state_dict``): it would load only what it finds in this optimizer's own state.

    Args:
        optimizer: steps on dense weights, without gaps in memory.
        delay, past, backend: as in :class:`layerpipe_kernels.AdamW`; a group may have its own.
        spike_compensation: ``c``, applied to the wrapped optimizer's updates ``r``: ``u = (1 - b) r + b (r - beta r_) /
            (1 - beta)`` with the update ``r_`` before, ``b = 1 - beta**(c n)`` and ``beta`` the group's momentum or
            first beta. That is what :class:`layerpipe_kernels.SGD` does with momentum at a constant learning rate; for
            other optimizers it is a likeness. It keeps ``r_``.
        weight_prediction: ``h``, as in :class:`layerpipe_kernels.SGD`. While the wrapped optimizer steps, its
            parameters hold ``W``. A closure is evaluated once, before, at the predicted weights.

    Raises:
        TypeError: not an optimizer, or one that knows its past weights itself.
        ValueError: an option out of its range, options that contradict each other, or an optimizer that is wrapped
            already.
    """

    writes_gradients = True  # as far as we know

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        delay: int,
        past: str | Past = "blend",
        spike_compensation: float = 0.0,
        weight_prediction: float = 0.0,
        backend: str = "auto",
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"PastWeights wraps a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, PastOptimizer):
            raise TypeError(f"{type(optimizer).__name__} knows its past weights itself; give it delay={delay}")
        for group in optimizer.param_groups:
            if "updates" in group:
                raise ValueError(
                    f"this {type(optimizer).__name__} has a past of its own already (delay={group.get('delay')}): wrap "
                    "an optimizer once, and load a checkpoint into the PastWeights that wraps it"
                )
        if taken := sorted({*PAST_DEFAULTS, *CLOCK} & optimizer.defaults.keys()):
            raise ValueError(
                f"{type(optimizer).__name__} has an option {taken[0]!r} of its own, and PastWeights keeps one of that "
                "name in the same parameter groups: each would take the other's. Wrap a subclass that calls its option "
                "something else"
            )
        self.optimizer = optimizer
        given: PastOptions = {
            "delay": delay,
            "past": past,
            "spike_compensation": spike_compensation,
            "weight_prediction": weight_prediction,
            "backend": backend,
        }
        self._options = past_options("PastWeights", given)
        self._complete = False
        groups = [{**group} for group in optimizer.param_groups]
        try:
            super().__init__(optimizer.param_groups, {**optimizer.defaults, **self._options})
        except Exception:
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(before)
            raise
        self._complete = True

    @property
    def param_groups(self) -> list[Group]:
        """The wrapped optimizer's parameter groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        if groups:  # torch's constructor begins with an empty list
            self.optimizer.param_groups = groups

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in super().__getstate__().items() if k != "param_groups"}
        return {**kept, "optimizer": self.optimizer, "_options": self._options, "_complete": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer = state["optimizer"]
        super().__setstate__(state)

    def __repr__(self) -> str:
        return f"PastWeights of {self.optimizer!r}"

    def add_param_group(self, param_group: Group) -> None:
        group = param_group
        if self._complete:
            self.optimizer.add_param_group(param_group)
            group = self.param_groups[-1]
        try:
            self._adopt(group)
        except Exception:
            if self._complete:
                self.param_groups.pop()
            raise

    def _adopt(self, group: Group) -> None:
        """Give a group of the wrapped optimizer a past."""
        for key, value in {**self._options, **GROUP_STATE}.items():
            group.setdefault(key, value)
        self._check_group(group)
        self._reset_caches()

    def _check_group(self, group: Group) -> None:
        if group["spike_compensation"] and not _beta(group):
            raise ValueError(
                f"spike_compensation goes by a momentum or betas, and this {type(self.optimizer).__name__}'s groups "
                "have neither; give spike_compensation=0"
            )
        super()._check_group(group)

    @property
    def _needed(self) -> Iterable[str]:
        return (*PAST_DEFAULTS, *CLOCK)

    def _settings(self, group: Group) -> history.Settings:
        known = super()._settings(group)
        correlation = min(max(known.correlation, 0.0), 0.99)
        return known._replace(momentum=0.0, nesterov=False, correlation=correlation, newest=False)

    @_disable_dynamo  # its scalars are new in every step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the wrapped optimizer, and average what it changed."""
        for group in self.param_groups:
            if "updates" not in group:  # added, or loaded from a checkpoint, behind our back
                self._adopt(group)
        self._check_changed()
        self._refuse_evaluation("a step")
        loss = None
        if closure is not None and any(map(predicts, self.param_groups)):
            with torch.enable_grad():
                loss, closure = closure(), None
        before: list[list[Tensor | None]] = []
        for param, state in checkpoint.by_parameter(self.optimizer.state):
            layout.align(state, param)  # torch's fused steps do not look at strides
        for group in self.param_groups:
            self._before_step(group)
            before.append(self._current_weights(group))
        stepped = self.optimizer.step(closure)
        for group, copies in zip(self.param_groups, before, strict=True):
            for param, copy in zip(group["params"], copies, strict=True):
                if copy is not None:
                    copy.sub_(param.detach())
                    self._correct(param, copy, group)
            group["horizon"] = horizon_of(group)
            self._after_step(group, copies)
        return stepped if loss is None else loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call the wrapped optimizer's, which may keep gradients that it adds up over several steps."""
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def _current_weights(self, group: Group) -> list[Tensor | None]:
        """Returns copies of the weights ``W``, which the parameters hold from here on, in the state's dtype."""
        past = self.history(group)
        averaged = past is not None and (past.emas or past.design.update_tap)
        if not (averaged or predicts(group) or group["spike_compensation"]):
            return [None] * len(group["params"])
        copies: list[Tensor | None] = []
        for param in group["params"]:
            copy = param.detach().to(reference.state_dtype(param.dtype), copy=True)
            update = self.state[param].get("previous_update") if group["horizon"] else None
            if update is not None:
                copy.add_(layout.like(update, param), alpha=group["horizon"])
                param.copy_(copy)
                copy = param.detach().to(copy.dtype, copy=True) if copy.dtype != param.dtype else copy
            copies.append(copy)
        return copies

    @torch.no_grad()
    def _correct(self, param: Tensor, update: Tensor, group: Group) -> None:
        """Make of the wrapped optimizer's update, in place, the one that is wanted, and move the parameter, which that
        update has moved, to where it leads and as far ahead as is predicted."""
        state: dict[str, Any] = self.state[param]
        weight, share, horizon = None, 0.0, horizon_of(group)
        if group["spike_compensation"]:
            beta = _beta(group)
            share = newest_share(group, beta)
            made = update.clone()
            if share:
                weight = param.to(update.dtype) + made
                before = state.get("wrapped_update")
                newest = made if before is None else made - beta * layout.like(before, param)
                update.mul_(1 - share).add_(newest, alpha=share / (1 - beta))
                weight.sub_(update)
            state["wrapped_update"] = made
        if horizon:
            weight = param.to(update.dtype) if weight is None else weight
            weight.sub_(update, alpha=horizon)
            state["previous_update"] = update.clone()
        else:
            state.pop("previous_update", None)
        if weight is not None:
            param.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's, in which states also have what their past weights are made of."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        packed = self.optimizer.state_dict()
        state = dict(packed["state"])
        for group, own in zip(packed["param_groups"], self.param_groups, strict=True):
            for index, param in zip(group["params"], own["params"], strict=True):
                if self.state.get(param):
                    state[index] = {**state.get(index, {}), **self.state[param]}
        keep_state = list(map(self._keeps_state, self.param_groups))
        packed = checkpoint.without_functions(checkpoint.without_unmoved({**packed, "state": state}, keep_state))
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, packed)
            packed = packed if changed is None else changed
        return packed

    def _keeps_state(self, group: Group) -> bool:
        return any(self.optimizer.state.get(p) for g in self.param_groups for p in g["params"])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, of this optimizer or of the wrapped one alone.

        Where there are no averages, their warm-up begins anew, with a warning.
        """
        state_dict = {**state_dict}
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        saved = checkpoint.with_options(self.param_groups, state_dict)
        theirs = {i: checkpoint.without(_OWN, entry) for i, entry in saved["state"].items()}
        self._refuse_without_theirs(saved, theirs)
        self.optimizer.load_state_dict({**saved, "state": {i: s for i, s in theirs.items() if s}})
        self.state.clear()
        self._reset_caches()
        for group, packed in zip(self.param_groups, saved["param_groups"], strict=True):
            for key, value in GROUP_STATE.items():
                group.setdefault(key, value)
            for param, index in zip(group["params"], packed["params"], strict=True):
                for key, value in saved["state"].get(index, {}).items():
                    if key in _OWN:
                        dtype = checkpoint.kept_dtype(key, value, param)
                        self.state[param][key] = value.to(param.device, dtype, copy=True)
        for param, state in checkpoint.by_parameter(self.state):
            layout.align(state, param)
        checkpoint.restart_where_lost(self, self.state, saved)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _refuse_without_theirs(self, saved: dict[str, Any], theirs: dict[Any, Any]) -> None:
        """Refuse a state that was flattened by names of this optimizer's own state, which lacks the wrapped one's."""
        groups = zip(self.param_groups, saved["param_groups"], strict=False)
        for param, index in (pair for a, b in groups for pair in zip(a["params"], b["params"], strict=False)):
            if self.optimizer.state.get(param) and saved["state"].get(index) and not theirs[index]:
                raise ValueError(
                    f"the state to be loaded has past weights and nothing of {type(self.optimizer).__name__}'s own: "
                    "was it flattened? Use StateDictOptions(flatten_optimizer_state_dict=False) with PastWeights"
                )

    def optimizer_bytes(self) -> int:
        """Returns the bytes of the wrapped optimizer's state."""
        states = checkpoint.by_parameter(self.optimizer.state)
        return sum(v.nbytes for _, state in states for v in state.values() if isinstance(v, Tensor))


def _beta(group: Group) -> float:
    """Returns the decay of the wrapped optimizer's average of gradients; 0 where none is known."""
    betas = group.get("betas")
    return float(betas[0] if betas else group.get("momentum") or 0.0)
