"""The stages of a pipeline as one network: its output, mode, parameters and state."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from layerpipe import placement
from layerpipe.channels import moved
from layerpipe.partition import refuse_shared
from layerpipe.split_stage import is_split, label, uncompiled

if TYPE_CHECKING:
    from typing_extensions import Self


class Network(abc.ABC):
    """A chain of stages with the methods of a module.

    Args:
        stages: modules, from input to output.
        devices: one per stage, which is moved there; ``None`` leaves them where they are.

    Raises:
        ValueError: a parameter is in two stages, or the devices are not one per stage.
    """

    def __init__(self, stages: Sequence[nn.Module], devices: Sequence[Any] | None) -> None:
        refuse_shared(stages)
        self.modules = list(stages)
        self._devices = placement.place(stages, devices)
        self._several = len(set(self._devices)) > 1
        self._named = [uncompiled(stage) for stage in stages]
        split = all(map(is_split, self._named))
        self._prefixes = ["" if split else str(i) for i in range(len(stages))]

    @abc.abstractmethod
    def _synchronize(self) -> None:
        """Return when no stage is at work any more."""

    def __call__(self, *inputs: Any) -> Any:
        """The network's output with its current weights; disturbs no minibatch in the pipe. As with any module, call
        :meth:`eval` first, or BatchNorm's running statistics move."""
        self._synchronize()
        values = inputs
        for module, device in zip(self.modules, self._devices, strict=True):
            result = module(*(moved(values, device) if self._several else values))
            values = result if isinstance(result, tuple) else (result,)
        return values if len(values) > 1 else values[0]

    def train(self, mode: bool = True) -> Self:
        self._synchronize()
        for module in self.modules:
            module.train(mode)
        return self

    def eval(self) -> Self:
        return self.train(False)

    @property
    def names(self) -> list[str]:
        """What each stage holds, for people."""
        return [label(m) for m in self.modules]

    def parameters(self) -> Iterator[nn.Parameter]:
        for module in self.modules:
            yield from module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, module in zip(self._prefixes, self._named, strict=True):
            yield from module.named_parameters(prefix=prefix)

    def state_dict(self) -> dict[str, Any]:
        """Weights and buffers under the model's own names where :func:`layerpipe.split` made the stages, and under
        those of ``nn.Sequential(*stages)`` where they were given by hand. References, as in torch."""
        self._synchronize()
        state: dict[str, Any] = {}
        for prefix, module in zip(self._prefixes, self._named, strict=True):
            state.update(module.state_dict(prefix=f"{prefix}." if prefix else ""))
        return state

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Load weights and buffers.

        Raises:
            RuntimeError: names or shapes do not fit.
        """
        own = self.state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if strict and (missing or unexpected):
            raise RuntimeError(f"state_dict does not fit: missing {missing}, unexpected {unexpected}")
        for prefix, module in zip(self._prefixes, self._named, strict=True):
            cut = len(prefix) + 1 if prefix else 0
            mine = {k[cut:]: v for k, v in state.items() if not prefix or k.startswith(f"{prefix}.")}
            known = module.state_dict().keys()
            module.load_state_dict({k: v for k, v in mine.items() if k in known}, strict=False)
