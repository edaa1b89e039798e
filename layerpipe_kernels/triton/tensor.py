"""Past weights of one tensor, and the update of one tensor's averages: launches of :mod:`.tensor_kernels`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from layerpipe_kernels.triton import device as _device
from layerpipe_kernels.triton.tensor_kernels import ema_kernel, reconstruct_kernel


def reconstruct(
    weight: Tensor, terms: Sequence[Tensor], taps: Sequence[float] | Tensor, out: Tensor, numel: int
) -> None:
    """:func:`layerpipe_kernels.reference.reconstruct` of ``numel`` elements, in the order of memory."""
    _device.check_device(reconstruct_kernel, out.device)
    tensors = (out, weight, *terms)
    for tensor in tensors:
        _device.check_dtype("tensors", tensor.dtype)
    on_device = isinstance(taps, Tensor)
    vec, block, programs = _division(tensors, numel)
    if numel == 0:
        return
    with _device.on(out.device):
        reconstruct_kernel[(programs,)](
            out,
            weight,
            tuple(terms),
            () if on_device else tuple(map(float, taps)),
            taps if on_device else None,
            numel,
            VEC=vec,
            BLOCK=block,
            **_device.COMPILER,
        )


def ema_update_(emas: Sequence[Tensor], update: Tensor, decays: Sequence[float], seed: int, turn: float = 0.0) -> None:
    """:func:`layerpipe_kernels.reference.ema_update_`, in the order of memory."""
    _device.check_device(ema_kernel, update.device)
    tensors = (update, *emas)
    for tensor in tensors:
        _device.check_dtype("tensors", tensor.dtype)
    vec, block, programs = _division(tensors, update.numel())
    if update.numel() == 0 or not emas:
        return
    with _device.on(update.device):
        ema_kernel[(programs,)](
            tuple(emas),
            update,
            tuple(map(float, decays)),
            tuple(1.0 - decay for decay in decays),
            float(turn),
            _device.signed(seed),
            update.numel(),
            VEC=vec,
            BLOCK=block,
            **_device.COMPILER,
        )


def _division(tensors: Sequence[Tensor], numel: int) -> tuple[int, int, int]:
    """Elements per piece (1 where an address is not a multiple of 16 bytes) and per program, and programs."""
    pieces = _device.elements_per_piece(*(t.dtype for t in tensors))
    block = 32 * _device.WARPS * pieces
    return 1 if any(t.data_ptr() % 16 for t in tensors) else pieces, block, -(-numel // block)
