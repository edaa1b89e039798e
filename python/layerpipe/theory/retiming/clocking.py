"""Registers that each schedule needs."""

from __future__ import annotations

from typing import NamedTuple


class Clocking(NamedTuple):
    """The registers that a schedule needs."""

    slow: int  # ticks per minibatch: how many of a stage's tasks share its processor, one after the other
    boundary: int  # registers where one stage hands over to the next, in each direction
    turn: int  # registers between the loss and the last stage's backward


CLOCKINGS = {
    "sequential": Clocking(slow=1, boundary=0, turn=0),
    "lockstep": Clocking(slow=1, boundary=1, turn=0),  # forward and backward in one tick
    "1f1b": Clocking(slow=2, boundary=1, turn=1),  # forward and backward in turns
}
#: Why other schedules have no derivation.
_UNDERIVED = {
    "gpipe": "it puts no register anywhere: all parts of a minibatch meet the same weights, which are updated once "
    "after them, so its delays are those of 'sequential', 0",
    "layerpipe": "it places the tasks of layers on processors freely and has no stages to retime; the simulator counts "
    "its staleness",
}


def clocking(schedule: str) -> Clocking:
    """Return what this schedule needs.

    Raises:
        ValueError: it is unknown, or asks for nothing that retiming could give; the message says why.
    """
    if schedule in _UNDERIVED:
        raise ValueError(f"schedule={schedule!r} is not derived by retiming: {_UNDERIVED[schedule]}")
    if schedule not in CLOCKINGS:
        raise ValueError(f"schedule={schedule!r} is unknown; there are: {', '.join(CLOCKINGS)}")
    return CLOCKINGS[schedule]
