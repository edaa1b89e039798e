"""Adam and AdamW, their past weights kept by the same pass over memory."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from layerpipe_kernels import history
from layerpipe_kernels.optim.fused import FusedOptimizer
from layerpipe_kernels.optim.options import (
    Group,
    PastOptions,
    check_adam_group,
    check_flags,
    learning_rate,
    past_options,
    require_finite,
)
from layerpipe_kernels.optim.prediction import beta1_of, newest_share
from layerpipe_kernels.optim.undo import adam_undone
from layerpipe_kernels.options import AdamOptions
from layerpipe_kernels.past import Past


class Adam(FusedOptimizer):
    """:class:`torch.optim.Adam` that can also return its past weights.

    torch's names, defaults and results, to a few units in the last place. The step counts lie beside the weights, as
    in torch's fused implementation.

    Args:
        params: parameters, named parameters, or dicts of groups.
        lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in torch.
        capturable: let the device count the updates, so that a CUDA graph can replay them; needed with a delay.
        foreach, fused, differentiable: as in :class:`layerpipe_kernels.SGD`.
        beta1_delay: ``k``. Where gradients are ``n`` updates late, ``beta1`` is at least ``1 - 1 / (k n)``: the later
            they are, the more of them are averaged. Goes with spike compensation; 14 is a good value, and 0 leaves
            ``beta1`` as it is.
        spike_compensation: ``c``. Where gradients are ``n`` updates late, the newest one weighs ``b = 1 - beta1**(c
            n)``: the direction is ``((1 - b) mhat + b g) / (sqrt(qhat) + eps)``, also with AMSGrad's largest ``qhat``.
        delay, past, weight_prediction, master_weights, backend: as in :class:`layerpipe_kernels.SGD`.
            ``past="momentum"`` is SGD's alone. The newest update is gone after an Adam step, so a blend does without it
            unless ``weight_prediction`` keeps it or ``materialize`` lets the step itself write the past weights.

    Raises:
        ValueError: an option out of its range, or options that contradict each other.
    """

    rule = "adam"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        delay: int = 0,
        past: str | Past = "blend",
        beta1_delay: float = 0.0,
        spike_compensation: float = 0.0,
        weight_prediction: float = 0.0,
        master_weights: bool = False,
        backend: str = "auto",
    ) -> None:
        check_flags(foreach, fused, differentiable, type(self).__name__)
        _check_tensors(lr, betas, foreach, capturable)
        options: PastOptions = {
            "delay": delay,
            "past": past,
            "spike_compensation": spike_compensation,
            "weight_prediction": weight_prediction,
            "master_weights": master_weights,
            "backend": backend,
        }
        defaults = {
            **past_options(type(self).__name__, options),
            "lr": lr,
            "betas": (float(betas[0]), float(betas[1])),
            "beta1_delay": beta1_delay,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        check_adam_group(group)
        super()._check_group(group)

    def _options(self, group: Group) -> AdamOptions:
        require_finite(group, ("lr", "eps", "weight_decay"))
        beta1, beta2 = beta1_of(group), float(group["betas"][1])
        return AdamOptions(
            learning_rate(group),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["decoupled_weight_decay"],
            group["maximize"],
            newest_share(group, beta1),
        )

    def _settings(self, group: Group) -> history.Settings:
        known = super()._settings(group)
        # With spike compensation the gradient, which is gone, is part of the update; predicted weights move otherwise.
        if group["spike_compensation"] or group["weight_prediction"] or group["horizon"]:
            return known
        return known._replace(undo=functools.partial(self._undone, group))

    def _undone(self, group: Group, param: Tensor, state: dict[str, Any], lr: float | Tensor) -> Tensor:
        options = self._stepped_with.get(id(group))
        return adam_undone(param, state, lr, self._options(group) if options is None else options)

    def _step_group(
        self, index: int, group: Group, options: Any, found: Any, scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        self._stepped_with[id(group)] = options
        super()._step_group(index, group, options, found, scale, found_inf)

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._stepped_with: dict[int, AdamOptions] = {}  # what a group's last step had, while it is the same group

    def _change_beta1(self, group: Group, before: float, after: float) -> None:
        super()._change_beta1(group, before, after)
        if (options := self._stepped_with.get(id(group))) is not None:
            self._stepped_with[id(group)] = options._replace(beta1=after)

    def _states(self, group: Group) -> tuple[str, ...]:
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return names if group["amsgrad"] else names[:2]

    def _counts(self, group: Group, on_device: bool) -> bool:
        return True


def _check_tensors(
    lr: float | Tensor, betas: tuple[float | Tensor, float | Tensor], foreach: bool | None, capturable: bool
) -> None:
    """Refuse tensors where torch does."""
    separate = foreach and not capturable
    if isinstance(lr, Tensor) and separate:
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            if separate:
                raise ValueError(f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True")
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")


class AdamW(Adam):
    """:class:`torch.optim.AdamW` that can also return its past weights; :class:`Adam` with decoupled weight decay."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # whatever a checkpoint of Adam's says
            group["decoupled_weight_decay"] = True
