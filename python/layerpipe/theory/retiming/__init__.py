"""Derives delays: the training graph, the legal moves of its registers, and the pipeline that follows.

A register on an edge is a delay of one tick. The derivation is LayerPipe2's (arXiv 2512.08160):

1. sequential training has one register, in every layer's update loop;
2. registers at the network's input are pure latency, allowed: a feed-forward cutset;
3. registers from a weight gradient to its update are delayed LMS, the one step that changes the algorithm;
4. retiming (Leiserson and Saxe) moves registers until every stage boundary carries one in each direction;
5. where gradients accumulate, updates are made once in several minibatches, and delays are as many times smaller.

>>> print(derive(chain(4), [[0], [1], [2], [3]], "lockstep"))       # doctest: +SKIP
"""

from layerpipe.theory.retiming.clocking import CLOCKINGS, Clocking, clocking
from layerpipe.theory.retiming.derive import Derivation, Step, delays, derive
from layerpipe.theory.retiming.evaluate import run
from layerpipe.theory.retiming.graph import Node, chain, latency, registers, training_graph
from layerpipe.theory.retiming.operations import (
    RetimingError,
    accumulate_gradients,
    delay_gradients,
    insert_cutset,
    retime,
    retime_cutset,
    slow_down,
)
from layerpipe.theory.retiming.period import clock_period, minimum_period

__all__ = [
    "CLOCKINGS",
    "Clocking",
    "Derivation",
    "Node",
    "RetimingError",
    "Step",
    "accumulate_gradients",
    "chain",
    "clock_period",
    "clocking",
    "delay_gradients",
    "delays",
    "derive",
    "insert_cutset",
    "latency",
    "minimum_period",
    "registers",
    "retime",
    "retime_cutset",
    "run",
    "slow_down",
    "training_graph",
]
