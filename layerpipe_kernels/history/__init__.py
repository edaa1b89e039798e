"""Five ways to have the weights of ``n`` updates ago, one file each.

| kind | kept per parameter | estimate of the last ``n`` updates' sum |
| --- | --- | --- |
| ``stash`` | ``n`` copies | exact |
| ``latest`` | nothing | 0 |
| ``ema`` | one EMA of updates | ``n E`` |
| ``momentum`` | nothing beyond the momentum buffer | its geometric extrapolation |
| ``blend`` | one to three EMAs | the best linear mixture of them and the newest update |
"""

from layerpipe_kernels.history.base import Clock, History, Mixture, Settings, copy_into, fade
from layerpipe_kernels.history.blend import Blend
from layerpipe_kernels.history.device import DeviceClock
from layerpipe_kernels.history.ema import Ema
from layerpipe_kernels.history.latest import Latest
from layerpipe_kernels.history.momentum import Momentum
from layerpipe_kernels.history.norms import Norms
from layerpipe_kernels.history.stash import Stash

KINDS: dict[str, type[History]] = {kind.kind: kind for kind in (Stash, Latest, Ema, Momentum, Blend)}

__all__ = [
    "KINDS",
    "Blend",
    "Clock",
    "DeviceClock",
    "Ema",
    "History",
    "Latest",
    "Mixture",
    "Momentum",
    "Norms",
    "Settings",
    "Stash",
    "copy_into",
    "fade",
    "make",
]


def make(kind: str, settings: Settings) -> History:
    """The history of this kind.

    Raises:
        ValueError: an unknown kind, or settings it cannot work with.
    """
    if kind not in KINDS:
        raise ValueError(f"past={kind!r} is unknown; there are: {', '.join(KINDS)}")
    return KINDS[kind](settings)
