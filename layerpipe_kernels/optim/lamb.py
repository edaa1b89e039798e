"""LAMB, with a memory of its past weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from layerpipe_kernels import reference
from layerpipe_kernels.optim.averaging import AveragingOptimizer
from layerpipe_kernels.optim.options import Group, PastOptions, check_adam_group, past_options, require_finite

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Lamb(AveragingOptimizer):
    """LAMB for large batches (You et al., arXiv 1904.00962, algorithm 2), in plain torch.

    ``u = lr * phi(|W|) / |r + wd W| * (r + wd W)``, ``r = mhat / (sqrt(qhat) + eps)`` with Adam's bias-corrected
    averages, norms of whole tensors, ``phi`` the identity; the ratio is 1 where either norm is 0. ``W -= u``.
    Half-precision weights keep their state, and are computed with, in float32.

    Args:
        params: parameters, named parameters, or dicts of groups.
        lr, betas, eps, weight_decay, maximize: as in :class:`torch.optim.AdamW`, with the paper's ``eps``.
        options: ``delay``, ``past`` and ``backend``, as in :class:`layerpipe_kernels.AdamW`.

    Raises:
        ValueError: an option out of its range, or options that contradict each other.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        **options: Unpack[PastOptions],
    ) -> None:
        defaults = {
            **past_options("Lamb", options),
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        check_adam_group(group)
        if group["spike_compensation"] or group["weight_prediction"]:
            raise ValueError("Lamb has neither spike_compensation nor weight_prediction; AdamW has both")
        super()._check_group(group)

    @_disable_dynamo  # its scalars are new in every step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights, and with them what their past is made of.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.

        Raises:
            TypeError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_evaluation("a step")
        self._check_changed()
        for group in self.param_groups:
            require_finite(group, ("lr", "eps", "weight_decay"))
            for i, param in enumerate(group["params"]):
                if param.grad is not None:
                    self._check_arrays(self.name(group, i), param, param.grad)
        for group in self.param_groups:
            self._before_step(group)
            made = iter(self._update(group, [p for p in group["params"] if p.grad is not None]))
            self._after_step(group, [None if p.grad is None else next(made) for p in group["params"]])
        return loss

    @torch.no_grad()
    def _update(self, group: Group, params: list[Tensor]) -> list[Tensor]:
        """Step these, all with gradients, and return their updates ``u``."""
        if not params:
            return []
        states = [self._state(p) for p in params]
        weights = [p.detach().to(reference.state_dtype(p.dtype)) for p in params]
        grads = [p.grad.to(w.dtype) for p, w in zip(params, weights, strict=True) if p.grad is not None]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        (beta1, beta2), lr = map(float, group["betas"]), float(group["lr"])
        averages, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        counts = [s["step"] for s in states]
        torch._foreach_add_(counts, 1.0)
        steps = [float(count) for count in counts]
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(averages, roots)
        torch._foreach_div_(updates, [1 - beta1**step for step in steps])
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=float(group["weight_decay"]))
        lengths, strides = torch._foreach_norm(weights), torch._foreach_norm(updates)
        ratios = [
            torch.where((length > 0) & (stride > 0), lr * length / stride, lr)
            for length, stride in zip(lengths, strides, strict=True)
        ]
        torch._foreach_mul_(updates, ratios)
        for param, weight, update in zip(params, weights, updates, strict=True):
            param.copy_(weight - update) if weight.dtype != param.dtype else param.sub_(update)
        return list(updates)

    def _check_arrays(self, name: str, param: Tensor, grad: Tensor) -> None:
        """Refuse a gradient or a state that does not fit, before anything is written."""
        if grad.layout != torch.strided:
            raise TypeError(f"the gradient of {name} is {grad.layout}; only dense ones are supported")
        full, state = reference.state_dtype(param.dtype), self.state.get(param) or {}
        if grad.shape != param.shape:
            raise ValueError(f"the gradient of {name} is of shape {tuple(grad.shape)}, not {tuple(param.shape)}")
        for key in ("exp_avg", "exp_avg_sq") if "step" in state else ():
            value = state.get(key)
            if not isinstance(value, Tensor) or value.shape != param.shape or value.dtype != full:
                shown = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"state {key!r} of {name} must be {tuple(param.shape)} {full}, got {shown}")
        if not isinstance(state.get("step", grad), Tensor):
            raise ValueError(f"state 'step' of {name} must be a tensor, got {state['step']!r}")

    def _state(self, param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if "step" not in state:
            full = reference.state_dtype(param.dtype)
            state["step"] = torch.tensor(0.0)  # on the CPU, as torch keeps it where steps are not captured
            state["exp_avg"] = torch.zeros_like(param, dtype=full)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=full)
        return state
