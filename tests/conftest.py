from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator

import pytest

# Tensors are so small here that threads which spin until their next piece of work spend more than on the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from tests.distributed.processes import Processes
from tests.engine.pipelines import workers


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


@pytest.fixture
def one_core() -> None:
    """Tiny layers gain nothing from more, and lose much where the machine has other work."""
    torch.set_num_threads(1)


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    before = workers()
    yield
    deadline = time.monotonic() + 10
    while workers() > before and time.monotonic() < deadline:
        gc.collect()  # again and again: a worker still in its tick holds the pipeline until that ends
        time.sleep(0.01)
    assert workers() == before


@pytest.fixture(scope="session")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def three() -> Iterator[Processes]:
    processes = Processes(3)
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Processes]:
    processes = Processes(4)
    yield processes
    processes.close()
