"""Scripts that were started with something else in one of their processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.models import chain
from tests.engine.pipelines import sgd


def disagrees(rank: int, what: str) -> str:
    """A script that was started in its second process with something else."""
    other = rank == 1
    seed, dtype = 0, torch.float32
    options: dict[str, Any] = {}
    stages = chain(4)
    lr, momentum, kind = 0.05, 0.9, sgd
    if what == "lr":
        lr = 0.1 if other else lr
    elif what == "momentum":
        momentum = 0.5 if other else momentum
    elif what == "class":
        kind = (lambda params, **past: lk.AdamW(params, **past)) if other else kind
    elif what == "seed":
        seed = 7 if other else seed
    elif what == "dtype":
        dtype = torch.float64 if other else dtype
    elif what == "weights":
        stages = chain(4, seed=int(other))
    elif what == "buffers" and other:
        stages[2][1].running_mean.add_(1)  # type: ignore[index,union-attr,operator]
    elif what == "stages":
        stages = chain(5 if other else 4)
    elif what in ("max_norm", "schedule", "past", "split_backward", "check_finite"):
        values: dict[str, tuple[Any, Any]] = {
            "max_norm": (None, 1.0), "schedule": ("lockstep", "1f1b"), "past": ("blend", lk.Blend(order=1)),
            "split_backward": (False, True), "check_finite": (True, False),
        }  # fmt: skip
        options[what] = values[what][other]

    def optimizer(params: list[Tensor], **past: Any) -> Any:
        if what == "nothing, and every stage has a rate of its own":
            return lk.SGD(params, lr=0.05 / (1 + past["delay"]), momentum=0.9, **past)
        if what == "nothing, and only own stages have a rate":
            return lk.SGD(params, lr=rates[params[0]], momentum=0.9, **past)
        return kind(params, **past) if what == "class" else lk.SGD(params, lr=lr, momentum=momentum, **past)

    own = range(2 * rank, 2 * rank + 2)
    rates = {next(stages[i].parameters()): 0.01 * (i + 1) for i in own}
    torch.manual_seed(seed)
    stages = [stage.to(dtype) for stage in stages]
    try:
        layerpipe.Pipeline(stages, F.cross_entropy, optimizer, executor="distributed", **options).close()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "made"
