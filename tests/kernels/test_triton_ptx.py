"""The Triton kernels compiled for an H100, without one: width of accesses, registers, no recompilation."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from layerpipe_kernels.options import NO_PAST, AdamOptions, DirectionOptions, PastDesign, SgdOptions, StepArguments
from layerpipe_kernels.plan import Arrays

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

# ruff: noqa: E402 - only where Triton is installed and compiles
from triton.backends.compiler import GPUTarget

from layerpipe_kernels.triton import TritonRunner, device
from layerpipe_kernels.triton.step import step_kernel
from layerpipe_kernels.triton.tensor_kernels import ema_kernel, reconstruct_kernel

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MAX_REGISTERS = 128


class H100:
    """What the compiler asks a driver, answered for a machine that need not be there."""

    name = "ahead of time"

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def _h100() -> Iterator[None]:
    """Meta tensors have addresses of zero, which are multiples of 16: with them the kernels are only compiled."""
    driver = triton.runtime.driver
    real = driver._active
    driver.set_active(H100())
    yield
    driver._active = real


def meta(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def runner(
    rule: str, weight: torch.dtype, grad: torch.dtype, master: bool, ema: torch.dtype, emas: int, states: int,
    previous: bool = False,
) -> TritonRunner:  # fmt: skip
    arrays = Arrays(
        weights=[meta(64, dtype=weight)],
        states=tuple([meta(64)] for _ in range(states)),
        emas=[meta(emas, 64, dtype=ema)] if emas else [],
        pasts=[meta(64, dtype=weight)],
        masters=[meta(64)] if master else [],
        counts=[meta()],
        previous=[meta(64)] if previous else [],
    )
    return TritonRunner(rule, arrays, grad)


def arguments(rule: TritonRunner, grad: torch.dtype, emas: int, **changes: Any) -> dict[str, Any]:
    options = {
        "sgd": SgdOptions(0.1, 0.9, newest_share=0.1), "adam": AdamOptions(0.1), "direction": DirectionOptions(0.1),
    }[rule.rule]  # fmt: skip
    design = PastDesign(4, (0.5,) * emas, (1.0,) * emas, 0.5)
    args = StepArguments(clock=meta(dtype=torch.int64), grad_scale=meta(), found_inf=meta())
    return rule.arguments([meta(64, dtype=grad)], [], options, design, args) | changes


def accesses(ptx: str) -> tuple[Counter[int], Counter[int]]:
    """Bytes per access -> accesses, of the loads and of the stores of arrays.

    Loads of table entries, counts and scalars are left out: only arrays are loaded with ``evict_first``. Stores of
    counts, clock and counter are not (they are of 4 or 8 bytes).
    """
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for line in ptx.splitlines():
        found = re.search(r"\b(ld|st)\.global(\S*?)\.(?:v(\d)\.)?[bfsu](\d+)\s", line)
        if found is None:
            assert "ld.global" not in line, line
            assert "st.global" not in line, line
        elif found[1] == "st":
            stores[int(found[3] or 1) * int(found[4]) // 8] += 1
        elif "evict_first" in found[2]:
            loads[int(found[3] or 1) * int(found[4]) // 8] += 1
    return loads, stores


def usage(kernel: Any, directory: Path) -> dict[str, int]:
    """Registers, bytes of stack and of local memory per thread."""
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


COMBINATIONS = [
    (weight, grad, master, ema)
    for weight in (F32, BF16, F16)
    for grad in {weight: 0, F32: 0}
    for master in ((False, True) if weight != F32 else (False,))
    for ema in (F32, BF16)
]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["sgd", "adam", "direction"])
@pytest.mark.parametrize(("weight", "grad", "master", "ema"), COMBINATIONS)
def test_every_access_of_an_aligned_step_is_16_bytes_wide(
    rule: str, weight: torch.dtype, grad: torch.dtype, master: bool, ema: torch.dtype, tmp_path: Path
) -> None:
    """Each array takes exactly the 16-byte accesses that its bytes make, and one narrow access in the scalar tail."""
    emas = 1 + COMBINATIONS.index((weight, grad, master, ema)) % 3
    states = {"sgd": 1, "adam": 2 + emas % 2, "direction": 0}[rule]
    previous = emas != 2
    step = runner(rule, weight, grad, master, ema, emas, states, previous)
    given = arguments(step, grad, emas)
    assert given["ALIGNED"]
    kernel = step_kernel.warmup(grid=(1,), **given)
    kept = [F32] * (states + previous) + [ema] * emas
    read = [F32 if master else weight, grad, *kept]
    written = [weight, *[F32] * master, *kept, weight]
    loads, stores = accesses(kernel.asm["ptx"])
    for array in (F32.itemsize, BF16.itemsize):
        assert loads[array] == sum(dtype.itemsize == array for dtype in read), "loads of the tail"
    stores -= Counter({4: 2, 8: 1})  # count and counter, clock
    for array in (F32.itemsize, BF16.itemsize):
        assert stores[array] == sum(dtype.itemsize == array for dtype in written), "stores of the tail"
    pieces = given["VEC"]
    assert loads[16] == sum(pieces * dtype.itemsize // 16 for dtype in read)
    assert stores[16] == sum(pieces * dtype.itemsize // 16 for dtype in written)
    assert set(loads) | set(stores) <= {2, 4, 16}
    assert ".local" not in kernel.asm["ptx"]
    used = usage(kernel, tmp_path)
    print(f"\n{rule} {weight} {grad} master={master} {emas} x {ema}: {used}")
    assert used["REG"] <= MAX_REGISTERS
    assert used["STACK"] == used["LOCAL"] == 0


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize(("weight", "ema"), [(F32, F32), (BF16, BF16)])
def test_a_group_with_unaligned_tensors_has_both_paths_in_one_kernel(
    rule: str, weight: torch.dtype, ema: torch.dtype, tmp_path: Path
) -> None:
    step = runner(rule, weight, weight, False, ema, 2, {"sgd": 1, "adam": 2}[rule])
    kernel = step_kernel.warmup(grid=(1,), **arguments(step, weight, 2, ALIGNED=False))
    loads, stores = accesses(kernel.asm["ptx"])
    assert loads[16] > 0
    assert stores[16] > 0
    assert loads[weight.itemsize] > 2  # the tail's and the other path's
    assert ".local" not in kernel.asm["ptx"]
    used = usage(kernel, tmp_path)
    assert used["REG"] <= MAX_REGISTERS
    assert used["LOCAL"] == 0


def test_a_program_counts_itself_only_when_all_its_threads_have_read() -> None:
    """Otherwise the last program could raise a count that a slower warp of another has still to read."""
    kernel = step_kernel.warmup(grid=(1,), **arguments(runner("adam", F32, F32, False, F32, 0, 2), F32, 0))
    before, _, after = kernel.asm["ttgir"].partition("tt.atomic_rmw")
    assert after
    assert max(before.rfind(barrier) for barrier in ("gpu.barrier", "ttg.barrier")) > before.rfind("tt.store")


@pytest.mark.parametrize(("weight", "term"), [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16), (F16, F32)])
def test_every_access_of_the_tensor_ops_is_16_bytes_wide(
    weight: torch.dtype, term: torch.dtype, tmp_path: Path
) -> None:
    pieces = device.elements_per_piece(weight, term)
    common: dict[str, Any] = {"numel": 64, "VEC": pieces, "BLOCK": 256 * pieces, "grid": (1,), **device.COMPILER}
    w, terms = meta(64, dtype=weight), (meta(64, dtype=term), meta(64, dtype=term))
    both = [
        (reconstruct_kernel.warmup(w, w, terms, (0.5, 1.0), None, **common), [weight, term, term], [weight]),
        (ema_kernel.warmup(terms, w, (0.5, 0.5), (0.5, 0.5), 0.1, 1, **common), [weight, term, term], [term, term]),
    ]
    for kernel, read, written in both:
        for counted, dtypes in zip(accesses(kernel.asm["ptx"]), (read, written), strict=True):
            assert counted[16] == sum(pieces * dtype.itemsize // 16 for dtype in dtypes)
            assert counted.total() - counted[16] == len(dtypes)  # the tail
        assert usage(kernel, tmp_path)["REG"] <= MAX_REGISTERS


def test_no_scalar_causes_a_compilation() -> None:
    """Neither the values 0 and 1 nor multiples of 16, for which Triton otherwise compiles anew."""
    compiled = step_kernel.device_caches[H100.name][0]
    weight, grad, no_emas = meta(64), [meta(64)], NO_PAST
    for rule, make in (("sgd", SgdOptions), ("adam", AdamOptions)):
        states = tuple([meta(64)] for _ in range(2 if rule == "adam" else 1))
        step = TritonRunner(rule, Arrays([weight], states, counts=[meta()]), F32)

        def compile_with(
            lr: float, decay: float, t: int, delay: int, seed: int, step: TritonRunner = step, make: Any = make
        ) -> None:
            options = make(lr, weight_decay=decay)
            design = no_emas._replace(delay=delay, seed=seed, update_tap=lr, fill_ratio=decay, turn=decay)
            args = StepArguments(t=t, horizon=lr, horizon_before=decay)
            step_kernel.warmup(grid=(1,), **step.arguments(grad, [], options, design._replace(fill_tap=lr), args))

        compile_with(0.1, 0.01, 3, 5, 7)
        before = len(compiled)
        assert before > 0
        for number in (0, 1, 2, 16, 17, 4096, 2**31 - 1):
            for seed in (0, 1, 16, 2**31, 2**32 - 1):
                compile_with(float(number), number / 16, number, number, seed)
        compile_with(1, 0, 1, 1, 1)  # type: ignore[arg-type]
        assert len(compiled) == before


def test_the_sizes_of_a_group_and_its_tensors_cause_no_compilation() -> None:
    steps, averages = step_kernel.device_caches[H100.name][0], ema_kernel.device_caches[H100.name][0]
    for sizes in ([64], [1], [16, 0], [5] * 16):
        step = TritonRunner("sgd", Arrays([meta(size) for size in sizes], ([meta(size) for size in sizes],)), F32)
        grads = [meta(size) for size in sizes]
        step_kernel.warmup(grid=(1,), **step.arguments(grads, [], SgdOptions(0.1, 0.9), NO_PAST, StepArguments()))
        common: dict[str, Any] = {"VEC": 4, "BLOCK": 1024, "grid": (1,), **device.COMPILER}
        turn = float(len(sizes) - 1)
        ema_kernel.warmup((meta(64),), meta(64), (0.5,), (0.5,), turn, len(sizes) - 1, sizes[0], **common)
        if sizes == [64]:
            before = len(steps), len(averages)
    assert (len(steps), len(averages)) == before
