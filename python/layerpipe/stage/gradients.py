"""Gradients of a stage's weights: clipped and checked, without a change to those of its inputs and outputs.

A weight's gradient may be a view of the memory of a gradient that is on its way upstream, or of one that came from the
next stage, which has weights of its own that it may be a gradient of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from layerpipe.stage.network_norm import NetworkNorm


def clip(params: Iterable[Tensor], max_norm: float, network: NetworkNorm | None = None) -> None:
    """Clip the norm of all gradients together, to the numbers of :func:`torch.nn.utils.clip_grad_norm_`.

    With ``network`` it is the norm of all stages' gradients that is clipped, as far as this stage knows it. torch's
    scales in place; here the weights get new gradients: one more of each for a moment.
    """
    params = [p for p in params if p.grad is not None]
    if params:
        grads = [p.grad for p in params if p.grad is not None]
        values = [g.coalesce().values() if g.is_sparse else g for g in grads]  # torch 2.11 has no norm of sparse ones
        norm = nn.utils.get_total_norm(values)
        if network is not None:
            norm = network.of_all(norm)
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for param, grad in zip(params, torch._foreach_mul(grads, factor), strict=True):
            param.grad = grad


def runs_hooks(optimizer: Any) -> bool:
    """Return whether hooks run before an optimizer's step, which may write into gradients."""
    if torch_optimizer._global_optimizer_pre_hooks:
        return True
    return bool(getattr(optimizer, "_optimizer_step_pre_hooks", None))


def memory_of(grads: Iterable[Tensor | None]) -> set[int]:
    """The addresses of what gradients lie in."""
    return {g.untyped_storage().data_ptr() for g in grads if g is not None and g.layout == torch.strided}


def own(params: Iterable[Tensor], others: set[int]) -> None:
    """Copy the gradients that lie in others' memory, for an optimizer that may write into them.

    So do torch's with Nesterov's momentum, where they update all weights in one call (``foreach=True``, the default on
    a GPU).
    """
    for param in params:
        grad = param.grad
        if grad is not None and grad.layout == torch.strided and grad.untyped_storage().data_ptr() in others:
            param.grad = grad.clone()
