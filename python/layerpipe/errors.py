"""Errors that a pipeline raises."""

from __future__ import annotations

from layerpipe_kernels.past import Blend, Past, Stash, parse


class StageError(RuntimeError):
    """Something raised inside a stage; the message names the stage, ``__cause__`` is the original exception:
    none where that was raised in another process, or where that process cannot be reached."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(f"{stage}: {message}")
        self.stage, self.message = stage, message

    def __reduce__(self) -> tuple[type[StageError], tuple[str, str]]:
        return type(self), (self.stage, self.message)


class DivergenceError(StageError):
    """A stage met NaN or infinity, in what crosses its boundaries or, when the pipe is empty, in its weights."""


class StageInterrupted(StageError):
    """Another process of the pipeline was interrupted, by Ctrl-C or a signal that its program treats so."""


class SpecializationError(RuntimeError):
    """A stage that :func:`layerpipe.split` made got inputs, or found its model changed, as it was not traced for."""


class CheckpointError(RuntimeError):
    """A file that is no checkpoint, or one of another pipeline."""


class UsageError(ValueError):
    """Raised where options of the command line do not exist or do not fit together."""


class DataError(RuntimeError):
    """A data set that cannot be had, or does not fit what is asked of it."""


def divergence_advice(past: str | Past, delay: int) -> str:
    """Returns what to try after a :class:`DivergenceError`, for a pipeline with these past weights and this largest
    delay in updates."""
    kind = parse(past)
    tries = [] if isinstance(kind, Blend | Stash) or not delay else ["past='blend'"]
    if isinstance(kind, Blend) and kind.order < 3 and delay:
        tries.append(f"past='blend:order={kind.order + 1}'")
    return "try " + ", ".join([*tries, "a lower learning rate, a longer warm-up, max_norm=1.0, or fewer stages"])
