"""The compiled kernels, on the CPU and on CUDA devices: tensors in, raw pointers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerpipe_kernels import backend as _backend
from layerpipe_kernels.layout import distinct
from layerpipe_kernels.options import AdamOptions, Options, PastDesign, SgdOptions, StepArguments

if TYPE_CHECKING:
    from layerpipe_kernels.plan import Arrays

_extension: Any = _backend.extension()
DTYPES: dict[torch.dtype, int] = (
    {getattr(torch, name): number for name, number in _extension.DTYPES.items()} if _extension is not None else {}
)


#: torch's C functions for looking at a tensor (DLPack), where it has them.
EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)

#: Elements per block of work where a plan does not say; 0 for the kernels' own choice. For benches.
default_chunk = 0


def device_number(device: torch.device) -> int:
    """As the kernels have it: CUDA's number, -1 for the CPU."""
    return -1 if device.type == "cpu" else int(device.index or 0)


def current_stream(number: int) -> int:
    """The handle of the device's current stream, which every launch goes to; 0 on the CPU."""
    return 0 if number < 0 else int(torch._C._cuda_getCurrentRawStream(number))


def pointers(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def all_finite(tensor: Tensor) -> bool:
    """Returns whether a tensor has no NaN and no infinity; waits for its device."""
    finite: bool | None = _extension.all_finite(tensor, EXCHANGE) if _extension is not None else None
    if finite is None and (once := distinct(tensor)) is not tensor:
        return all_finite(once)
    return bool(torch.isfinite(tensor).all()) if finite is None else finite


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _array(tensor: Tensor) -> tuple[int, int]:
    """As the kernels have it: address and dtype."""
    return tensor.data_ptr(), DTYPES[tensor.dtype]


def _place(device: torch.device) -> tuple[int, int, int]:
    """The place of a kernel's work: device, stream, and threads of the CPU."""
    number = device_number(device)
    return number, current_stream(number), torch.get_num_threads() if number < 0 else 1


class NativeRunner:
    """One group's pointers, chunks and, on a GPU, the table of them in its memory."""

    def __init__(self, rule: str, arrays: Arrays, grad_dtype: torch.dtype, chunk: int = 0) -> None:
        weights = arrays.weights
        self.device = weights[0].device
        self.number = device_number(self.device)
        full = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        self.plan = _extension.StepPlan(
            rule,
            device=self.number,
            weight=DTYPES[weights[0].dtype],
            grad=DTYPES[grad_dtype],
            average=DTYPES[arrays.emas[0].dtype if arrays.emas else full],
            emas=len(arrays.emas[0]) if arrays.emas else 0,
            numels=[w.numel() for w in weights],
            weights=pointers(weights),
            masters=pointers(arrays.masters),
            states=[pointers(state) for state in arrays.states],
            averages=pointers(arrays.emas),
            pasts=pointers(arrays.pasts),
            counts=pointers(arrays.counts),
            previous=pointers(arrays.previous),
            chunk=chunk or default_chunk,
        )
        self._configured: tuple[Any, PastDesign] | None = None
        self._table = self._upload()

    @property
    def launches(self) -> int:
        """Kernel launches per step; 0 on the CPU."""
        return int(self.plan.launches)

    def _upload(self) -> Tensor | None:
        if self.number < 0:
            return None
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the step's table of pointers cannot be made while a CUDA graph is captured: make one step before, "
                "with the same parameters and gradients"
            )
        # The caching allocator may hand this memory on as soon as the plan is gone; the copy waits until it is done.
        table = torch.frombuffer(bytearray(self.plan.table()), dtype=torch.uint8).to(self.device)
        self.plan.set_table(table.data_ptr())
        self._stream = current_stream(self.number)
        return table

    def run(
        self, grads: Sequence[Tensor], first: Sequence[bool], options: Options, design: PastDesign, args: StepArguments
    ) -> None:
        """``grads`` is empty where a ``Collector`` has put the gradients into the plan."""
        if self._configured is None or self._configured[0] != options[1:] or self._configured[1] is not design:
            self._configure(options, design)
        if grads:
            self.plan.set_grads([g.data_ptr() for g in grads])
        lr, lr_at = (0.0, options.lr.data_ptr()) if isinstance(options.lr, Tensor) else (options.lr, 0)
        self.plan.step(
            lr,
            args.t,
            first,
            lr_at,
            _pointer(args.clock),
            _pointer(args.grad_scale),
            _pointer(args.found_inf),
            args.horizon,
            args.horizon_before,
            _pointer(args.horizon_at),
            (self.number, *self.current()),
        )

    def current(self) -> tuple[int, int]:
        """The stream that work goes to now, and the threads that share it on the CPU."""
        if self.number < 0:
            return 0, torch.get_num_threads()
        stream = current_stream(self.number)
        if self._table is not None and stream != self._stream:
            self._table.record_stream(torch.cuda.current_stream(self.device))
        return stream, 1

    def _configure(self, options: Options, design: PastDesign) -> None:
        o = options
        if isinstance(o, SgdOptions):
            numbers = [o.momentum, o.dampening, o.weight_decay, o.nesterov, o.maximize, o.newest_share]
        elif isinstance(o, AdamOptions):
            numbers = [o.beta1, o.beta2, o.eps, o.weight_decay, o.decoupled, o.maximize, o.newest_share]
        else:
            numbers = [o.weight_decay]
        self.plan.configure(
            [float(number) for number in numbers],
            delay=design.delay,
            decays=design.decays,
            taps=design.taps,
            update_tap=design.update_tap,
            fill_tap=design.fill_tap,
            fill_ratio=design.fill_ratio,
            ema_of_gradient=design.ema_of_gradient,
            seed=design.seed & 0xFFFFFFFF,
            turn=design.turn,
        )
        self._configured = (options[1:], design)


def mix(
    weight: Tensor,
    velocity: Tensor | None,
    velocity_tap: float,
    ema: Tensor | None,
    ema_taps: Sequence[float],
    out: Tensor,
) -> None:
    """:func:`layerpipe_kernels.ops.mix`: the averages by address, because cutting them out takes longest."""
    terms, taps = [], []
    if velocity is not None:
        terms.append(_array(velocity))
        taps.append(velocity_tap)
    if ema is not None:
        begin, step, dtype = ema.data_ptr(), weight.numel() * ema.element_size(), DTYPES[ema.dtype]
        terms += [(begin + k * step, dtype) for k in range(len(ema_taps))]
        taps += ema_taps
    numel = weight.numel()
    _extension.reconstruct(_place(weight.device), _array(out), _array(weight), numel, terms, taps, 0)


def reconstruct(
    weight: Tensor, terms: Sequence[Tensor], taps: Sequence[float] | Tensor, out: Tensor, numel: int
) -> None:
    """:func:`layerpipe_kernels.reference.reconstruct` of ``numel`` elements, in the order of memory."""
    if weight.is_cpu and isinstance(taps, Tensor):
        taps = taps.tolist()
    numbers, at = ((), taps.data_ptr()) if isinstance(taps, Tensor) else (taps, 0)
    arrays = [_array(term) for term in terms]
    _extension.reconstruct(_place(weight.device), _array(out), _array(weight), numel, arrays, numbers, at)


def ema_update_(emas: Sequence[Tensor], update: Tensor, decays: Sequence[float], seed: int, turn: float) -> None:
    """:func:`layerpipe_kernels.reference.ema_update_`, in the order of memory."""
    _extension.ema_update(
        _place(update.device),
        [_array(e) for e in emas],
        _array(update),
        update.numel(),
        decays,
        seed & 0xFFFFFFFF,
        turn,
    )
