"""A parameter group made ready for its step: checked once, run every step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from layerpipe_kernels import backend as _backend
from layerpipe_kernels import reference
from layerpipe_kernels.reference import SgdOptions


def describe(name: str, tensor: Tensor) -> str:
    return f"{name} (shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device})"


def check_tensor(name: str, tensor: Tensor, what: str = "tensor") -> None:
    """Refuse what no backend can update in place, by name."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{what} {describe(name, tensor)} is {tensor.layout}; only dense tensors are supported")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{what} {describe(name, tensor)} is not real floating point; keep it out of the optimizer")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{what} {describe(name, tensor)} is not contiguous, its strides are {tensor.stride()}; "
            "replace it by tensor.contiguous()"
        )


def check_like(name: str, tensor: Tensor, weight: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    wanted = dtype or weight.dtype
    if tensor.shape != weight.shape or tensor.device != weight.device or tensor.dtype != wanted:
        raise ValueError(
            f"{what} of {describe(name, weight)} must have its shape and device and dtype {wanted}, "
            f"got {describe(what, tensor)}"
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


class SgdPlan:
    """The arrays of one parameter group and, where the C++ backend runs them, their table of chunks.

    Args:
        weights: ``(*)`` each, updated in place.
        velocities: ``(*)`` each, or ``None`` without momentum.
        emas: ``(K, *)`` each, or ``None`` without EMAs.
        pasts: ``(*)`` each, written by the step, or ``None``.
        names: of the weights, for messages.
        backend: ``"cpp"`` or ``"reference"``, as :func:`layerpipe_kernels.backend.choose` says.

    Raises:
        TypeError: a sparse or non-floating-point tensor.
        ValueError: a non-contiguous tensor, mixed devices or dtypes, overlapping memory.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        velocities: Sequence[Tensor] | None,
        emas: Sequence[Tensor] | None,
        pasts: Sequence[Tensor] | None,
        *,
        names: Sequence[str],
        backend: str,
    ) -> None:
        self.weights, self.velocities, self.emas, self.pasts = weights, velocities, emas, pasts
        self.names, self.backend = names, backend
        self._check()
        self.written = [*weights, *(velocities or ()), *(emas or ()), *(pasts or ())]
        self._pointers = self.pointers(self.written)
        self._sizes = [w.numel() for w in weights]
        self._dtype = weights[0].dtype
        self.ema_count = emas[0].shape[0] if emas else 0
        self._plan = None
        if backend == "cpp":
            plan = getattr(_backend.extension(), f"StepPlan_{_backend.CPP_DTYPES[weights[0].dtype]}")
            self._plan = plan(
                self._sizes,
                self.pointers(weights),
                self.pointers(velocities or ()),
                self.pointers(emas or ()),
                self.ema_count,
                self.pointers(pasts or ()),
            )

    @staticmethod
    def pointers(tensors: Sequence[Tensor]) -> list[int]:
        return [t.data_ptr() for t in tensors]

    def fits(self, weights: Sequence[Tensor], states: Sequence[Tensor]) -> bool:
        """Whether these are still the arrays that the plan was made for."""
        return (
            self.pointers([*weights, *states]) == self._pointers
            and [w.numel() for w in weights] == self._sizes
            and all(w.dtype == self._dtype and w.is_contiguous() for w in weights)
        )

    def _check(self) -> None:
        device, dtype = self.weights[0].device, self.weights[0].dtype
        state = reference.state_dtype(dtype)
        for i, (name, weight) in enumerate(zip(self.names, self.weights, strict=True)):
            check_tensor(name, weight, "parameter")
            if weight.device != device:
                raise ValueError(
                    f"parameters on different devices in one group: {describe(self.names[0], self.weights[0])} and "
                    f"{describe(name, weight)}; make a group for each"
                )
            if self.velocities is not None:
                check_tensor(name, self.velocities[i], "momentum buffer of")
                check_like(name, self.velocities[i], weight, "momentum buffer", state)
            if self.emas is not None:
                check_tensor(name, self.emas[i], "ema of")
                wanted = (self.emas[0].shape[0], *weight.shape)
                if self.emas[i].shape != wanted or self.emas[i].dtype != state or self.emas[i].device != device:
                    raise ValueError(
                        f"the ema of {describe(name, weight)} must be {wanted}, {state}, on its device, "
                        f"got {describe('ema', self.emas[i])}"
                    )
            if self.pasts is not None:
                check_tensor(name, self.pasts[i], "past weight of")
                check_like(name, self.pasts[i], weight, "past weight")
            if self.backend == "cpp" and weight.dtype != dtype:
                raise ValueError(
                    f"parameters of different dtypes in one group: {describe(self.names[0], self.weights[0])} and "
                    f"{describe(name, weight)}; make a group for each"
                )
        kinds = (("", self.weights), ("momentum buffer of ", self.velocities or ()), ("ema of ", self.emas or ()),
                 ("past weight of ", self.pasts or ()))  # fmt: skip
        check_disjoint(
            [kind + name for kind, tensors in kinds for name, _ in zip(self.names, tensors, strict=False)],
            [t for _, tensors in kinds for t in tensors],
        )

    def step(self, grads: Sequence[Tensor], first: Sequence[bool], options: SgdOptions) -> None:
        """Run the step on checked gradients; the formulas are :func:`layerpipe_kernels.reference.sgd_step_`'s.

        Raises:
            ValueError: not one decay and one tap per EMA.
        """
        if not len(options.decays) == len(options.taps) == self.ema_count:
            raise ValueError(
                f"{self.ema_count} EMAs take as many decays and taps, got {len(options.decays)} and {len(options.taps)}"
            )
        if self._plan is not None:
            self._plan.sgd_step(self.pointers(grads), first, **options._asdict(), threads=torch.get_num_threads())
        else:
            for i, (weight, grad) in enumerate(zip(self.weights, grads, strict=True)):
                velocity = self.velocities[i] if self.velocities else None
                ema = self.emas[i] if self.emas else None
                past = self.pasts[i] if self.pasts else None
                reference.sgd_step_(weight, grad, velocity, ema, past, options, first=first[i])
        # A delayed backward that saved these tensors without the stage's hooks must fail, not be silently wrong.
        torch.autograd.graph.increment_version(self.written)

    def check_grads(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients, contiguous, or an error that names the parameter whose gradient cannot be used."""
        checked = []
        dtype, device = self.weights[0].dtype, self.weights[0].device.type
        for i, (grad, size) in enumerate(zip(grads, self._sizes, strict=True)):
            if grad.layout != torch.strided:
                raise TypeError(
                    f"the gradient of {describe(self.names[i], self.weights[i])} is {grad.layout}; only dense "
                    "gradients are supported (for nn.Embedding: sparse=False)"
                )
            # What autograd and the setter of .grad guarantee, checked cheaply; the details make the message.
            if grad.dtype != dtype or grad.numel() != size or grad.device.type != device:
                check_like(self.names[i], grad, self.weights[i], "gradient")
            checked.append(grad if grad.is_contiguous() else grad.contiguous())
        return checked
