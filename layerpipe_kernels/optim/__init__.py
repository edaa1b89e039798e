"""Optimizers with torch's names and defaults that also know their past weights."""

from layerpipe_kernels.optim.adam import Adam, AdamW
from layerpipe_kernels.optim.base import PastOptimizer
from layerpipe_kernels.optim.lamb import Lamb
from layerpipe_kernels.optim.matrices import mark_embeddings_and_output
from layerpipe_kernels.optim.muon import Muon
from layerpipe_kernels.optim.sgd import SGD
from layerpipe_kernels.optim.soap import SOAP
from layerpipe_kernels.optim.wrapper import PastWeights

__all__ = [
    "SGD",
    "SOAP",
    "Adam",
    "AdamW",
    "Lamb",
    "Muon",
    "PastOptimizer",
    "PastWeights",
    "mark_embeddings_and_output",
]
