"""In which order a tensor's elements lie in memory.

The kernels walk through memory from front to back. So a tensor may have its dimensions in any order (``channels_last``,
transposed) as long as it is dense, without gaps and overlaps, and all that belongs to one parameter has one order: the
parameter's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: A tensor's dimensions, that of the largest step through memory first.
Order = tuple[int, ...]


def order(tensor: Tensor) -> Order | None:
    """Returns a tensor's dimensions, that of the largest stride first; ``None`` for a tensor that is not dense."""
    if tensor.layout != torch.strided:
        return None
    dims = tuple(range(tensor.ndim))
    if tensor.is_contiguous():
        return dims
    strides = tensor.stride()
    dims = tuple(sorted(dims, key=lambda d: (-strides[d], -tensor.shape[d])))
    return dims if tensor.permute(dims).is_contiguous() else None


def distinct(tensor: Tensor) -> Tensor:
    """Returns a view without the repetitions of an expanded tensor: of size 1 where a dimension is the same memory.

    What is done to it in place is done to each element once.
    """
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return tensor
    for d, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and step == 0:
            tensor = tensor.narrow(d, 0, 1)
    return tensor


def room_like(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Returns uninitialised memory with the tensor's repetitions and gaps, which ``torch.empty_like`` leaves out."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device)


def fill(out: Tensor, tensor: Tensor) -> Tensor:
    """Copy a tensor of the same shape, which repeats at least what ``out`` repeats; the host does not wait."""
    once = distinct(out)
    once.copy_(tensor if once is out else tensor[tuple(map(slice, once.shape))], non_blocking=True)
    return out


def replica(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Returns a copy with the tensor's strides, repetitions and gaps: kernels round alike on both.

    For a ``device``, a dense tensor that is there already may be returned as it is.
    """
    tensor = tensor.detach()
    if order(tensor) is None and tensor.layout == torch.strided:
        return fill(room_like(tensor, device), tensor)
    return tensor.to(device or tensor.device, non_blocking=True, copy=device is None)


def in_memory(tensor: Tensor, dims: Order) -> Tensor:
    """Returns a view ``(*, dims)``, its last dimensions in their order in memory: contiguous if they are dense."""
    lead = tensor.ndim - len(dims)
    if dims == tuple(range(len(dims))):
        return tensor
    return tensor.permute(*range(lead), *(lead + d for d in dims))


def follows(tensor: Tensor, weight: Tensor) -> bool:
    """Returns whether ``(*)`` or ``(K, *)`` is laid out as the dense weight ``(*)``, ``K`` times behind each other."""
    if weight.is_contiguous() and tensor.is_contiguous():
        return True
    lead, strides = tensor.ndim - weight.ndim, tensor.stride()
    if strides[lead:] == weight.stride() and (not lead or strides[0] == weight.numel()):
        return True
    dims = order(weight)  # one element of a dimension may have any stride
    return dims is not None and in_memory(tensor, dims).is_contiguous()


def like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Returns a tensor ``(*)`` or ``(K, *)`` in the order of the weight ``(*)``: itself, or a copy."""
    if follows(tensor, weight):
        return tensor
    lead = tensor.shape[: tensor.ndim - weight.ndim]
    if not lead:
        return torch.empty_like(weight, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return arrange(torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device), weight, *lead).copy_(tensor)


def arrange(memory: Tensor, weight: Tensor, *lead: int) -> Tensor:
    """Returns memory ``(numel,)`` as ``(*)`` or, for a ``lead`` of ``K``, ``(K, *)``.

    With the strides of the weight ``(*)``; in the natural order where that is not dense.
    """
    if not weight.numel() or order(weight) is None:
        return memory.view((*lead, *weight.shape))
    return memory.as_strided((*lead, *weight.shape), (*(weight.numel() for _ in lead), *weight.stride()))


def align(state: dict[str, Any], weight: Tensor) -> None:
    """Bring a parameter's state into its order, after a checkpoint of another one or ``model.to(memory_format=...)``.

    Args:
        state: of ``weight``; tensors ``(*)`` and ``(K, *)`` that do not follow it are replaced.
        weight: ``(*)``; where it is not dense, nothing can follow it.

    Raises:
        RuntimeError: a CUDA graph is captured, which would move them again in every replay.
    """
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim - weight.ndim not in (0, 1) or follows(value, weight):
            continue
        if value.shape[value.ndim - weight.ndim :] != weight.shape or order(weight) is None:
            continue
        if value.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the state of a weight of shape {tuple(weight.shape)} has another order in memory than the weight has "
                "now: make a step before a CUDA graph is captured"
            )
        with torch.inference_mode(False), torch.no_grad():
            state[key] = like(value, weight)
