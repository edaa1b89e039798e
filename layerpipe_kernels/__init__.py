"""Fused optimizer steps that know their past weights: drop-in optimizers, decay rules and the ops beneath them.

opt = layerpipe_kernels.SGD(model.parameters(), lr=0.1, momentum=0.9, delay=6, past="blend")
opt.step()
past = opt.past_weight(param)      # an estimate of the weights six updates ago, without having kept them
"""

from layerpipe_kernels import decay, history, ops, options, past, reference
from layerpipe_kernels.backend import available_backends, build_info
from layerpipe_kernels.optim import SGD, SOAP, Adam, AdamW, Lamb, Muon, PastWeights, mark_embeddings_and_output
from layerpipe_kernels.past import EMA, Blend, Latest, Momentum, Past, Stash

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "SGD",
    "SOAP",
    "Adam",
    "AdamW",
    "Blend",
    "Lamb",
    "Latest",
    "Momentum",
    "Muon",
    "Past",
    "PastWeights",
    "Stash",
    "available_backends",
    "build_info",
    "decay",
    "history",
    "mark_embeddings_and_output",
    "ops",
    "options",
    "past",
    "reference",
]
