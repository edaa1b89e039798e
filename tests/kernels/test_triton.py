"""The Triton backend where there is no GPU: its kernels in Triton's interpreter, and what it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from layerpipe_kernels.plan import Arrays

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("everything is interpreted already: run triton_*_cases.py", allow_module_level=True)


from layerpipe_kernels.triton import TritonRunner, ema_update_, reconstruct

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_kernels_agree_with_the_reference_in_the_interpreter() -> None:
    """``triton_*_cases.py``, in a process of their own: the interpreter is chosen when the kernels are defined."""
    cases = [f"tests/kernels/triton_{of}_cases.py" for of in ("step", "tensor")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed.group(1)) > 200, done.stdout[-2_000:]


def test_tensors_on_the_cpu_are_refused() -> None:
    x = torch.zeros(8)
    for use in (
        lambda: TritonRunner("sgd", Arrays([x]), torch.float32),
        lambda: ema_update_([x], torch.ones(8), [0.5], 0),
        lambda: reconstruct(x, [], [], torch.zeros(8), 8),
    ):
        with pytest.raises(ValueError, match=r"runs on GPUs.*TRITON_INTERPRET"):
            use()
