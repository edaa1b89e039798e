"""What can go wrong in a pipeline, by name."""

from __future__ import annotations


class StageError(RuntimeError):
    """Something raised inside a stage; the message names the stage, ``__cause__`` is the original exception."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(f"{stage}: {message}")
        self.stage = stage


class DivergenceError(StageError):
    """A stage produced NaN or infinity; its weights are those before the bad update."""


class DataError(RuntimeError):
    """A data set that cannot be had, or does not fit what is asked of it."""
