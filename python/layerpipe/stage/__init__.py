"""One stage: its forward, its backward on past weights, its update."""

from layerpipe.stage.stage import Stage, Tensors

__all__ = ["Stage", "Tensors"]
