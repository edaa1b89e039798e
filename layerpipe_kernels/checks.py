"""Checks of arguments that no backend can work with, made before anything is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layerpipe_kernels import layout
from layerpipe_kernels.options import (
    MAX_EMAS,
    AdamOptions,
    DirectionOptions,
    Options,
    PastDesign,
    SgdOptions,
    StepArguments,
)


def describe(name: str, tensor: Tensor) -> str:
    return f"{name} (shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device})"


def check_tensor(name: str, tensor: Tensor, what: str = "tensor", weight: Tensor | None = None) -> None:
    """Refuse by name what no backend can update in place, and given a ``weight``, what lies in another order."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{what} {describe(name, tensor)} is {tensor.layout}; only dense tensors are supported")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{what} {describe(name, tensor)} is not real floating point; keep it out of the optimizer")
    if not tensor.is_meta and tensor.numel() and not tensor.data_ptr():
        raise TypeError(
            f"{what} {describe(name, tensor)} has no memory of its own; it is a {type(tensor).__name__}, "
            "and only plain tensors are supported"
        )
    if tensor.is_neg():  # the imaginary part of a conjugate
        raise ValueError(f"{what} {describe(name, tensor)} is a negated view; replace it by tensor.resolve_neg()")
    if weight is not None and layout.follows(tensor, weight):
        return
    if layout.order(tensor) is None:
        raise ValueError(
            f"{what} {describe(name, tensor)} has gaps or overlaps in memory, its strides are {tensor.stride()}; "
            "replace it by tensor.contiguous()"
        )
    if weight is not None:
        raise ValueError(
            f"{what} {describe(name, tensor)} has its elements in another order in memory than the rest, with strides "
            f"{tensor.stride()} where those are {weight.stride()}; layout.like(tensor, weight) is a copy in that one"
        )


def check_like(name: str, tensor: Tensor, weight: Tensor, what: str, *dtypes: torch.dtype) -> None:
    wanted = dtypes or (weight.dtype,)
    if tensor.shape != weight.shape or tensor.device != weight.device or tensor.dtype not in wanted:
        raise ValueError(
            f"{what} of {describe(name, weight)} must have its shape and device and dtype "
            f"{' or '.join(map(str, wanted))}, got {describe(what, tensor)}"
        )


def check_disjoint(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Refuse written tensors that share memory."""
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), name)
        for name, t in zip(names, tensors, strict=True)
        if t.numel() and t.device.type != "meta"
    )
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"{first} and {second} share memory and would be updated twice in one step")


def check_scalar(name: str, value: Tensor | None, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Refuse a scalar that a kernel cannot read on its device: it must be a tensor of one element there."""
    if value is None:
        return
    if value.numel() != 1 or value.dtype != dtype or value.device != device:
        raise ValueError(f"{name} must be one {dtype} number on {device}, got {describe(name, value)}")


def check_turn(decays: Sequence[float], turn: float) -> None:
    """Refuse a coupling of two averages with which what they remember would grow."""
    if turn == 0:
        return
    if len(decays) < 2:
        raise ValueError(f"turn={turn} couples two EMAs, got {len(decays)}")
    if not decays[0] * decays[1] + turn * turn <= 1.0:
        raise ValueError(f"turn={turn} with decays {decays[0]} and {decays[1]} lets the averages grow without bound")


def check_options(options: Options, design: PastDesign, args: StepArguments, emas: int, device: torch.device) -> None:
    """Refuse hyperparameters that would spoil the weights, and designs that do not fit the arrays.

    Raises:
        ValueError: names the option.
    """
    for name, value in options._asdict().items():
        if isinstance(value, Tensor):
            check_scalar(name, value, device)
        elif not math.isfinite(value):
            raise ValueError(f"{name} is {value}; refusing to step")
    if isinstance(options, AdamOptions):
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(options, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(options, name)}")
    if not isinstance(options, DirectionOptions):
        share = options.newest_share
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"newest_share must be in [0, 1], got {share}")
        if share and isinstance(options, SgdOptions):
            if options.nesterov:
                raise ValueError("nesterov and newest_share both say how the newest gradient counts: give one of them")
            if not 0.0 <= options.momentum < 1.0:
                raise ValueError(f"newest_share takes a momentum in [0, 1), got {options.momentum}")
    if not len(design.decays) == len(design.taps) == emas:
        raise ValueError(f"{emas} EMAs take as many decays and taps, got {len(design.decays)} and {len(design.taps)}")
    if design.delay < 0 or args.t < 0:
        raise ValueError(f"delay and t are at least 0, got {design.delay} and {args.t}")
    if emas > MAX_EMAS:
        raise ValueError(f"at most {MAX_EMAS} EMAs, got {emas}")
    for k, decay in enumerate(design.decays):
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decays[{k}] must be in [0, 1], got {decay}")
    check_turn(design.decays, design.turn)
    for name, number in (
        *((f"taps[{k}]", tap) for k, tap in enumerate(design.taps)),
        ("update_tap", design.update_tap),
        ("fill_tap", design.fill_tap),
        ("horizon", args.horizon),
        ("horizon_before", args.horizon_before),
    ):
        if not math.isfinite(number):
            raise ValueError(f"{name} is {number}; refusing to step")
    check_scalar("clock", args.clock, device, torch.int64)
    check_scalar("grad_scale", args.grad_scale, device)
    check_scalar("found_inf", args.found_inf, device)
    check_scalar("horizon_at", args.horizon_at, device)
