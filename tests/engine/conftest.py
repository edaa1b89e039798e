from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch

from tests.engine.pipelines import workers


@pytest.fixture(autouse=True)
def _one_core() -> None:
    """Tiny layers gain nothing from more, and lose much where the machine has other work."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Any:
    before = workers()
    yield
    deadline = time.monotonic() + 10
    while workers() > before and time.monotonic() < deadline:
        gc.collect()  # again and again: a worker still in its tick holds the pipeline until that ends
        time.sleep(0.01)
    assert workers() == before
