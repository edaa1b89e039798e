"""The base of all optimizers here: a history per parameter group and a clock that counts its updates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerpipe_kernels import history
from layerpipe_kernels.optim import checkpoint
from layerpipe_kernels.optim.checkpoint import CLOCK, GROUP_STATE, HISTORY_KEYS
from layerpipe_kernels.optim.options import PAST_DEFAULTS, Group, check_past, past_of, refuse_negative
from layerpipe_kernels.optim.past_reader import PastReader
from layerpipe_kernels.optim.prediction import check_prediction

#: What may be different in every step, or is a group's clock.
_OF_EVERY_STEP = ("params", "lr", *GROUP_STATE)


class PastOptimizer(PastReader, torch.optim.Optimizer):
    """A :class:`torch.optim.Optimizer` whose step also keeps what past weights are made of.

    Every parameter group has a clock, ``group["updates"]``: the number of updates since the delays began to fill. All
    its parameters age together; one without a gradient in some step was updated by zero there.

    It is a number, or a tensor on the device once an update may overflow or is captured: only the device knows then.

    With ``delay=0`` nothing extra is kept and :meth:`past_weight` is the weight itself.
    """

    #: Whether a step may leave other values in the gradients than it found there.
    writes_gradients: ClassVar[bool] = False
    #: Whether ``past="momentum"`` has a momentum buffer of updates to extrapolate.
    has_momentum_of_updates: ClassVar[bool] = False

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._without_grad: set[Tensor] = set()  # parameters without a gradient in the last step
        self._fresh: set[Tensor] = set()  # parameters whose momentum buffer holds nothing yet
        self._updated: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults)
        self._reset_caches()

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._checked: dict[int, Group] = {}  # per group: the options that were checked last

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "without_grad": [*self._without_grad],
            "fresh": [*self._fresh],
            "updated": {**self._updated},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        marks = ("without_grad", "fresh", "updated")
        super().__setstate__({key: value for key, value in state.items() if key not in marks})
        self._without_grad, self._fresh = set(state.get("without_grad", ())), set(state.get("fresh", ()))
        self._updated = dict(state.get("updated", ()))
        for group in self.param_groups:
            for key, value in {**PAST_DEFAULTS, **GROUP_STATE}.items():
                group.setdefault(key, value)
        self._reset_caches()

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for key, value in GROUP_STATE.items():
            group.setdefault(key, value)
        try:
            self._check_group(group)
            refuse_negative(group.get("lr", 0.0))  # while nothing waits for it
        except Exception:
            self.param_groups.pop()
            raise
        self._reset_caches()

    def _check_group(self, group: Group) -> None:
        check_past(group, [self.name(group, i) for i in range(len(group["params"]))])
        check_prediction(group)
        if group["delay"] and past_of(group).kind == "momentum" and not self.has_momentum_of_updates:
            raise ValueError("past='momentum' extrapolates SGD's momentum buffer; use past='ema' or past='blend'")
        if group["delay"]:
            history.make(self._settings(group))

    def _check_changed(self) -> None:
        """Check the groups whose options are not those that were checked last: before a step writes anything.

        Raises:
            KeyError: an option is gone.
            ValueError: as when the group was made; so does a TypeError.
        """
        for index, group in enumerate(self.param_groups):
            options = {name: value for name, value in group.items() if name not in _OF_EVERY_STEP}
            with contextlib.suppress(Exception):  # what cannot be compared counts as changed
                if self._checked[index] == options:
                    continue
            if gone := [name for name in self._needed if name not in group]:
                raise KeyError(f"param_groups[{index}] has no {gone[0]!r} any more")
            self._check_group(group)
            self._checked[index] = options

    @property
    def _needed(self) -> Iterable[str]:
        """The options that a group must have; torch adds one to the defaults when a state is loaded."""
        return [*(name for name in self.defaults if name != "differentiable"), *CLOCK]

    def name(self, group: Group, i: int) -> str:
        """Returns the name of a group's ``i``-th parameter in messages."""
        if "param_names" in group:
            return repr(group["param_names"][i])
        at = next((k for k, g in enumerate(self.param_groups) if g is group), len(self.param_groups))
        return f"param_groups[{at}]['params'][{i}]"

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state_dict, in which parameters' states also have what their past weights are made of."""
        params = [p for group in self.param_groups for p in group["params"]]
        without_grad = {p for p in self._without_grad if p not in self._updated}
        without_grad.update(p for p, updated in self._updated.items() if not updated)
        packed = checkpoint.without_unmoved(super().state_dict(), list(map(self._keeps_state, self.param_groups)))
        return checkpoint.without_functions(checkpoint.mark(packed, params, without_grad, self._fresh))

    def _keeps_state(self, group: Group) -> bool:
        """Returns whether a step gives the group's parameters state of the optimizer's own, besides their past."""
        return True

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, of this optimizer or of torch's.

        Options that a torch checkpoint does not have stay as they are here. State of half-precision parameters keeps
        its float32, which torch would round to the parameters' dtype. Where the checkpoint has no averages, their
        warm-up begins anew, with a warning.
        """
        taken: dict[str, Any] = {}

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            taken.update(checkpoint.with_options(self.param_groups, given))
            return taken

        last = self.register_load_state_dict_pre_hook(take)  # others may change what is loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        state_dict = taken
        states = checkpoint.by_parameter(self.state)
        self._without_grad = {param for param, state in states if state.pop(checkpoint.NOT_UPDATED, False)}
        checkpoint.restore_precision(self.param_groups, self.state, state_dict)
        for param, _ in states:
            self._aligned_state(param)
        checkpoint.restart_where_lost(self, self.state, state_dict)
        for group in self.param_groups:
            if group["params"]:
                checkpoint.move_clock(group, group["params"][0].device)

    def restart_history(self) -> None:
        """Forget the past: the pipeline is empty, and the next ``delay`` updates are exact again.

        Predicted weights become the weights themselves, from which the next update predicts anew.
        """
        for group in self.param_groups:
            self._forget_prediction(group)
            clock = self.device_clock(group)
            if clock is None:
                group["updates"] = 0
                continue
            past = self.history(group)
            clock.t.zero_()
            clock.refresh()
            for param in group["params"]:
                state = self.state[param]
                if past is not None:
                    past.restart(param, state)
                if "past" in state:
                    history.copy_into(state["past"], param)

    @torch.no_grad()
    def weights_loaded(self) -> None:
        """Take over values that have been written to the parameters; :meth:`restart_history` forgets their past.

        A float32 master that does not round to its weight is of the weights before, and the next step would bring them
        back. Not needed where the optimizer's state is loaded, too. Where weights are predicted, those there now are
        taken for the weights themselves, from which the next update predicts anew.
        """
        self._weights_taken_over()
        for param, state in checkpoint.by_parameter(self.state):
            master = state.get("master")
            if master is not None and not (self._evaluates(param) and "previous_update" in state):
                master.copy_(torch.where(master.to(param.dtype) == param, master, param.to(master.dtype)))

    def history_bytes(self) -> int:
        """Returns the bytes kept for past weights, the weights themselves and the optimizer's own state not counted."""
        return sum(s[k].nbytes for _, s in checkpoint.by_parameter(self.state) for k in HISTORY_KEYS if k in s)

    def optimizer_bytes(self) -> int:
        """Returns the bytes of the optimizer's own state."""
        return sum(
            v.nbytes
            for _, s in checkpoint.by_parameter(self.state)
            for k, v in s.items()
            if k not in HISTORY_KEYS and isinstance(v, Tensor)
        )
