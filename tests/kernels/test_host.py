"""The C++ and CUDA code without Python, under sanitizers on the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"


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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_gpu_threads_code_equals_the_cpus_bit_for_bit_under_sanitizers(sanitizers: list[str], tmp_path: Path) -> None:
    """Every rule and dtype, every size around a pack and a chunk, aligned and not; nothing outside its own memory."""
    sources = [ROOT / "tests/host/step_test.cpp", CSRC / "plan.cpp", CSRC / "cpu/launch.cpp", CSRC / "cpu/span.cpp"]
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-DLP_ISA=baseline", "-pthread"]
    compiled([*sanitizers, *flags, *map(str, sources), "-o", str(tmp_path / "step_test")])
    done = subprocess.run([tmp_path / "step_test"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 2000, done.stdout


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


def test_the_plan_of_a_gpu_compiles_without_nvcc() -> None:
    """So that a build without it finds what would break the other's."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    compiled([compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-DLP_CUDA", str(CSRC / "cuda/plan.cpp")])
