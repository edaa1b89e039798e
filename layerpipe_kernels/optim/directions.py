"""Adam's directions for a list of tensors, by the kernels' rule for them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerpipe_kernels import backend
from layerpipe_kernels.options import AdamOptions
from layerpipe_kernels.plan import Arrays, StepPlan

State = dict[str, Any]


class AdamArrays(NamedTuple):
    """Adam's state of a list of parameters: ``(*)`` each, and ``()`` for the counts; updated in place."""

    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    counts: Sequence[Tensor]  # float32, steps made so far

    def all(self) -> list[Tensor]:
        return [tensor for tensors in self for tensor in tensors]


class AdamDirections:
    """Computes ``d = scale ((1 - b) mhat + b g) / (sqrt(qhat) + eps)`` written into ``outputs``.

    Args:
        outputs: ``(*)`` each, in float32 or float64.
        arrays: theirs.
        names: of the parameters, for messages.
        kind: of the backend.
    """

    def __init__(self, outputs: Sequence[Tensor], arrays: AdamArrays, names: Sequence[str], kind: str) -> None:
        self._outputs, self._arrays, self._kind = list(outputs), arrays.all(), kind
        plan_arrays = Arrays(outputs, (arrays.exp_avgs, arrays.exp_avg_sqs), counts=arrays.counts)
        self._plan = StepPlan("adam_direction", plan_arrays, names=names, backend=backend.choose(outputs[0], kind))

    def fits(self, outputs: Sequence[Tensor], arrays: AdamArrays, kind: str) -> bool:
        """Returns whether it was made of these tensors."""
        made, now = (*self._outputs, *self._arrays), (*outputs, *arrays.all())
        return kind == self._kind and len(made) == len(now) and all(map(operator.is_, made, now))

    @torch.no_grad()
    def write(self, grads: Sequence[Tensor], options: AdamOptions) -> None:
        """Write the directions; ``options.lr`` is ``scale``, ``options.newest_share`` is ``b``."""
        self._plan.step(self._plan.check_grads(grads), options)
