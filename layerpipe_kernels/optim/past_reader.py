"""Past weights read from what an optimizer's steps have kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels import history, layout
from layerpipe_kernels.history import DeviceClock, Norms
from layerpipe_kernels.optim.no_gradient import ParametersWithoutGrad
from layerpipe_kernels.optim.options import DESIGNED_BY, Group, past_of, settings_of
from layerpipe_kernels.optim.prediction import PredictedWeights


class PastReader(ParametersWithoutGrad, PredictedWeights):
    """The part of an optimizer that returns past weights, and what it keeps to do so quickly."""

    def _reset_caches(self) -> None:
        self._histories: dict[int, tuple[Any, history.History]] = {}
        self._places: dict[Tensor, tuple[int, int]] = {}  # of a parameter: its group, and its place there
        # Per group: what its past weights are made with after the update that the clock shows.
        self._ready: dict[
            tuple[int, int | None], tuple[Group, tuple[Any, Any], history.History | None, history.Mixture | None]
        ] = {}
        self._clocks: dict[int, tuple[history.History, DeviceClock]] = {}
        self._norms: dict[int, Norms] = {}

    def _settings(self, group: Group) -> history.Settings:
        return settings_of(group)

    def history(self, group: Group) -> history.History | None:
        """Returns the estimator of a group's past weights; ``None`` for a delay of 0."""
        if not group["delay"]:
            return None
        # A schedule may move the momentum in every step. A blend for the first one stays near, and its averages valid.
        made_for = (*map(group.get, DESIGNED_BY), bool(group.get("momentum", 0.0)))
        made = self._histories.get(id(group))
        if made is not None and made[0] != made_for:
            group["designed_for"] = None
        if made is None or group["designed_for"] is None:
            past = history.make(self._settings(group))
            group["designed_for"] = past.settings.correlation
            made = self._histories[id(group)] = made_for, past
        return made[1]

    def device_clock(self, group: Group) -> DeviceClock | None:
        """Returns this group's clock where the device keeps it; ``None`` where the host does."""
        past = self.history(group)
        if past is None or not isinstance(group["updates"], Tensor):
            return None
        made = self._clocks.get(id(group))
        if made is None or made[0] is not past:
            made = self._clocks[id(group)] = past, DeviceClock(past, group["updates"], group["last_lr"])
        return made[1]

    def _keep_clock_on_device(self, group: Group) -> None:
        """Move a group's clock from the host to the device of its parameters."""
        if isinstance(group["updates"], Tensor):
            return
        device = group["params"][0].device
        group["updates"] = torch.tensor(group["updates"], device=device)
        group["last_lr"] = torch.tensor(float(group["last_lr"]), dtype=torch.float32, device=device)

    def _norms_of(self, group: Group) -> Norms | None:
        if past_of(group).norm is None or not group["delay"]:
            return None
        norms = self._norms.get(id(group))
        params = group["params"]
        if norms is None or norms.n != group["delay"] or not norms.are_of(params):
            norms = self._norms[id(group)] = Norms(group["delay"], params, [self.state[p] for p in params])
        return norms

    def _aligned_state(self, param: Tensor) -> dict[str, Any]:
        """Returns a parameter's state, in the parameter's present order in memory."""
        state: dict[str, Any] = self.state[param]
        layout.align(state, param)
        return state

    def past_view(self, param: Tensor, n: int | None = None) -> Tensor:
        """Returns :meth:`past_weight`, or memory with it that the next step overwrites. For one backward."""
        return self._past(param, None, n)

    def _past(self, param: Tensor, out: Tensor | None, n: int | None = None) -> Tensor:
        group = self._find(param)
        if not group["train_mode"]:
            self._refuse_evaluation("past weights were asked for")
        clock = self.device_clock(group)
        if clock is not None:
            return self._past_on_device(param, group, clock, out, n)
        t, lr = now = group["updates"], group["last_lr"]
        ready = self._ready.get((id(group), n))
        if ready is None or ready[0] is not group or ready[1] != now:
            past = self.history(group)
            # A learning rate that lies on a device is read here, once for all parameters.
            made = past.mixture(history.Clock(t, float(lr)), n) if past is not None else None
            ready = self._ready[id(group), n] = group, now, past, made
        _, _, past, mixture = ready
        if past is None or mixture is None:
            return history.copy_into(out, param.detach())
        state = self._aligned_state(param)
        if not mixture.n:
            return history.copy_into(out, param.detach())
        if past_of(group).materialize and "past" in state and mixture.n == min(t, past.n):
            return history.copy_into(out, state["past"])
        norms = self._norms_of(group)
        if norms is not None and out is None:
            out = torch.empty_like(param, requires_grad=False)
        result = past.past(param, state, mixture, updated=param not in self._without_grad, out=out)
        if norms is not None:
            norms.match([result], [state], t, n=mixture.n)
        return result

    def _past_on_device(
        self, param: Tensor, group: Group, clock: DeviceClock, out: Tensor | None, n: int | None
    ) -> Tensor:
        past, state = self.history(group), self._aligned_state(param)
        assert past is not None
        if n == 0:
            return history.copy_into(out, param.detach())
        if past_of(group).materialize and "past" in state and n in (None, past.n):
            return history.copy_into(out, state["past"])
        norms = self._norms_of(group)
        if norms is not None and out is None:
            out = torch.empty_like(param, requires_grad=False)
        updated = self._updated_on_device(param, clock)
        result = past.past_on_device(param, state, clock, n=n, updated=updated, out=out)
        if norms is not None:
            norms.match([result], [state], clock, n=n)
        return result

    def past_weight(self, param: Tensor, n: int | None = None, *, out: Tensor | None = None) -> Tensor:
        """Returns the weights of ``n`` updates ago, as this parameter's history estimates them.

        Args:
            param: one of this optimizer's parameters, ``(*)``.
            n: at most the group's delay and the number of updates since it began to fill, which of the two is smaller
                is the default. A group without a delay has its present weights for any ``n``. Averages are designed for
                the delay; another ``n`` gets the best that they can give (:func:`layerpipe_kernels.decay.retapped`).
            out: ``(*)``, its dtype and device, any strides; written and returned. A fresh tensor if not given.

        Raises:
            KeyError: the parameter is not in this optimizer.
            ValueError: ``out`` does not fit, or ``n`` is larger than what there is.
        """
        if out is not None and (out.shape, out.dtype, out.device) != (param.shape, param.dtype, param.device):
            raise ValueError(
                f"out must be {tuple(param.shape)} {param.dtype} on {param.device}, "
                f"got {tuple(out.shape)} {out.dtype} on {out.device}"
            )
        if out is None:
            return self._past(param, torch.empty_like(param, requires_grad=False), n)
        if layout.follows(out, param) and not out.is_neg():
            self._past(param, out, n)
            torch.autograd.graph.increment_version(out)  # a graph may have saved it for its backward
        else:
            history.copy_into(out, self._past(param, None, n))
        return out

    def _find(self, param: Tensor) -> Group:
        groups = self.param_groups
        g, i = self._places.get(param, (0, -1))
        if i < 0 or g >= len(groups) or i >= len(groups[g]["params"]) or groups[g]["params"][i] is not param:
            self._places = {p: (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
            if param not in self._places:
                raise KeyError(f"the parameter of shape {tuple(param.shape)} is not in this optimizer")
            g, _ = self._places[param]
        return groups[g]
