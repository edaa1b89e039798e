"""Clipping that leaves alone what it is given."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def clip(params: Iterable[Tensor], max_norm: float) -> None:
    """Clip the norm of all gradients together, to the numbers of :func:`torch.nn.utils.clip_grad_norm_`.

    That scales in place; but a weight's gradient may be a view of the memory of one that is on its way upstream, or of
    one that came from there and is still needed. Here the weights get new gradients: one more of each for a moment.
    """
    params = [p for p in params if p.grad is not None]
    if params:
        grads = [p.grad for p in params if p.grad is not None]
        values = [g.coalesce().values() if g.is_sparse else g for g in grads]  # torch 2.11 has no norm of sparse ones
        factor = torch.clamp(max_norm / (nn.utils.get_total_norm(values) + 1e-6), max=1.0)
        for param, grad in zip(params, torch._foreach_mul(grads, factor), strict=True):
            param.grad = grad
