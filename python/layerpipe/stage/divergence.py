"""Looking for numbers that are none, where tensors cross a stage's boundaries and in its weights.

NaN is divergence wherever it is. An infinity is where it came with the loss or a gradient; activations may carry one on
purpose, as a mask of ``-inf`` does, and weights that had some from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from layerpipe.errors import DivergenceError
from layerpipe_kernels.native import all_finite


class Divergence:
    """The search of one stage.

    Args:
        stage: what messages call it.
        params: trained by it.
        advice: what to try.
    """

    def __init__(self, stage: str, params: Sequence[Tensor], advice: str) -> None:
        self._stage, self._params, self._advice = stage, params, advice
        self.weights_loaded()

    def weights_loaded(self) -> None:
        """The weights are as they are on purpose, infinities included."""
        self._infinite = {p for p in self._params if not all_finite(p.detach())}

    def check(
        self, tensors: Iterable[Tensor | None], what: str, minibatch: int, updates: int, infinities: bool = False
    ) -> None:
        """Look at tensors on the CPU: on an accelerator, reading the values would make the host wait for it.

        Args:
            tensors: what to look at.
            what: they are of a minibatch, for the message.
            minibatch: its number.
            updates: that the stage has made.
            infinities: whether they may hold some on purpose.

        Raises:
            DivergenceError: one holds NaN, or an infinity where ``infinities`` are none on purpose.
        """
        for tensor in tensors:
            if tensor is not None and tensor.is_cpu and not all_finite(tensor) and not (infinities and _number(tensor)):
                self._diverged(f"{what} of minibatch {minibatch}", updates)

    def check_weights(self, updates: int) -> None:
        """Find what the boundaries have not shown yet: the last update of a pipe that is empty.

        Raises:
            DivergenceError: a weight is not finite.
        """
        for param in self._params:
            value = param.detach()
            if not all_finite(value) and not (param in self._infinite and _number(value)):
                self._diverged("a weight", updates)

    def _diverged(self, what: str, updates: int) -> None:
        advice = f"; {self._advice}" if self._advice else ""
        raise DivergenceError(self._stage, f"{what} is not finite after {updates} updates{advice}")


def _number(tensor: Tensor) -> bool:
    return not bool(torch.isnan(tensor).any())
