"""A job in which processes are killed ends with the weights of one in which nobody is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def job(path: Path, name: str, kills: int, *, seed: int = 0, processes: int = 2, replicas: int = 1) -> dict[str, Any]:
    """What :mod:`tests.distributed.restarted` wrote, run by torchrun."""
    weights = path / f"{name}.weights"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = ["--max-restarts", str(kills), str(ROOT / "tests/distributed/restarted.py")]
    options = [str(path / name), str(weights), str(kills), str(seed), str(replicas)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *script, *options],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}",
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = torch.load(weights)
    return result


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_killed_processes_cost_nothing_but_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    undisturbed = job(tmp_path, "whole", 0)
    killed = job(tmp_path, "killed", 1, seed=1)
    assert killed["starts"] == 2
    assert same(killed["state"], undisturbed["state"])
