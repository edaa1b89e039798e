"""Fused optimizer steps that know their past weights: drop-in optimizers, decay rules and the ops beneath them.

opt = layerpipe_kernels.SGD(model.parameters(), lr=0.1, momentum=0.9, delay=6, past="blend")
opt.step()
past = opt.past_weight(param)      # an estimate of the weights six updates ago, without having kept them
"""

from layerpipe_kernels import decay, history, ops, options, reference
from layerpipe_kernels.backend import available_backends, build_info
from layerpipe_kernels.optim import SGD, Adam, AdamW, Lamb, PastWeights

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Lamb",
    "PastWeights",
    "available_backends",
    "build_info",
    "decay",
    "history",
    "ops",
    "options",
    "reference",
]
