"""Train a network as an asynchronous pipeline: every stage runs a forward and a backward in every tick.

stages = layerpipe.split(model, stages=4, example_inputs=(x,))
pipe = layerpipe.Pipeline(
    stages, loss_fn,
    optimizer=lambda params, **past: layerpipe_kernels.SGD(params, lr=0.1, momentum=0.9, **past),
    past="blend",
)
for x, y in loader:
    loss = pipe.step(x, y)      # of the minibatch that left the pipe; None while it fills
pipe.drain()
"""

from layerpipe import delays
from layerpipe.deferred_init import DeferredInit, deferred_init
from layerpipe.errors import CheckpointError, DivergenceError, StageError, StageInterrupted
from layerpipe.measured import StageMemory
from layerpipe.partition import split
from layerpipe.pipeline import Pipeline
from layerpipe.sharded import state_dict_of

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DeferredInit",
    "DivergenceError",
    "Pipeline",
    "StageError",
    "StageInterrupted",
    "StageMemory",
    "deferred_init",
    "delays",
    "split",
    "state_dict_of",
]
