"""Random numbers that are drawn while a model is traced, and would then be the same for ever."""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def no_draws() -> Iterator[None]:
    """Refuses random numbers in here; a tracer records torch's without drawing them.

    Raises:
        ValueError: Python's, NumPy's or torch's generator has been used. It is put back.
    """
    before = _states()
    yield
    used = [name for name, state in _states().items() if state != before[name]]
    if used:
        random.setstate(before["Python's random"])
        np.random.set_state(pickle.loads(before["NumPy's random"]))
        torch.random.set_rng_state(torch.frombuffer(bytearray(before["torch"]), dtype=torch.uint8))
        raise ValueError(f"its forward draws random numbers of {used[0]}, which a trace would repeat")


def _states() -> dict[str, Any]:
    return {
        "Python's random": random.getstate(),
        "NumPy's random": pickle.dumps(np.random.get_state()),
        "torch": torch.random.get_rng_state().numpy().tobytes(),
    }
