from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import layerpipe_kernels as lk

BACKENDS = [b for b in ("cuda", "triton") if b in lk.available_backends()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_test_runs_on_a_broken_device() -> Iterator[None]:
    """An illegal access and a failed capture stay with the process: end it here, and let xdist start another."""
    yield
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.rand(1, device="cuda")
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)
        pytest.exit(f"the device, or torch's state of captures, is broken: {error}", 3)


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in BACKENDS:
        pytest.skip(f"no {request.param} backend here")
    return str(request.param)
