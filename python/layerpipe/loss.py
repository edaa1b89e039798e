"""Weights of the loss: a module's or those that the caller names. The last stage trains them beside its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class LossWeights:
    """Parameters and buffers of a loss.

    Args:
        loss_fn: a function, or a module, whose parameters that require gradients are trained unless ``params`` says
            which are.
        params: the loss's trained parameters.
        stages: whose parameters and buffers a loss may refer to, too.

    Raises:
        TypeError: ``params`` are no parameters.
    """

    def __init__(self, loss_fn: Any, params: Iterable[nn.Parameter] | None, stages: Sequence[nn.Module]) -> None:
        of_stages = {t for stage in stages for t in (*stage.parameters(), *stage.buffers())}
        self._module = module = loss_fn if isinstance(loss_fn, nn.Module) else nn.Module()
        known = {param: name for name, param in module.named_parameters()}
        given = list(known) if params is None else list(params)
        for param in given:
            if not isinstance(param, nn.Parameter):
                raise TypeError(f"loss_params are nn.Parameters, such as loss.parameters(), got {type(param).__name__}")
        trained = [p for p in dict.fromkeys(given) if p.requires_grad and p not in of_stages]
        self.trained = {f"loss.{known.get(p, i)}": p for i, p in enumerate(trained)}
        self.buffers = {f"loss.{name}": b for name, b in module.named_buffers() if b not in of_stages}

    def move(self, device: torch.device | None) -> None:
        """Put the module where the last stage is; ``None`` leaves it where it is."""
        self._module.to(device)

    def train_with(self, optimizer: Any) -> None:
        """Let an optimizer of the last stage hold those that it does not hold yet, in a group with its defaults."""
        held = {p for group in optimizer.param_groups for p in group["params"]}
        missing = {name: p for name, p in self.trained.items() if p not in held}
        if missing:
            named = "param_names" in optimizer.param_groups[0]
            optimizer.add_param_group({"params": [*missing.items()] if named else [*missing.values()]})

    def state(self) -> dict[str, Tensor]:
        """Of a checkpoint: names and values, not copied."""
        return {name: t.detach() for name, t in (*self.trained.items(), *self.buffers.items())}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take the values of :meth:`state`."""
        with torch.no_grad():
            for name, value in self.state().items():
                value.copy_(state[name])
