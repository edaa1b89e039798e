"""A parameter group on its way to :func:`layerpipe_kernels.triton.step.step_kernel`: tables and launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from layerpipe_kernels.options import AdamOptions, Options, PastDesign, SgdOptions, StepArguments
from layerpipe_kernels.triton import device as _device
from layerpipe_kernels.triton.step import (
    COUNT,
    EMA,
    FIELDS,
    MASTER,
    NUMEL,
    PAST,
    PREVIOUS,
    STATE,
    WEIGHT,
    step_kernel,
)

if TYPE_CHECKING:
    from layerpipe_kernels.plan import Arrays

CHUNK = 1 << 13  # elements per program
GRAPHS = 64  # that may capture a group's step before it is made outside of a capture again


class _Slot(NamedTuple):
    """Memory from which a captured graph reads its gradients' addresses: its own for as long as it can be replayed."""

    host: Tensor  # (2, tensors) int64, pinned: each replay copies it again
    device: Tensor  # the same


class TritonRunner:
    """One group's tables in the device's memory, and one launch per step.

    Raises:
        TypeError: float64 weights, or averages that are neither float32 nor bfloat16.
        ValueError: tensors on the CPU outside of Triton's interpreter.
    """

    launches = 1

    def __init__(self, rule: str, arrays: Arrays, grad_dtype: torch.dtype) -> None:
        weights = arrays.weights
        # No tensor is kept: the tables serve whatever lies at these addresses.
        self.rule, self.device, self.tensors = rule, weights[0].device, len(weights)
        emas = len(arrays.emas[0]) if arrays.emas else 0
        average = arrays.emas[0].dtype if arrays.emas else torch.float32
        _device.check_device(step_kernel, self.device)
        _device.check_dtype("weights", weights[0].dtype)
        _device.check_dtype("gradients", grad_dtype)
        _device.check_dtype("EMAs", average)
        self._records, self._chunks = self._upload(_records(arrays)), self._upload(_chunks(weights))
        self._done = torch.zeros((), dtype=torch.int32, device=self.device)
        self._grads = torch.empty((2, len(weights)), dtype=torch.int64, device=self.device)
        self._uploaded: list[int] = []  # what lies in `_grads`
        self._grads_aligned = True
        self._none_first = [0] * len(weights)
        self._captured: list[_Slot] = []
        self._spare: list[_Slot] = []
        self._spare = self._slots()
        self._streams = {self._stream()}
        pieces = _device.elements_per_piece(weights[0].dtype, grad_dtype, average)
        states = (t for state in arrays.states for t in state)
        tensors = (*weights, *states, *arrays.masters, *arrays.pasts, *arrays.previous)
        distances = [e[0].numel() * e.element_size() for e in arrays.emas] if emas > 1 else []
        self._aligned = _aligned([*(t.data_ptr() for t in (*tensors, *arrays.emas)), *distances])
        self._structure = {
            "RULE": rule,
            "STATES": len(arrays.states),
            "EMAS": emas,
            "HAS_MASTER": bool(arrays.masters),
            "HAS_PAST": bool(arrays.pasts),
            "HAS_PREVIOUS": bool(arrays.previous),
            "HAS_COUNTS": bool(arrays.counts),
            "WEIGHT_TYPE": _device.DTYPES[weights[0].dtype],
            "GRAD_TYPE": _device.DTYPES[grad_dtype],
            "EMA_TYPE": _device.DTYPES[average],
            "VEC": pieces,
            "BLOCK": 32 * _device.WARPS * pieces,
            "CHUNK": CHUNK,
            **_device.COMPILER,
        }
        self._configured: tuple[Any, PastDesign] | None = None
        self._numbers: dict[str, Any] = {}

    @property
    def programs(self) -> int:
        return len(self._chunks)

    def run(
        self, grads: Sequence[Tensor], first: Sequence[bool], options: Options, design: PastDesign, args: StepArguments
    ) -> None:
        arguments = self.arguments(grads, first, options, design, args)
        with _device.on(self.device):
            step_kernel[(self.programs,)](**arguments)

    def arguments(
        self, grads: Sequence[Tensor], first: Sequence[bool], options: Options, design: PastDesign, args: StepArguments
    ) -> dict[str, Any]:
        """All that the kernel is called with; the gradients' addresses are on their way to the device."""
        if self._configured is None or self._configured[0] != options[1:] or self._configured[1] is not design:
            self._configure(options, design)
        lr, lr_at = (0.0, options.lr) if isinstance(options.lr, Tensor) else (float(options.lr), None)
        addresses = [g.data_ptr() for g in grads]
        table, aligned = self._gradient_table(addresses, list(map(int, first)) if first else self._none_first)
        self._keep_until_done()
        return {
            "records": self._records,
            "grads": table,
            "chunks": self._chunks,
            "done": self._done,
            "lr_at": lr_at,
            "clock": args.clock,
            "grad_scale": args.grad_scale,
            "found_inf": args.found_inf,
            "horizon_at": args.horizon_at,
            "horizon": float(args.horizon),
            "horizon_before": float(args.horizon_before),
            "lr": lr,
            "t": args.t,
            "tensors": len(addresses),
            "ALIGNED": self._aligned and aligned,
            **self._numbers,
        }

    def _configure(self, options: Options, design: PastDesign) -> None:
        o = options
        mixes, decoupled, sign = False, False, 1.0
        if isinstance(o, SgdOptions):
            mixed = [1 - o.newest_share, o.newest_share and o.newest_share * (1 - o.dampening) / (1 - o.momentum)]
            numbers = [o.momentum, 1 - o.dampening, o.weight_decay, *([o.momentum, 1.0] if o.nesterov else mixed)]
            mixes = bool(o.nesterov or o.newest_share)
        elif isinstance(o, AdamOptions):
            log1, log2 = (math.log(beta) if beta > 0 else -math.inf for beta in (o.beta1, o.beta2))
            numbers = [o.beta1, 1 - o.beta1, log1, o.beta2, 1 - o.beta2, log2, o.eps, o.weight_decay, o.newest_share]
            mixes, decoupled = bool(o.newest_share), bool(o.decoupled)
        else:
            numbers = [o.weight_decay]
        if isinstance(o, (SgdOptions, AdamOptions)) and o.maximize:
            sign = -1.0
        self._numbers = {
            "numbers": tuple(map(float, numbers)),
            "decays": tuple(map(float, design.decays)),
            "rests": tuple(1.0 - decay for decay in design.decays),
            "taps": tuple(map(float, design.taps)),
            "sign": sign,
            "turn": float(design.turn),
            "update_tap": float(design.update_tap),
            "fill_tap": float(design.fill_tap),
            "fill_ratio": float(design.fill_ratio),
            "delay": design.delay,
            "seed": _device.signed(design.seed),
            "MIXES": mixes,
            "DECOUPLED": decoupled,
            "OF_GRADIENT": bool(design.ema_of_gradient),
            **self._structure,
        }
        self._configured = (options[1:], design)

    def _gradient_table(self, addresses: list[int], first: list[int]) -> tuple[Tensor, bool]:
        """Both on the device, uploaded if they have changed since the last step; and whether all is aligned.

        A captured graph copies its own addresses at every replay, from memory that nothing else writes to; it must not
        outlive the runner.
        """
        values = addresses + first
        if _device.capturing(self.device):
            if not self._spare:
                raise RuntimeError(
                    f"more than {GRAPHS} CUDA graphs of one parameter group: make a step outside of a capture between "
                    "them"
                )
            slot = self._spare.pop()
            self._captured.append(slot)
            slot.host.copy_(torch.tensor(values).view_as(slot.host))
            slot.device.copy_(slot.host, non_blocking=True)
            return slot.device, _aligned(addresses)
        if len(self._spare) < GRAPHS:
            self._spare += self._slots()
        if values != self._uploaded:
            # The allocator of pinned memory gives it away again only when the copy is done, so the next step may come.
            host = torch.tensor(values, dtype=torch.int64, pin_memory=self.device.type == "cuda")
            self._grads.copy_(host.view_as(self._grads), non_blocking=True)
            self._uploaded, self._grads_aligned = values, _aligned(addresses)
        return self._grads, self._grads_aligned

    def _slots(self) -> list[_Slot]:
        """As many as are missing: a capture can allocate no pinned memory."""
        shape = (GRAPHS - len(self._spare), 2, self.tensors)
        host = torch.empty(shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return [*map(_Slot, host, torch.empty(shape, dtype=torch.int64, device=self.device))]

    def _upload(self, table: Tensor) -> Tensor:
        if _device.capturing(self.device):
            raise RuntimeError(
                "the step's table of pointers cannot be made while a CUDA graph is captured: make one step before, "
                "with the same parameters"
            )
        return table.to(self.device)

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream) if self.device.type == "cuda" else 0

    def _keep_until_done(self) -> None:
        """On a stream that the tables were not made on, tell their allocator that they are used there too."""
        stream = self._stream()
        if stream not in self._streams and not _device.capturing(self.device):
            for table in (self._records, self._chunks, self._done, self._grads):
                table.record_stream(torch.cuda.current_stream(self.device))
            self._streams.add(stream)


def _aligned(addresses: Sequence[int]) -> bool:
    return not any(address % 16 for address in addresses)


def _records(arrays: Arrays) -> Tensor:
    fields = {
        WEIGHT: arrays.weights,
        MASTER: arrays.masters,
        EMA: arrays.emas,
        PAST: arrays.pasts,
        PREVIOUS: arrays.previous,
        COUNT: arrays.counts,
    }
    fields |= {STATE.value + j: state for j, state in enumerate(arrays.states)}
    table = torch.zeros((len(arrays.weights), FIELDS.value), dtype=torch.int64)
    for field, tensors in fields.items():
        if tensors:
            table[:, int(field)] = torch.tensor([t.data_ptr() for t in tensors])
    table[:, NUMEL.value] = torch.tensor([w.numel() for w in arrays.weights])
    return table


def _chunks(weights: Sequence[Tensor]) -> Tensor:
    """Tensor and first element of every program's work; at least one, because the last program counts the step."""
    tables = []
    for i, weight in enumerate(weights):
        begin = torch.arange(0, weight.numel(), CHUNK)
        tables.append(torch.stack([torch.full_like(begin, i), begin], dim=1))
    table = torch.cat(tables)
    return table if len(table) else torch.zeros((1, 2), dtype=torch.int64)
