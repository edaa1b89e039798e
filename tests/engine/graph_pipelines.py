"""Pipelines whose stages can be captured as graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk


def optimizer(name: str) -> Any:
    def make(params: list[Tensor], **past: Any) -> Any:
        # A learning rate that is a tensor takes another way through torch's arithmetic: it is one for all executors.
        options: dict[str, Any] = {"backend": "reference", "capturable": True, **past}
        if name == "SGD":
            return lk.SGD(params, lr=torch.tensor(0.05), momentum=0.9, **options)
        return lk.AdamW(params, lr=torch.tensor(0.01), **options)

    return make


def pipeline(stages: list[nn.Module], executor: str, *, rule: str = "SGD", **options: Any) -> layerpipe.Pipeline:
    return layerpipe.Pipeline(
        stages, F.cross_entropy, optimizer(rule), executor=executor, check_finite=False, **options
    )
