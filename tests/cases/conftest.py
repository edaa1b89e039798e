"""Processes for cases that need several."""

from tests.distributed.conftest import three, two

__all__ = ["three", "two"]
