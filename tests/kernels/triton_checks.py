"""Arrays for the Triton kernels, and the comparison of a step with the reference's."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from layerpipe_kernels.options import (
    NO_PAST,
    STEADY,
    AdamOptions,
    DirectionOptions,
    Options,
    PastDesign,
    SgdOptions,
    StepArguments,
)
from layerpipe_kernels.plan import Arrays, ReferenceRunner
from layerpipe_kernels.triton import TritonRunner, access

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
RUNNABLE = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
CHUNK = 1 << 12  # half the usual: two blocks of 16-bit, four of 32-bit elements
SIZES = [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 1023, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1]
FEW = [0, 5, 1030]
#: Relative: of 16 bits, one unit in the last place.
PRECISION = {F32: 1e-5, F16: 2**-10, BF16: 2**-7}
SGD = SgdOptions(lr=0.1, momentum=0.9, weight_decay=0.01)
ADAM = AdamOptions(lr=0.1, weight_decay=0.01)
DIRECTION = DirectionOptions(lr=0.1, weight_decay=0.01)


@pytest.fixture(autouse=True)
def claims_of_alignment_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter does not care where an access starts; a GPU refuses 16 bytes from anywhere else."""

    def checked_at(base: Any, start: Any, VEC: int) -> Any:
        first = base + start
        assert VEC == 1 or int(first.handle.data.item()) % 16 == 0, "said to be aligned, but is not"
        return first

    if INTERPRETED:
        monkeypatch.setattr(access, "_at", checked_at)


@pytest.fixture(autouse=True)
def arrays_of_one_element_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton 3.6 takes them for such, NumPy 2.5 no longer does."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def array(*shape: int, dtype: torch.dtype = F32, offset: int = 0) -> Tensor:
    """Random, starting ``offset`` elements behind a multiple of 16 bytes."""
    size = torch.Size(shape).numel()
    return torch.randn(size + offset, device=DEVICE).to(dtype)[offset:].view(shape)


def group(
    rule: str,
    sizes: list[int],
    *,
    weight: torch.dtype = F32,
    master: bool = False,
    ema: torch.dtype = F32,
    emas: int = 0,
    past: bool = True,
    states: int | None = None,
    counts: bool | None = None,
    previous: bool = False,
    offset: int = 0,
) -> Arrays:
    """A group with the past weights poisoned: what is not written stays NaN. Of two tensors, one has the offset."""
    states = {"sgd": 1, "adam": 2, "direction": 0, "adam_direction": 2}[rule] if states is None else states
    counts = rule.startswith("adam") if counts is None else counts

    def arrays(dtype: torch.dtype) -> list[Tensor]:
        return [array(size, dtype=dtype, offset=offset * (i % 2)) for i, size in enumerate(sizes)]

    masters = arrays(F32) if master else []
    return Arrays(
        weights=[m.to(weight) for m in masters] if master else arrays(weight),
        states=tuple([s.abs_() for s in arrays(F32)] for _ in range(states)),
        emas=[array(emas, s, dtype=ema, offset=offset * (i % 2)) for i, s in enumerate(sizes)] if emas else [],
        pasts=[p.fill_(float("nan")) for p in arrays(weight)] if past else [],
        masters=masters,
        counts=[torch.tensor(float(3 * i % 5), device=DEVICE) for i in range(len(sizes))] if counts else [],
        previous=arrays(F32) if previous else [],
    )


def copied(tensor: Tensor) -> Tensor:
    offset = tensor.storage_offset()
    copy = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=DEVICE)[offset:].view(tensor.shape)
    return copy.copy_(tensor)


def duplicate(arrays: Arrays) -> Arrays:
    """With the same alignment."""
    lists: Any = {name: [copied(t) for t in tensors] for name, tensors in arrays._asdict().items() if name != "states"}
    return Arrays(**lists, states=tuple([copied(t) for t in state] for state in arrays.states))


def gradients(arrays: Arrays, dtype: torch.dtype | None = None, offset: int = 0) -> list[Tensor]:
    return [array(*w.shape, dtype=dtype or w.dtype, offset=offset * (i % 2)) for i, w in enumerate(arrays.weights)]


def assert_agree(got: Arrays, want: Arrays) -> None:
    for name, ours, theirs in zip(Arrays._fields, got, want, strict=True):
        pairs = zip(ours, theirs, strict=True) if name != "states" else (
            pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True))  # fmt: skip
        for i, (a, b) in enumerate(pairs):
            torch.testing.assert_close(
                a, b, rtol=PRECISION[a.dtype], atol=1e-5, msg=lambda m, name=name, i=i: f"{name}, tensor {i}: {m}"
            )


def check(
    rule: str,
    arrays: Arrays,
    options: Options,
    design: PastDesign = NO_PAST,
    args: StepArguments = STEADY,
    *,
    grad: torch.dtype | None = None,
    first: list[bool] | None = None,
    offset: int = 0,
    steps: int = 1,
) -> Arrays:
    """Steps by both, which must agree; returns what Triton has made."""
    want = duplicate(arrays)
    ours = TritonRunner(rule, arrays, grad or arrays.weights[0].dtype)
    theirs = ReferenceRunner(rule, want)
    clock = args.clock
    for step in range(steps):
        grads = gradients(arrays, grad, offset)
        horizon_at = None if args.horizon_at is None else args.horizon_at.clone()
        ours.run(grads, first or [], options, design, args)
        copy = args if clock is None else args._replace(clock=torch.full_like(clock, int(clock) - 1))
        if args.horizon_at is not None:
            assert float(args.horizon_at) == args.horizon
            copy = copy._replace(horizon_at=horizon_at)
        theirs.run(grads, first or [], options, design, copy)
        assert clock is None or int(clock) == int(copy.clock), f"clock after step {step}"  # type: ignore[arg-type]
        assert_agree(arrays, want)
        for ema, other in zip(arrays.emas, want.emas, strict=True):
            if ema.dtype == BF16:  # the random bits are the same, so only a different last bit of a float32 is seen
                assert (ema != other).sum() <= 0.01 * ema.numel() + 1
    assert int(ours._done) == 0
    return arrays


DTYPES = [
    (F32, F32, False, F32, 0),
    (F32, F32, False, F32, 1),
    (F32, F32, False, BF16, 2),
    (BF16, BF16, False, BF16, 3),
    (BF16, F32, False, F32, 2),
    (BF16, BF16, True, BF16, 1),
    (BF16, F32, True, F32, 3),
    (F16, F16, False, BF16, 2),
    (F16, F32, False, F32, 1),
    (F16, F16, True, F32, 2),
    (F16, F32, True, BF16, 0),
]
DESIGN = PastDesign(delay=4, decays=(0.5, 0.8, 0.9), taps=(-3.0, 5.0, 1.5), update_tap=2.0, seed=3_000_000_000)


def design_of(emas: int) -> PastDesign:
    return DESIGN._replace(decays=DESIGN.decays[:emas], taps=DESIGN.taps[:emas])
