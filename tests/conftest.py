from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# Tensors are so small here that threads which spin until their next piece of work spend more than on the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from layerpipe_kernels import available_backends


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> Iterator[None]:
    """Shells make what they run in the background ignore Ctrl-C, and its children with it; tests of Ctrl-C need it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers and thread count for every test, whatever ran before."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


needs_cpp = pytest.mark.skipif("cpp" not in available_backends(), reason="built without a compiler")
#: The backends of the CPU, for tests of each.
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
