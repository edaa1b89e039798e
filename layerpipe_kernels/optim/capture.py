"""A captured step is replayed by the device alone: what the host counts stands still."""

from __future__ import annotations

import torch


def refuse_capture(remedy: str = "give the optimizer capturable=True, so that the device counts them") -> None:
    """Refuse a step with a past whose clock the host keeps, on a stream that is being captured.

    Raises:
        RuntimeError: with the remedy.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a captured step would count its updates only once; {remedy}")
