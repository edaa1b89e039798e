"""Simulates schedules before they are built: tasks on processors, in time.

>>> stages = [StageCost(forward=1, backward=1, gradient=1)] * 4
>>> report(run(gpipe(stages, minibatches=1, parts=8))).bubble      # (P - 1) / (M + P - 1)
0.2727...
"""

from layerpipe.theory.simulate.events import Event, Key, Link, Task, Timeline, Wait, in_order, run
from layerpipe.theory.simulate.layerpipe import Placement, layerpipe, place
from layerpipe.theory.simulate.report import Report, report, to_chrome
from layerpipe.theory.simulate.schedules import Builder, StageCost, gpipe, lockstep, one_f_one_b, sequential, together

#: Schedules of stages with a processor each; ``layerpipe`` places layers and takes other arguments.
BUILDERS: dict[str, Builder] = {
    "sequential": sequential,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "lockstep": lockstep,
}

__all__ = [
    "BUILDERS",
    "Builder",
    "Event",
    "Key",
    "Link",
    "Placement",
    "Report",
    "StageCost",
    "Task",
    "Timeline",
    "Wait",
    "gpipe",
    "in_order",
    "layerpipe",
    "lockstep",
    "one_f_one_b",
    "place",
    "report",
    "run",
    "sequential",
    "to_chrome",
    "together",
]
