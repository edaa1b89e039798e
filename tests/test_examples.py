"""The examples run as they are, and say what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(where: Path, script: str, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *options]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_optimizer(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    out = run(tmp_path, "optimizer.py")
    assert "bit for bit: True" in out
    found = re.search(r"mean-square error ([\d.]+) of", out)
    assert found is not None
    assert 0 < float(found[1]) < 0.02


@pytest.mark.slow
def test_pipeline_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    options = ("--epochs", "2", "--checkpoint", "run.pt")
    whole = run(tmp_path, "pipeline.py", *options).splitlines()
    assert whole[0].startswith("epoch 1: ")
    assert whole[1].startswith("epoch 2: ")
    assert whole[-1].endswith("[2, 0]")
    again = run(tmp_path, "pipeline.py", "--executor", "serial", "--epochs", "3", "--checkpoint", "run.pt").splitlines()
    assert [line.split(":")[0] for line in again[:-1]] == ["epoch 3"]


@pytest.mark.slow
def test_gpt(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    out = run(tmp_path, "gpt.py", "--steps", "5", "--write", "5", "--executor", "serial")
    assert "delays [2, 0]" in out
    found = re.search(r"loss on modules it has not seen: ([\d.]+) nats", out)
    assert found is not None
    assert 4 < float(found[1]) < 5.7  # log 256 is 5.55
    assert "def read(" in out
