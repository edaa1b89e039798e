from __future__ import annotations

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


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in BACKENDS:
        pytest.skip(f"no {request.param} backend here")
    return str(request.param)
