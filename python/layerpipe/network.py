"""The stages of a pipeline as one network: its output, mode, parameters and state."""

from __future__ import annotations

import abc
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from layerpipe.current_weights import CurrentWeights
from layerpipe.executors import placement
from layerpipe.executors.channels import moved
from layerpipe.executors.ranks import Ranks
from layerpipe.executors.remote import Evaluation
from layerpipe.inputs import call, packed, results
from layerpipe.partition import refuse_shared
from layerpipe.partition.split_stage import is_split, label, uncompiled

if TYPE_CHECKING:
    from typing_extensions import Self


class Network(abc.ABC):
    """A chain of stages with the methods of a module.

    Args:
        stages: modules, from input to output.
        devices: one per stage, which is moved there; ``None`` leaves them where they are.
        ranks: which process holds which stages. The others' modules are let go of. Every process calls what runs the
            network, or reads or writes its state.

    Raises:
        ValueError: a parameter is in two stages, or the devices are not one per stage.
    """

    weights: CurrentWeights

    def __init__(self, stages: Sequence[nn.Module], devices: Sequence[Any] | None, ranks: Ranks) -> None:
        refuse_shared(stages)
        self.ranks = ranks
        own = slice(ranks.own.start, ranks.own.stop)
        self.names = [label(m) for m in stages]  # what each stage holds, for people
        self.modules = list(stages[own])
        self._devices = placement.place(stages, devices, ranks.own)
        self._several = len(set(self._devices)) > 1
        split = all(is_split(uncompiled(stage)) for stage in stages)
        self._named = [uncompiled(stage) for stage in self.modules]
        self._prefixes = ["" if split else str(i) for i in ranks.own]
        self._evaluation = Evaluation(ranks, self.names, self._devices[ranks.own.start])

    @abc.abstractmethod
    def _synchronize(self) -> None:
        """Return when no stage is at work any more."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output with its current weights; disturbs no minibatch in the pipe. As with any module, call
        :meth:`eval` first, or BatchNorm's running statistics move.

        Of several processes, the first one's inputs count; each gets the output, without a graph."""
        self._synchronize()
        values = self._evaluation.inputs(packed(args, kwargs))
        with self.weights.during():
            for module, stage in zip(self.modules, self.ranks.own, strict=True):
                values = results(call(module, moved(values, self._devices[stage]) if self._several else values))
        values = self._evaluation.output(values)
        return values if len(values) > 1 else values[0]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a pipeline cannot be copied or pickled, with its workers and minibatches in flight; pipe.checkpoint(path) "
            "writes all that training goes on from, copy.deepcopy(pipe.modules) copies the layers"
        )

    def train(self, mode: bool = True) -> Self:
        """Set the layers' mode. Where an optimizer keeps other weights in the parameters while it trains than those to
        evaluate, such as predicted ones, :meth:`eval` brings the latter there until this or the next minibatch."""
        self._synchronize()
        for module in self.modules:
            module.train(mode)
        if mode:
            self.weights.hide()
        else:
            self.weights.show()
        return self

    def eval(self) -> Self:
        return self.train(False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the stages in this process."""
        for module in self.modules:
            yield from module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, module in zip(self._prefixes, self._named, strict=True):
            yield from module.named_parameters(prefix=prefix)

    def state_dict(self) -> dict[str, Any]:
        """Weights and buffers under the model's own names where :func:`layerpipe.split` made the stages, and under
        those of ``nn.Sequential(*stages)`` where they were given by hand. References, as in torch; copies of other
        processes' stages, and where weights are predicted and minibatches in the pipe."""
        self._synchronize()
        return {name: value for state in self.ranks.gather(self.own_state()) for name, value in state.items()}

    def own_state(self) -> dict[str, Any]:
        """:meth:`state_dict` of this process's stages."""
        if self.weights.predicted:
            with self.weights.during():
                return copy.deepcopy(self.own_state())
        state: dict[str, Any] = {}
        for prefix, module in zip(self._prefixes, self._named, strict=True):
            state.update(module.state_dict(prefix=f"{prefix}." if prefix else ""))
        return state

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Load weights and buffers.

        Raises:
            RuntimeError: names or shapes do not fit.
        """
        self._synchronize()
        own = {name for names in self.ranks.gather(list(self.own_state())) for name in names}
        missing, unexpected = sorted(own - state.keys()), sorted(state.keys() - own)
        if strict and (missing or unexpected):
            raise RuntimeError(f"state_dict does not fit: missing {missing}, unexpected {unexpected}")
        for prefix, module in zip(self._prefixes, self._named, strict=True):
            cut = len(prefix) + 1 if prefix else 0
            mine = {k[cut:]: v for k, v in state.items() if not prefix or k.startswith(f"{prefix}.")}
            known = module.state_dict().keys()
            module.load_state_dict({k: v for k, v in mine.items() if k in known}, strict=False)
