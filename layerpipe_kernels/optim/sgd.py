"""SGD with momentum, its past weights kept by the same pass over memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from layerpipe_kernels.optim.fused import FusedOptimizer
from layerpipe_kernels.optim.options import (
    Group,
    PastOptions,
    check_flags,
    check_learning_rate,
    learning_rate,
    past_options,
    require_finite,
)
from layerpipe_kernels.optim.prediction import newest_share
from layerpipe_kernels.options import SgdOptions
from layerpipe_kernels.past import Past


class SGD(FusedOptimizer):
    """:class:`torch.optim.SGD` that can also return its past weights.

    torch's names, defaults and results: a float32 step on the CPU equals torch's for-loop implementation bit for bit.
    With ``delay=n`` the step also keeps what the weights of ``n`` updates ago are reconstructed from.

    Args:
        params: parameters, named parameters, or dicts of groups.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.
        delay: ``n``, how many updates lie between a forward and its backward; 0 keeps no history.
        past: how the past weights are had: ``"blend"``, ``"ema"``, ``"momentum"``, ``"latest"`` or ``"stash"``, or with
            options :class:`layerpipe_kernels.Blend`, ``EMA``, ``Momentum``, ``Latest`` or ``Stash``. A group holds it
            spelled in a string, see :mod:`layerpipe_kernels.past`.
        spike_compensation: ``c``. Where gradients are ``n`` updates late, the newest one weighs ``b = 1 - momentum**(c
            n)``: the direction is ``(1 - b) v + b (1 - dampening) / (1 - momentum) g``. Not with Nesterov's momentum.
        weight_prediction: ``h``. The parameters hold ``F = W - h n u``, ``h n`` updates like the last one ahead, at one
            more buffer; :meth:`eval` brings ``W`` into them, :meth:`train` ``F`` again. See docs/optimizers.md.
        master_weights: keep float32 copies of weights of 16 bits, update those and round them; others need none.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpp"`` or ``"reference"``.
        capturable: let the device count the updates, so that a CUDA graph can replay them; needed with a delay.
        foreach, fused, differentiable: accepted for torch's sake; every step here is fused, none is differentiable.
            With ``fused=False`` a :class:`torch.amp.GradScaler` unscales the gradients itself, before the step.

    Raises:
        ValueError: an option out of its range, or options that contradict each other.
    """

    rule = "sgd"
    has_momentum_of_updates = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        delay: int = 0,
        past: str | Past = "blend",
        spike_compensation: float = 0.0,
        weight_prediction: float = 0.0,
        master_weights: bool = False,
        backend: str = "auto",
    ) -> None:
        check_flags(foreach, fused, differentiable, "SGD")
        options: PastOptions = {
            "delay": delay,
            "past": past,
            "spike_compensation": spike_compensation,
            "weight_prediction": weight_prediction,
            "master_weights": master_weights,
            "backend": backend,
        }
        defaults = {
            **past_options("SGD", options),
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        check_learning_rate(group)
        for name in ("momentum", "weight_decay"):
            if not float(group[name]) >= 0.0:
                raise ValueError(f"Invalid {name} value: {group[name]}")
        require_finite(group, ("lr", "momentum", "dampening", "weight_decay"))
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        super()._check_group(group)

    def _options(self, group: Group) -> SgdOptions:
        require_finite(group, ("lr", "momentum", "dampening", "weight_decay"))
        return SgdOptions(
            learning_rate(group),
            group["momentum"],
            group["dampening"],
            float(group["weight_decay"]),
            bool(group["nesterov"]),
            bool(group["maximize"]),
            newest_share(group, float(group["momentum"])) if group["momentum"] else 0.0,
        )

    def _states(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _counts(self, group: Group, on_device: bool) -> bool:
        # An empty buffer begins with the whole gradient. Without dampening, zeros do that by themselves.
        return bool(on_device and group["momentum"] and group["dampening"])
