"""Weight prediction and spike compensation, which every optimizer here has whatever its rule is.

Parameters hold ``F = W - p u_``, ``p`` (the *horizon*) updates ahead of the weights ``W``, and ``previous_update`` in a
parameter's state is the last update ``u_``. Training reads ``F``; evaluation and saved weights are ``W``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels import ops
from layerpipe_kernels.optim.options import Group, averages_gradients, beta1_at, past_of
from layerpipe_kernels.optim.undo import bias_correction


def check_prediction(group: Group) -> None:
    """Refuse knobs out of their range, and what they do not go together with.

    Raises:
        ValueError: names the option.
    """
    for name in ("spike_compensation", "weight_prediction", "beta1_delay"):
        value = group.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    if group["staleness"] is not None:
        check_staleness(group["staleness"])
    if group["spike_compensation"] and group.get("nesterov"):
        raise ValueError(
            "nesterov and spike_compensation both say how the newest gradient counts; give nesterov=False, or "
            "spike_compensation=0"
        )
    if group["spike_compensation"] and not float(group.get("momentum", 0.0)) < 1.0:
        raise ValueError(f"spike_compensation needs a momentum below 1, got {group['momentum']}")
    if not group["delay"]:
        return
    if past_of(group).kind == "momentum" and (group["spike_compensation"] or group["weight_prediction"]):
        raise ValueError(
            "past='momentum' extrapolates the momentum buffer, which with spike_compensation or weight_prediction is "
            "not what moves the weights; use past='blend' or past='ema'"
        )
    if averages_gradients(group) and (group["spike_compensation"] or group["weight_prediction"]):
        raise ValueError("spike_compensation and weight_prediction need an EMA of='update'")


def check_staleness(staleness: float) -> None:
    if isinstance(staleness, bool) or not 0.0 <= float(staleness) < math.inf:
        raise ValueError(f"a staleness is a number of updates, at least 0, got {staleness!r}")


def staleness_of(group: Group) -> float:
    """Returns how many updates late the group's gradients are: its delay, unless ``set_staleness`` has set it."""
    staleness = group["staleness"]
    return float(group["delay"]) if staleness is None else float(staleness)


def beta1_of(group: Group) -> float:
    """Returns the decay of a group's average of gradients, as late as they are."""
    return beta1_at(group, staleness_of(group))


def horizon_of(group: Group) -> float:
    """Returns ``p = h n``, by how many updates the next step predicts."""
    return float(group["weight_prediction"]) * staleness_of(group)


def newest_share(group: Group, beta: float) -> float:
    """Returns ``b = 1 - beta**(c n)``, the newest gradient's share beside an average of decay ``beta``."""
    exponent = float(group["spike_compensation"]) * staleness_of(group)
    if not exponent or not beta:
        return 1.0 if exponent else 0.0
    return -math.expm1(exponent * math.log(beta))


def predicts(group: Group) -> bool:
    """Returns whether the next step needs the last update: it predicts, or begins with predicted weights."""
    return bool(horizon_of(group) or group["horizon"] or group["horizon_at"] is not None)


class PredictedWeights:
    """The part of an optimizer that knows in which of the two forms its parameters are.

    ``group["horizon"]`` is what the last step predicted with, ``group["horizon_at"]`` the same on the device where
    updates may overflow and the host does not learn which did.
    """

    state: defaultdict[Tensor, Any]
    param_groups: list[Group]
    _aligned_state: Callable[[Tensor], dict[str, Any]]

    def set_staleness(self, staleness: float | None) -> None:
        """Set how many updates late the gradients of the following steps are; ``None`` for every group's ``delay``.

        Spike compensation, weight prediction and ``beta1_delay`` follow it from the next step on: with 0, for as long
        as a pipeline runs its minibatches one after the other, steps are those without them. Where Adam's ``beta1``
        changes, its average of gradients is scaled so that the one without bias stays what it is. A step that a CUDA
        graph has captured keeps the staleness that it was captured with.

        Raises:
            ValueError: not a number of at least 0.
        """
        if staleness is not None:
            check_staleness(staleness)
            staleness = float(staleness)
        for group in self.param_groups:
            before = beta1_of(group) if group.get("beta1_delay") else 0.0
            group["staleness"] = staleness
            if group.get("beta1_delay") and beta1_of(group) != before:
                self._change_beta1(group, before, beta1_of(group))

    @torch.no_grad()
    def _change_beta1(self, group: Group, before: float, after: float) -> None:
        """Scale ``m`` in place so that ``mhat`` stays what it is with the other decay."""
        for param in group["params"]:
            state = self.state.get(param, {})
            mean, step = state.get("exp_avg"), state.get("step")
            if mean is None or step is None:
                continue
            ratio = bias_correction(step, after) / bias_correction(step, before)
            mean.mul_(torch.where(step > 0, ratio, 1.0).to(mean.device, mean.dtype))

    @property
    def training(self) -> bool:
        """True while the parameters are those to train with, and :meth:`step` may be called."""
        return all(group["train_mode"] for group in self.param_groups)

    @torch.no_grad()
    def eval(self) -> None:
        """Bring the weights ``W`` into the parameters, for evaluation or to save them.

        Without weight prediction they are there already. Calling it twice does no harm; a step has to wait for
        :meth:`train`. Until then a copy of ``F`` is kept where there is no float32 master.
        """
        for group in self.param_groups:
            if not group["train_mode"]:
                continue
            for param, state in self._predicted(group):
                if "master" not in state:
                    state["train_weight"] = torch.empty_like(param, requires_grad=False).copy_(param)
                self._write_current(group, param, state, param)
            group["train_mode"] = False

    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """Bring the predicted weights back into the parameters, bit for bit what :meth:`eval` found there.

        A parameter that has been written to in the meantime is taken as it is for ``W``, and nothing is predicted
        for it before its next update.

        Args:
            mode: ``False`` is :meth:`eval`.
        """
        if not mode:
            self.eval()
            return
        for group in self.param_groups:
            if group["train_mode"]:
                continue
            for param, state in self._predicted(group):
                self._take_over(group, param, state)
                weight = state["master"] if "master" in state else state.pop("train_weight", param)
                if weight is not param:
                    param.copy_(weight)
            group["train_mode"] = True

    @torch.no_grad()
    def current_weight(self, param: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Returns the weight ``W`` of a parameter, whichever form the parameter has.

        Args:
            param: one of this optimizer's parameters, ``(*)``.
            out: ``(*)``, like ``param``; written and returned. A fresh tensor if not given.
        """
        out = torch.empty_like(param, requires_grad=False) if out is None else out
        group = self._find(param)
        state: dict[str, Any] = self.state.get(param, {})
        if not group["train_mode"] or "previous_update" not in state:
            return out.copy_(param)
        self._write_current(group, param, state, out)
        return out

    def _find(self, param: Tensor) -> Group:
        raise NotImplementedError

    def _predicted(self, group: Group) -> list[tuple[Tensor, dict[str, Any]]]:
        """Returns the group's parameters that hold ``F``, or did before :meth:`eval`."""
        params = [p for p in group["params"] if p in self.state and "previous_update" in self.state[p]]
        return [(p, self._aligned_state(p)) for p in params]

    def _write_current(self, group: Group, param: Tensor, state: dict[str, Any], out: Tensor) -> None:
        """Write ``W = F + p u_``, rounded, into ``out``, which may be the parameter itself."""
        predicted = state.get("master", state.get("train_weight", param))
        if predicted is out:
            predicted = predicted.clone()
        at, horizon = group["horizon_at"], group["horizon"]
        taps = [horizon] if at is None else at.view(1)
        ops.reconstruct(predicted, [state["previous_update"]], taps, out=out.detach(), backend=group["backend"])

    def _take_over(self, group: Group, param: Tensor, state: dict[str, Any]) -> None:
        """Take a parameter that differs from the ``W`` that :meth:`eval` wrote for new weights."""
        current = torch.empty_like(param, requires_grad=False)
        self._write_current(group, param, state, current)
        if torch.equal(current, param):
            return
        state["previous_update"].zero_()
        state["master" if "master" in state else "train_weight"].copy_(param)

    def _weights_taken_over(self) -> None:
        """Take the parameters for new weights ``W``; in evaluation, those that differ from what it wrote."""
        for group in self.param_groups:
            for param, state in self._predicted(group):
                if group["train_mode"]:
                    state["previous_update"].zero_()
                else:
                    self._take_over(group, param, state)

    @torch.no_grad()
    def _forget_prediction(self, group: Group) -> None:
        """Let the training weights be ``W``, from which the next update predicts anew."""
        before = group["horizon"] if group["horizon_at"] is None else group["horizon_at"]
        predicted = self._predicted(group)
        if not group["train_mode"]:
            for param, state in predicted:
                self._take_over(group, param, state)
        self._unpredict([p for p, _ in predicted], before, None)

    @torch.no_grad()
    def _unpredict(self, params: Sequence[Tensor], before: float | Tensor, found_inf: Tensor | None) -> None:
        """Update by zero: ``F`` becomes ``W``, ``u_`` zero, unless ``found_inf`` says that there is no update."""
        for param in params:
            state: dict[str, Any] = self.state[param]
            update = state.get("previous_update")
            if update is None:
                continue
            weight = state.get("master", state.get("train_weight", param))
            ahead = update * before
            if found_inf is not None:
                ahead = torch.where(found_inf.view(()) == 0, ahead, 0.0)
            current = weight.to(update.dtype) + ahead
            if weight is not param:
                weight.copy_(current)
            param.copy_(current)
            if found_inf is None:
                update.zero_()
            else:
                update.masked_fill_(found_inf.view(()) == 0, 0.0)

    def _evaluates(self, param: Tensor) -> bool:
        return not self._find(param)["train_mode"]

    def _refuse_evaluation(self, what: str) -> None:
        if not self.training:
            raise RuntimeError(f"{what} while the optimizer evaluates: call its train() before")


def keep_horizon_on_device(group: Group) -> None:
    """Keep the horizon of the last update that did not overflow on the device."""
    if group["horizon_at"] is None and (horizon_of(group) or group["horizon"]):
        device = group["params"][0].device
        group["horizon_at"] = torch.tensor(float(group["horizon"]), dtype=torch.float32, device=device)
