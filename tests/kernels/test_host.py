"""The C++ and CUDA code without Python: under sanitizers on the host, and through nvcc's reports."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
ARCHITECTURES = ("80", "90", "100")
#: Kinds of state of every rule.
STATES = {"Sgd": 1, "Adam": 3, "Direction": 0, "AdamDirection": 2}
UNITS = [(rule, weight) for rule in ("Sgd", "Adam", "Direction") for weight in ("float", "bf16", "f16")]
UNITS.append(("AdamDirection", "float"))
NVCC = ["nvcc", "-std=c++17", "-O3", "-fmad=false"]


class Unit(NamedTuple):
    rule: str
    weight: str
    report: str  # of ptxas
    ptx: str


def compiled(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path_factory.mktemp("probe") / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    if compiler is None or subprocess.run([compiler, *flags, probe, "-o", probe.with_suffix("")]).returncode:
        pytest.skip("no C++ compiler with sanitizers")
    return [compiler, *flags]


@pytest.mark.timeout(900)
def test_a_gpu_threads_code_equals_the_cpus_bit_for_bit_under_sanitizers(sanitizers: list[str], tmp_path: Path) -> None:
    """Every rule and dtype, every size around a pack and a chunk, aligned and not; nothing outside its own memory."""
    sources = [ROOT / "tests/host/step_test.cpp", CSRC / "plan.cpp", CSRC / "cpu/launch.cpp", CSRC / "cpu/span.cpp"]
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-DLP_ISA=baseline", "-pthread"]
    compiled([*sanitizers, *flags, *map(str, sources), "-o", str(tmp_path / "step_test")])
    done = subprocess.run([tmp_path / "step_test"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 500, done.stdout


@pytest.mark.parametrize("kinds", ["address,undefined", "thread"])
def test_nobody_waits_for_late_threads_and_these_touch_nothing(
    kinds: str, sanitizers: list[str], tmp_path: Path
) -> None:
    compiler, program = sanitizers[0], tmp_path / "threads_test"
    build = subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O1",
            f"-fsanitize={kinds}",
            "-pthread",
            ROOT / "tests/host/threads_test.cpp",
            "-o",
            program,
        ],
        capture_output=True,
        text=True,
    )
    if build.returncode and "tsan" in build.stderr:
        pytest.skip("no thread sanitizer")
    assert build.returncode == 0, build.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module", params=UNITS, ids="-".join)
def unit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Unit:
    """Compiled once, for every architecture."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    rule, weight = request.param
    made = tmp_path_factory.mktemp(f"{rule}-{weight}")
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    define = [f"-DLP_RULE={rule}", f"-DLP_WEIGHT={weight}"]
    out = ["-Xptxas", "-v", "-fatbin", "-o", str(made / "step.fatbin"), "-keep", "-keep-dir", str(made)]
    report = compiled([*NVCC, *code, *define, *out, str(CSRC / "cuda/step.cu")])
    return Unit(rule, weight, report, (made / "step.compute_90.ptx").read_text())


@pytest.mark.timeout(900)
def test_kernels_spill_nothing_and_leave_room_for_two_blocks(unit: Unit) -> None:
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", unit.report)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", unit.report)]
    print(f"{unit.rule} {unit.weight}: {min(registers)} to {max(registers)} registers")
    assert len(registers) == kernels_of(unit) * len(ARCHITECTURES)
    assert not any(spills), unit.report
    assert max(registers) <= 128  # of 64 Ki in a multiprocessor, 256 threads in a block: two blocks at least


@pytest.mark.timeout(900)
def test_kernels_move_arrays_16_bytes_at_a_time(unit: Unit) -> None:
    """In the PTX: per kernel, a load and a store of 16 bytes for each array, and the tail's of one element each."""
    kernels = re.split(r"\.visible \.entry|\.entry ", unit.ptx)[1:]
    assert len(kernels) == kernels_of(unit)
    element = {"float": "32", "bf16": "16", "f16": "16"}[unit.weight]
    for kernel in kernels:
        streams = re.findall(r"(ld|st)\.global(?:\.cs)?\.(v\d\.)?[a-z](\d+)", kernel)
        wide = [(op, bits) for op, vector, bits in streams if vector == "v4."]
        assert all(vector in ("", "v4.") for _, vector, _ in streams), "an access of 8 bytes"
        assert all(bits == "32" for _, bits in wide)
        # Weights, gradients, states, last updates and past weights; float ones beside 16-bit weights are two accesses.
        moves = unit.rule != "AdamDirection"
        states, halves, emas = STATES[unit.rule] + moves, 2 if element == "16" else 1, averages_of(kernel)
        assert sum(op == "ld" for op, _ in wide) >= 1 + moves + states * halves + emas
        assert sum(op == "st" for op, _ in wide) >= 1 + moves + states * halves + emas


def kernels_of(unit: Unit) -> int:
    """Without averages, and for rules that move weights with 1 to 3 of two dtypes."""
    return 1 if unit.rule == "AdamDirection" else 7


def averages_of(kernel: str) -> int:
    """The number of averages, the only integer in a kernel's mangled name."""
    found = re.search(r"Li(\d)E", kernel.split("(")[0])
    assert found
    return int(found[1])
