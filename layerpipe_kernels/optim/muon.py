"""Muon: momentum orthogonalised by Newton-Schulz steps, with a memory of its past weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerpipe_kernels import history, reference
from layerpipe_kernels.optim.matrices import sides
from layerpipe_kernels.optim.options import Group, PastOptions, check_learning_rate, past_options, require_finite
from layerpipe_kernels.optim.preconditioned import PreconditionedOptimizer, State
from layerpipe_kernels.optim.prediction import newest_share
from layerpipe_kernels.optim.stacks import Array, Scratch, Stack
from layerpipe_kernels.options import AdamOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ADJUSTMENTS = (None, "original", "match_rms_adamw", "spectral_unclamped")


class Muon(PreconditionedOptimizer):
    """:class:`torch.optim.Muon` for all of a network's parameters, which can also return its past weights.

    ``m <- mu m + (1 - mu) G``; the direction is the nearest orthogonal matrix to ``mu m + (1 - mu) G`` (to ``m``
    without ``nesterov``), by ``ns_steps`` Newton-Schulz steps, times what ``adjust_lr_fn`` says of its shape. Then
    ``W -= lr d + lr wd W``. Of 2-D matrices the results are torch's, to rounding.

    Convolutions are taken as ``(out, in * k * k)``. Embeddings, output layers, vectors, and matrices with a side of 1
    step with AdamW at ``adamw_lr_ratio`` times the learning rate, which torch leaves to another optimizer; see
    :func:`layerpipe_kernels.mark_embeddings_and_output`.

    Args:
        params: parameters, named parameters, or dicts of groups. Names say which are embeddings and output layers.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in torch.
        ns_dtype: of the Newton-Schulz steps; torch's is bfloat16.
        adamw_betas, adamw_eps, adamw_lr_ratio: of what steps with AdamW.
        precondition, maximize: as in :class:`layerpipe_kernels.SOAP`.
        options: ``delay``, ``past``, ``spike_compensation``, ``weight_prediction``, ``master_weights`` and ``backend``,
            as in :class:`layerpipe_kernels.AdamW`, but for spike compensation. There, where gradients are ``n`` updates
            late, the direction is made of ``a m + (1 - a) G`` with ``a = mu**(c n)``, ``mu**(c n + 1)`` with
            ``nesterov``.

    Raises:
        ValueError: an option out of its range, or options that contradict each other.
    """

    _matrix_marks = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype = torch.bfloat16,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_lr_ratio: float = 1.0,
        precondition: bool | None = None,
        maximize: bool = False,
        **options: Unpack[PastOptions],
    ) -> None:
        defaults = {
            **past_options("Muon", options),
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "adamw_lr_ratio": adamw_lr_ratio,
            "precondition": precondition,
            "maximize": maximize,
            "capturable": False,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        check_learning_rate(group)
        for name in ("weight_decay", "eps", "adamw_eps", "adamw_lr_ratio"):
            if not float(group[name]) >= 0.0:
                raise ValueError(f"{name} must be at least 0, got {group[name]}")
        for name, beta in (("momentum", group["momentum"]), *(("adamw_betas", beta) for beta in group["adamw_betas"])):
            if not 0.0 <= float(beta) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {beta}")
        if group["adjust_lr_fn"] not in _ADJUSTMENTS:
            raise ValueError(f"adjust_lr_fn must be one of {_ADJUSTMENTS}, got {group['adjust_lr_fn']!r}")
        if len(group["ns_coefficients"]) != 3:
            raise ValueError(f"ns_coefficients are three numbers, got {group['ns_coefficients']}")
        if not 0 <= group["ns_steps"] < 100:
            raise ValueError(f"ns_steps must be in [0, 100), got {group['ns_steps']}")
        if group["ns_dtype"] not in (torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"ns_dtype must be torch.bfloat16, float32 or float64, got {group['ns_dtype']}")
        require_finite(group, ("lr", "eps", "weight_decay"))
        nesterov, group["nesterov"] = group["nesterov"], False  # which here goes together with spike compensation
        try:
            super()._check_group(group)
        finally:
            group["nesterov"] = nesterov

    def _settings(self, group: Group) -> history.Settings:
        # The momentum buffer is no update.
        return super()._settings(group)._replace(momentum=0.0, nesterov=False, newest=False)

    def _adam(self, group: Group) -> AdamOptions:
        beta1, beta2 = map(float, group["adamw_betas"])
        share = newest_share(group, beta1)
        return AdamOptions(float(group["adamw_lr_ratio"]), beta1, beta2, float(group["adamw_eps"]), newest_share=share)

    def _stack(self, group: Group, params: list[Tensor], states: list[State]) -> Stack:
        shape = sides(params[0])
        for state in states:
            for name in ("step", "exp_avg", "exp_avg_sq"):  # where it was stepped with AdamW until now
                state.pop(name, None)
            old = state.get("momentum_buffer")
            if old is not None:
                state["momentum_buffer"] = old.reshape(shape)
        return Stack(
            params[0].device, states, {"momentum_buffer": Array(shape, reference.state_dtype(params[0].dtype))}
        )

    def _direct(self, group: Group, stack: Stack, grads: Tensor, out: Tensor, places: Sequence[float]) -> None:
        mu, (rows, cols) = float(group["momentum"]), out.shape[1:]
        buffer = stack["momentum_buffer"].lerp_(grads, 1 - mu)
        of_buffer = (1 - newest_share(group, mu)) * (mu if group["nesterov"] else 1.0)
        blended = buffer if of_buffer == 1.0 else torch.lerp(grads, buffer, of_buffer, out=out)
        wide = rows <= cols
        matrices = self._scratch("orthogonal", out, len(out), min(rows, cols), max(rows, cols), dtype=group["ns_dtype"])
        matrices.copy_(blended if wide else blended.mT)
        made = newton_schulz(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"], self._scratch)
        out.copy_(made if wide else made.mT).mul_(_adjusted(group["adjust_lr_fn"], rows, cols))


def newton_schulz(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, scratch: Scratch
) -> Tensor:
    """Runs steps of ``X <- a X + (b X X^T + c (X X^T)^2) X`` from ``X / |X|``, towards ``U V^T`` of ``X = U S V^T``.

    Args:
        matrices: ``(k, rows, cols)`` with ``rows <= cols``, overwritten.
        coefficients: ``a``, ``b``, ``c``.
        steps: how many.
        eps: the smallest norm that is divided by.
        scratch: for what comes between.

    Returns:
        ``(k, rows, cols)``, in memory of the arguments.
    """
    a, b, c = coefficients
    k, rows, cols = matrices.shape
    x, other = matrices, scratch("other", matrices, k, rows, cols)
    gram, powers = (scratch(name, matrices, k, rows, rows) for name in ("gram", "powers"))
    x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=eps))
    for _ in range(steps):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=powers)
        torch.baddbmm(x, powers, x, beta=a, out=other)
        x, other = other, x
    return x


def _adjusted(rule: str | None, rows: int, cols: int) -> float:
    """Returns the factor of a matrix's learning rate, by torch's names."""
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    ratio = rows / cols
    return math.sqrt(ratio if rule == "spectral_unclamped" else max(1.0, ratio))
