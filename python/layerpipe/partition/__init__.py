"""A model into stages: traced, its layers' costs found or measured, and cut where the stages balance."""

from layerpipe.partition.partition import BALANCES, costs_by, cut_at, refuse_shared, share_threads, split

__all__ = ["BALANCES", "costs_by", "cut_at", "refuse_shared", "share_threads", "split"]
