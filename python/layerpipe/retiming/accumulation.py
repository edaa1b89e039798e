"""Gradient accumulation: a stage that makes one update in ``m`` minibatches, with the mean of their gradients.

With one update per minibatch, a backward that comes ``d`` minibatches after its forward finds its weights ``d``
updates old. With one update in ``m``, minibatch ``k`` (the first is 0) was sent forward after ``floor((k - d) / m)``
updates and comes back after ``floor(k / m)``::

    d = 2, m = 4     k           0  1  2  3 | 4  5  6  7 | 8  9 10 11
                     updates     0  0  0  0 | 1  1  1  1 | 2  2  2  2     before its backward
                     updates     0  0  0  0   0  0 | 1  1   1  1 | 2  2   before its forward
                     n           0  0  0  0   1  1  0  0   1  1  0  0

So ``n`` is ``d / m``, rounded down for some minibatches and up for others, and ``d / m`` in the mean.
"""

from __future__ import annotations


def updates_between(minibatch: int, lag: int, accumulate: int = 1, begun: int = 0) -> int:
    """Return the number of updates that a stage makes between a minibatch's forward and its backward.

    Args:
        minibatch: its number since the pipe was last empty, from 0.
        lag: minibatches whose backwards lie between the two, once the pipe is full: ``d``.
        accumulate: minibatches per update: ``m``.
        begun: gradients that were waiting for an update when the pipe was last empty.
    """
    k = begun + minibatch
    return k // accumulate - (k - min(minibatch, lag)) // accumulate


def most_updates_between(lag: int, accumulate: int = 1) -> int:
    """The most that :func:`updates_between` gives for any minibatch: ``d / m`` rounded up."""
    return -(-lag // accumulate)
