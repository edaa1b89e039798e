"""Optimizers with torch's names and defaults that also know their past weights."""

from layerpipe_kernels.optim.adam import Adam, AdamW
from layerpipe_kernels.optim.base import PastOptimizer
from layerpipe_kernels.optim.lamb import Lamb
from layerpipe_kernels.optim.sgd import SGD
from layerpipe_kernels.optim.wrapper import PastWeights

__all__ = ["SGD", "Adam", "AdamW", "Lamb", "PastOptimizer", "PastWeights"]
