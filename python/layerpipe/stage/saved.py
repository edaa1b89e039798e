"""What autograd keeps of a stage's forward: activations as they are, weights as where they are.

Autograd saves references to parameters, which the optimizer then changes in place. A stage packs them as ``(parameter,
view)`` and hands the backward the same view of the past weights ``What(t - n)`` instead, made layer by layer, just in
time.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from layerpipe.tracing.spans import PAST, Recorder


class _Use:
    """A parameter in one forward: how it lay in memory, how often it was saved, and its past once more than one layer
    asks for it."""

    __slots__ = ("count", "param", "past", "stride")

    def __init__(self, param: Tensor) -> None:
        self.param, self.count, self.stride = param, 0, param.stride()
        self.past: Tensor | None = None


class _Kind(NamedTuple):
    """How the numbers in memory are read: a real weight as complex, a complex one conjugated."""

    dtype: torch.dtype
    conjugated: bool
    negated: bool


class _SavedWeight:
    """A saved tensor that lives in a parameter's memory: not the values, but where they are."""

    __slots__ = ("kind", "offset", "size", "stride", "use")
    use: _Use
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # bytes behind the parameter's first
    kind: _Kind | None  # where it is not the parameter's


class _SavedActivation:
    __slots__ = ("tensor", "version")
    tensor: Tensor
    version: int  # a change in place after the forward must still be noticed


class SavedTensors:
    """The hooks of one stage: ``with saved.hooks:`` around its forward.

    The graph keeps the hooks and a minibatch in flight keeps its graph; so nothing here refers to a minibatch, or it
    would keep itself alive.

    Args:
        params: all parameters of the stage, frozen ones too.
        past_view: the past of a parameter, valid until the stage's next update; ``None`` without a delay.
    """

    def __init__(self, params: Sequence[Tensor], past_view: Callable[[Tensor], Tensor] | None) -> None:
        self.past_view = past_view
        self.scratch_bytes = 0  # the largest past weight made for a backward
        self.as_they_are = False  # hand out the parameters themselves: their values are right, or not looked at
        self.spans: Recorder | None = None  # where reconstructions are timed, while somebody looks
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._params = [p for p in params if p.numel()]
        self._addresses: list[int] | None = None
        self._kept: dict[int, int] = {}
        self._uses: dict[int, _Use] = {}

    def begin(self) -> dict[int, int]:
        """Before a minibatch's forward; returns what will be kept of it, weights apart: address -> bytes."""
        addresses = [p.data_ptr() for p in self._params]
        if addresses != self._addresses:  # also after module.to or load_state_dict(assign=True)
            self._addresses = addresses
            spans = sorted((address, i) for i, address in enumerate(addresses))
            self._starts = [start for start, _ in spans]
            self._owners = [self._params[i] for _, i in spans]
            self._ends = [start + p.nbytes for start, p in zip(self._starts, self._owners, strict=True)]
        self._uses = {}
        self._kept = kept = dict[int, int]()
        return kept

    def resume(self, kept: dict[int, int]) -> None:
        """Go on counting for a minibatch that has begun."""
        self._kept = kept

    def _pack(self, tensor: Tensor) -> Tensor | _SavedWeight | _SavedActivation:
        pointer = tensor.data_ptr()
        at = bisect.bisect_right(self._starts, pointer) - 1
        if at >= 0 and pointer < self._ends[at]:
            owner = self._owners[at]
            if self.past_view is not None and owner.requires_grad:
                use = self._uses.get(at)
                if use is None:
                    use = self._uses[at] = _Use(owner)
                use.count += 1
                weight = _SavedWeight()
                weight.use, weight.size, weight.stride = use, tensor.size(), tensor.stride()
                weight.offset = pointer - self._starts[at]
                plain = tensor.dtype == owner.dtype and not tensor.is_conj() and not tensor.is_neg()
                weight.kind = None if plain else _Kind(tensor.dtype, tensor.is_conj(), tensor.is_neg())
                return weight
        else:
            self._kept[pointer] = tensor.nbytes
        saved = _SavedActivation()
        # The tensor itself may be the output of the node that saves it: a cycle that no collector sees.
        saved.tensor = tensor if tensor.is_leaf else tensor.detach()
        saved.version = tensor._version
        return saved

    def _unpack(self, saved: _SavedWeight | _SavedActivation) -> Tensor:
        if type(saved) is _SavedActivation:
            tensor = saved.tensor
            if tensor._version != saved.version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(tensor.shape)} needed for the backward was modified in place: "
                    f"it is at version {tensor._version}, expected {saved.version}"
                )
            return tensor
        assert type(saved) is _SavedWeight
        past = saved.use.param.detach() if self.as_they_are else self._past(saved.use)
        if past.stride() != saved.use.stride:  # the parameter was brought into another order since
            past = torch.empty_strided(past.shape, saved.use.stride, dtype=past.dtype, device=past.device).copy_(past)
        if saved.kind is not None:
            return _read_as(saved.kind, past, saved)
        if saved.size == past.shape and saved.stride == past.stride():
            return past
        return past.as_strided(saved.size, saved.stride, past.storage_offset() + saved.offset // past.itemsize)

    def _past(self, use: _Use) -> Tensor:
        """Made once in a backward, and kept only while another layer will ask for it."""
        use.count -= 1
        past = use.past
        if past is None:
            assert self.past_view is not None
            start = self.spans.now() if self.spans is not None else None
            past = self.past_view(use.param)
            if self.spans is not None:
                self.spans.add(PAST, start)
            if past.nbytes > self.scratch_bytes:
                self.scratch_bytes = past.nbytes
        use.past = past if use.count > 0 else None
        return past


def _read_as(kind: _Kind, past: Tensor, saved: _SavedWeight) -> Tensor:
    start = past.storage_offset() * past.itemsize + saved.offset
    view = torch.empty(0, dtype=kind.dtype, device=past.device)
    view.set_(past.untyped_storage(), start // kind.dtype.itemsize, saved.size, saved.stride)
    if kind.conjugated:
        view = view.conj()
    return torch._neg_view(view) if kind.negated else view
