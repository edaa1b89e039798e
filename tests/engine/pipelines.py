"""Pipelines for tests."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.models import chain

EXECUTORS = ["serial", "threads"]


def sgd(params: list[Tensor], **past: Any) -> lk.SGD:
    return lk.SGD(params, lr=0.05, momentum=0.9, **past)


def pipeline(stages: list[nn.Module] | None = None, **options: Any) -> layerpipe.Pipeline:
    return layerpipe.Pipeline(stages or chain(), F.cross_entropy, sgd, **options)


def workers() -> int:
    return sum(t.name.startswith("layerpipe ") for t in threading.enumerate())
