"""The CUDA kernels as machine code, without a GPU: when memory is read, how it is written, and what that takes."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kernels import sass
from tests.kernels.sass import Instruction

CUDA = Path(__file__).resolve().parents[2] / "csrc/cuda"
#: Beside each rule, the numbers of states that it may keep.
RULES = {"Sgd": (0, 1), "Adam": (2, 3), "Direction": (0,), "AdamDirection": (2,)}
UNITS = [("step.cu", rule, weight) for rule in ("Sgd", "Adam", "Direction") for weight in ("float", "bf16", "f16")]
UNITS += [("step.cu", "AdamDirection", "float"), ("tensor.cu", "", "")]
REGISTERS, THREADS = 64 * 1024, 256  # of a multiprocessor, of a block
PACK = 4  # elements of each array that a thread reads and writes at a time


class Kernel(NamedTuple):
    rule: str  # or "Reconstruct", "Average"
    weight: int  # bytes of an element; likewise the averages'
    average: int
    states: int
    emas: int  # or terms
    code: list[Instruction]
    registers: int
    spilled: int
    blocks: int  # that its launch bounds promise a multiprocessor


def named(name: str, code: list[Instruction], used: dict[str, int], blocks: int) -> Kernel:
    """A kernel by its mangled name: ``StepWalk<Rule, W, E, states, emas>`` and its like."""
    found = re.search(r"(Step|Reconstruct|Average)WalkI(.*?)E?Li(\d)E(?:Li(\d)E)?", name)
    assert found, name
    rest = found[2]
    types = re.findall(r"4bf16|3f16|f(?![1l])|S\d_", rest.split("IfE")[-1])
    sizes = [4 if kind == "f" else 2 for kind in types]
    rule = next((r for r in sorted(RULES, key=len, reverse=True) if f"{len(r)}{r}" in rest), found[1])
    numbers = [int(n) for n in found.groups()[2:] if n is not None]
    states, emas = numbers if len(numbers) == 2 else (0, numbers[0])
    spilled = used["STACK"] + used["LOCAL"]
    return Kernel(rule, sizes[0], sizes[-1], states, emas, code, used["REG"], spilled, blocks)


@pytest.fixture(scope="module", params=UNITS, ids=lambda unit: "-".join(filter(None, unit)))
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    tool = sass.cuobjdump()
    if shutil.which("nvcc") is None or tool is None:
        pytest.skip("no nvcc, or no cuobjdump")
    source, rule, weight = request.param
    made = tmp_path_factory.mktemp("cuda")
    define = [f"-DLP_RULE={rule}", f"-DLP_WEIGHT={weight}"] if rule else []
    options = ["-std=c++17", "-O3", "-fmad=false", "-arch=sm_90", *define, "-keep", "-keep-dir", str(made)]
    done = subprocess.run(
        ["nvcc", *options, "-cubin", "-o", made / "it.cubin", CUDA / source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ptx = next(made.glob("*.ptx")).read_text()
    blocks = dict(re.findall(r"\.entry (\w+)\([^{]*?\.minnctapersm (\d+)", ptx))
    used = sass.resources(made / "it.cubin", tool)
    found = sass.kernels(made / "it.cubin", tool)
    assert found.keys() == used.keys() == blocks.keys()
    return [named(name, code, used[name], int(blocks[name])) for name, code in found.items()]


def arrays(kernel: Kernel) -> tuple[list[int], list[int]]:
    """Bytes per element of the arrays that a kernel may read, and of those that it may write."""
    w, e, narrow = kernel.weight, kernel.average, kernel.weight == 2
    if kernel.rule == "Reconstruct":  # terms of either type, and a master instead of the weight
        return [w, *[4] * narrow, *[4, 2] * kernel.emas], [w]
    if kernel.rule == "Average":
        return [w, *[4, 2] * kernel.emas], [4, 2] * kernel.emas
    kept = [4] * kernel.states
    if kernel.rule == "AdamDirection":
        return [w, *kept], [w, *kept]
    kept += [4, *[e] * kernel.emas, *[4] * narrow]  # the last update, averages, and the master
    return [w, w, *[4] * narrow, *kept], [w, w, *kept]  # gradients of either type, and past weights


@pytest.mark.timeout(600)
def test_every_kernel_is_there(kernels: list[Kernel], request: pytest.FixtureRequest) -> None:
    _, rule, _ = request.node.callspec.params["kernels"]
    expected = 3 * 5 + 3 * 3
    if rule:
        expected = len(RULES[rule]) * (1 if rule == "AdamDirection" else 7)
    assert len(kernels) == expected


def test_all_reads_of_a_pack_are_under_way_before_the_first_is_used(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert not sass.late_loads(kernel.code), kernel[:5]


def test_a_thread_accesses_every_array_once_per_pack(kernels: list[Kernel]) -> None:
    """So the threads of a warp together leave no gaps: the pack of the next thread lies where that of one ends."""
    for kernel in kernels:
        reads, writes = arrays(kernel)
        loads = Counter(i.width for i in kernel.code if i.loads_array)
        stores = Counter(i.width for i in kernel.code if i.stores)
        counted = kernel.rule not in ("Reconstruct", "Average")
        stores -= Counter({4: 1, 8: 1}) if counted else Counter()  # horizon and clock
        # The second half are the elements behind the last pack, one by one.
        assert loads == Counter([PACK * size for size in reads] + reads), kernel[:5]
        assert stores == Counter([PACK * size for size in writes] + writes), kernel[:5]


def test_nothing_is_spilled_and_the_promised_blocks_fit(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.spilled == 0, kernel[:5]
        allocated = -(-kernel.registers // 8) * 8
        assert allocated * THREADS * kernel.blocks <= REGISTERS, kernel[:5]
        declared = 3 if kernel.rule in ("Reconstruct", "Average") else 4 if 2 + kernel.states + kernel.emas <= 4 else 2
        assert kernel.blocks == declared, kernel[:5]


def test_a_load_behind_a_use_is_found() -> None:
    def code(*lines: tuple[str, str]) -> list[Instruction]:
        return [Instruction(16 * i, None, *line) for i, line in enumerate(lines)]

    first = ("LDG.E.EF.128", "R4, desc[UR4][R2.64]")
    second = ("LDG.E.EF.64", "R8, desc[UR4][R10.64]")
    use, free = ("FADD", "R20, R7, R21"), ("FADD", "R20, R22, R21")
    assert sass.late_loads(code(first, use, second)) == code(first, use, second)[2:]
    assert not sass.late_loads(code(first, free, second, use))
    # On the path that jumps over the use, and on the other.
    around = code(first, ("BRA", "P0, 0x30"), use, second)
    assert sass.late_loads(around) == around[3:]
    # A loop's next round waits for nothing of the last.
    assert not sass.late_loads(code(first, second, use, ("BRA", "0x0")))
