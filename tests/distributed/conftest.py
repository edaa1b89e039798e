from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.distributed.hosts import hosts
from tests.distributed.processes import Processes


@pytest.fixture(scope="session")
def apart() -> Iterator[Processes]:
    """Three processes on two hosts: the first two on one, the last one on the other."""
    with contextlib.ExitStack() as stack:
        try:
            one, other = stack.enter_context(hosts())
        except NotImplementedError as error:
            pytest.skip(str(error))
        processes = Processes(3, [one, one, other])
        stack.callback(processes.close)
        yield processes
