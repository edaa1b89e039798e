"""Routine steps and past weights on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import layerpipe_kernels as lk
from tests.kernels.routines import KINDS, Optimizer, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("cuda" not in lk.available_backends(), reason="built without the CUDA kernels"),
]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[f"{k.__name__}-{i}" for i, (k, _) in enumerate(KINDS)])
def test_a_routine_changes_nothing(kind: Optimizer, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check(kind, options, monkeypatch, "cuda")
