"""Traces of real ticks: spans of every stage's work, read from the host's or a device's clock."""

from layerpipe.tracing.trace import StageTime, Trace

__all__ = ["StageTime", "Trace"]
