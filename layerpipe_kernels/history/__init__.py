"""Five ways to have the weights of ``n`` updates ago, one file each; :mod:`layerpipe_kernels.past` has their options.

| kind | kept per parameter | estimate of the last ``n`` updates' sum |
| --- | --- | --- |
| ``stash`` | ``n`` copies | exact |
| ``latest`` | nothing | 0 |
| ``ema`` | one EMA of updates | ``n E`` |
| ``momentum`` | nothing beyond the momentum buffer | its geometric extrapolation |
| ``blend`` | one to three EMAs | the best linear mixture of them and the newest update |

For a delay of 1, ``blend`` keeps nothing where the optimizer can undo its last update.
"""

from layerpipe_kernels.history.base import Clock, History, Mixture, Settings, copy_into, fade
from layerpipe_kernels.history.blend import BlendHistory
from layerpipe_kernels.history.device import DeviceClock
from layerpipe_kernels.history.ema import EmaHistory
from layerpipe_kernels.history.latest import LatestHistory
from layerpipe_kernels.history.momentum import MomentumHistory
from layerpipe_kernels.history.norms import Norms
from layerpipe_kernels.history.stash import StashHistory
from layerpipe_kernels.history.undo import UndoHistory
from layerpipe_kernels.past import Blend

_MADE_BY: dict[str, type[History]] = {
    "stash": StashHistory,
    "latest": LatestHistory,
    "ema": EmaHistory,
    "momentum": MomentumHistory,
    "blend": BlendHistory,
}

__all__ = [
    "BlendHistory",
    "Clock",
    "DeviceClock",
    "EmaHistory",
    "History",
    "LatestHistory",
    "Mixture",
    "MomentumHistory",
    "Norms",
    "Settings",
    "StashHistory",
    "UndoHistory",
    "copy_into",
    "fade",
    "make",
]


def make(settings: Settings) -> History:
    """Returns the history that these settings describe.

    Raises:
        ValueError: settings that contradict each other.
    """
    past = settings.past
    undone = settings.undo is not None and settings.delay == 1 and isinstance(past, Blend) and past.decay is None
    if undone and not past.materialize:
        return UndoHistory(settings)
    return _MADE_BY[past.kind](settings)
