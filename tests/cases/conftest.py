"""Processes for cases that need several, and what all tests of pipelines begin with."""

from tests.distributed.conftest import three, two
from tests.engine.conftest import _no_thread_left, _one_core

__all__ = ["_no_thread_left", "_one_core", "three", "two"]
