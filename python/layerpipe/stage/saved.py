"""Tensors that autograd keeps of a stage's forward: activations as they are, weights as where they are.

Autograd saves references to parameters, which the optimizer then changes in place. A stage packs them as ``(parameter,
view)`` and hands the backward the same view of the past weights ``What(t - n)`` instead, made layer by layer, just in
time. Buffers and constants are written to as well, by the forwards of later minibatches: what the forward leaves behind
when it returns is kept as a copy.
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerpipe.stage.hooks import running, tell_of_other_hooks
from layerpipe.tracing.spans import PAST, Recorder
from layerpipe_kernels.layout import replica

_hooks: Any = torch._C._autograd
_push, _pop = _hooks._push_saved_tensors_default_hooks, _hooks._pop_saved_tensors_default_hooks
_references: Callable[[int], int] = torch._C._storage_Use_Count

#: Larger constants are not copied for every minibatch in flight: bytes.
_LARGEST_COPY = 1 << 24


class _Use:
    """A parameter in one forward: how it lay in memory, how often it was saved, and its past once more than one layer
    asks for it."""

    __slots__ = ("count", "param", "past", "stride")

    def __init__(self, param: Tensor) -> None:
        self.param, self.count, self.stride = param, 0, param.stride()
        self.past: Tensor | None = None


class _Kind(NamedTuple):
    """The way that numbers in memory are read: a real weight as complex, a complex one conjugated."""

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

    def __init__(self, tensor: Tensor, version: int) -> None:
        self.tensor = tensor
        self.version = version  # a change in place after the forward must still be noticed


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class SavedTensors:
    """The hooks of one stage: ``with saved:`` around its forward, between :meth:`begin` and :meth:`end`.

    The graph keeps the hooks and a minibatch in flight keeps its graph; so nothing here refers to a minibatch, or it
    would keep itself alive.

    Args:
        params: all parameters of the stage, frozen ones too.
        past_view: the past of a parameter, valid until the stage's next update; ``None`` without a delay.
    """

    def __init__(self, params: Sequence[Tensor], past_view: Callable[[Tensor], Tensor] | None) -> None:
        self.past_view = past_view
        self.scratch_bytes = 0  # the largest past weight made for a backward
        self.hands_past = False  # in a backward; anything else gets the parameters themselves
        self.in_place: dict[Tensor, Tensor] = {}  # the past of weights whose memory holds it at the moment
        self.watched = False  # whether a mode of torch's looks at what is called in the backward
        self.unseen = self.lifted = False  # as in layerpipe.stage.hooks
        self.spans: Recorder | None = None  # where reconstructions are timed, while somebody looks
        self._params = [p for p in params if p.numel()]
        self._addresses: list[int] | None = None
        self._kept: dict[int, int] = {}
        self._uses: dict[int, _Use] = {}
        self.constants: list[_SavedActivation] = []  # of the forward or the loss that has just run, for :meth:`end`
        self._pair = self._pack, self._unpack
        self._unwatched = torch._C.DisableTorchFunction()
        tell_of_other_hooks()

    def __enter__(self) -> None:
        _push(*self._pair)
        running.stage = self

    def __exit__(self, *error: object) -> None:
        running.stage = None
        _pop()

    def push(self) -> None:
        _push(*self._pair)

    def pop(self) -> None:
        _pop()

    def on_top(self) -> bool:
        top = _hooks._top_saved_tensors_default_hooks(True)
        return top is not None and top[0] is self._pair[0]

    def begin(self) -> dict[int, int]:
        """Before a minibatch's forward; returns what will be kept of it, weights apart: address -> bytes."""
        self.find_weights()
        self._uses, self.unseen = {}, False
        self._kept = kept = dict[int, int]()
        return kept

    def resume(self, kept: dict[int, int]) -> None:
        """Go on counting for a minibatch that has begun."""
        self._kept = kept

    def end(self, inputs: Iterable[Any]) -> None:
        """After a forward or a loss that has left :attr:`constants`: copy what others than the graph and the caller,
        whose ``inputs`` are kept, hold and may change."""
        given = {x.data_ptr() for x in inputs if isinstance(x, Tensor) and x.layout == torch.strided}
        constants = [saved for saved in self.constants if saved.tensor.data_ptr() not in given]
        self.constants = []
        if not constants:
            return
        memory = [saved.tensor.untyped_storage()._cdata for saved in constants]
        kept = collections.Counter(memory)
        fed = {x.untyped_storage()._cdata for x in inputs if isinstance(x, Tensor) and x.layout == torch.strided}
        for saved, at in zip(constants, memory, strict=True):
            tensor = saved.tensor
            others = _references(at) - 1 - kept[at]
            if others and at not in fed and tensor.nbytes <= _LARGEST_COPY and tensor._version == saved.version:
                saved.tensor = tensor.clone() if tensor.is_contiguous() else replica(tensor)
                saved.version = saved.tensor._version
                kept[at] -= 1

    def owner(self, tensor: Tensor) -> Tensor | None:
        """The parameter in whose memory a tensor lies, ``None`` where there is none."""
        try:
            pointer = tensor.data_ptr()
        except RuntimeError:  # sparse, or of torch.func
            return None
        at = self._at(pointer)
        return self._owners[at] if at >= 0 else None

    def find_weights(self) -> None:
        """Look where the weights lie at present."""
        addresses = [p.data_ptr() for p in self._params]
        if addresses != self._addresses:  # also after module.to or load_state_dict(assign=True)
            self._addresses = addresses
            spans = sorted((address, i) for i, address in enumerate(addresses))
            self._starts = [start for start, _ in spans]
            self._owners = [self._params[i] for _, i in spans]
            self._ends = [start + p.nbytes for start, p in zip(self._starts, self._owners, strict=True)]

    def _at(self, pointer: int) -> int:
        at = bisect.bisect_right(self._starts, pointer) - 1
        return at if at >= 0 and pointer < self._ends[at] else -1

    def _pack(self, tensor: Tensor) -> Tensor | _SavedWeight | _SavedActivation:
        if tensor.layout != torch.strided:
            return self._pack_sparse(tensor)
        pointer = tensor.data_ptr()
        # The tensor itself may be the output of the node that saves it: a cycle that no collector sees. And whoever
        # assigns to its .data leaves a detached one as it is.
        at = bisect.bisect_right(self._starts, pointer) - 1
        if at < 0 or pointer >= self._ends[at]:
            self._kept[pointer] = tensor.nbytes
            saved = _SavedActivation(tensor.detach(), tensor._version)
            if not tensor.requires_grad and self.past_view is not None and not tensor.is_nested:
                self.constants.append(saved)
            return saved
        owner = self._owners[at]
        if self.past_view is None or not owner.requires_grad:
            return _SavedActivation(tensor.detach(), tensor._version)
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

    def _pack_sparse(self, tensor: Tensor) -> Tensor | _SavedActivation:
        """Values that lie in a weight's memory are kept as a copy."""
        if tensor.layout == torch.sparse_coo:
            values = tensor._values()
        elif tensor.layout in _COMPRESSED:
            values = tensor.values()
        else:
            return _SavedActivation(tensor.detach(), tensor._version)
        self._kept[values.data_ptr()] = values.nbytes
        saved = tensor.detach()
        return _SavedActivation(saved.clone() if self._at(values.data_ptr()) >= 0 else saved, saved._version)

    def _unpack(self, saved: _SavedWeight | _SavedActivation) -> Tensor:
        if not self.watched:
            return self._unpacked(saved)
        with self._unwatched:
            return self._unpacked(saved)

    def _unpacked(self, saved: _SavedWeight | _SavedActivation) -> Tensor:
        if type(saved) is _SavedActivation:
            if saved.tensor._version != saved.version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(saved.tensor.shape)} needed for the backward was modified in place: "
                    f"it is at version {saved.tensor._version}, expected {saved.version}"
                )
            return saved.tensor
        assert type(saved) is _SavedWeight
        past = self._past(saved.use) if self.hands_past else saved.use.param.detach()
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
        if past is None and self.in_place:
            past = self.in_place.get(use.param)
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
