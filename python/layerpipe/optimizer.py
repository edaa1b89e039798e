"""All stages' optimizers as one, for schedulers and loggers."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import torch

from layerpipe.stage.options import Options
from layerpipe_kernels.optim.checkpoint import CLOCK


class PipelineOptimizer(torch.optim.Optimizer):
    """What schedulers, loggers and checkpoints see: the parameter groups of every stage in one list.

    Options set here, such as a scheduler's learning rate, reach a stage with the next tick that is submitted; a tick
    that already runs keeps those it was submitted with. The stages step themselves: :meth:`step` refuses to.

    Args:
        optimizers: of the stages of this process that have parameters.
        synchronize: called before their states are read.
        before, after: :func:`options_of` the stages of other processes. Their groups are in the list, too, without
            parameters: a scheduler is the same in all processes, and so is its state.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        synchronize: Callable[[], None] = lambda: None,
        *,
        before: Sequence[dict[str, Any]] = (),
        after: Sequence[dict[str, Any]] = (),
    ) -> None:
        if not optimizers:
            raise ValueError("no stage has parameters to train")
        self._optimizers, self._synchronize = list(optimizers), synchronize
        own = [
            {key: _on_host(value) for key, value in group.items() if key not in CLOCK}
            for optimizer in self._optimizers
            for group in optimizer.param_groups
        ]
        self.own = range(len(before), len(before) + len(own))  # the groups of this process's stages
        groups = [*_without_params(before), *own, *_without_params(after)]
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if isinstance(group.get("lr"), torch.Tensor):
                    group["lr"] = group["lr"].clone()  # the common view's may change while a stage reads its own
        self._complete = False
        super().__init__(groups, dict(self._optimizers[0].defaults))
        self._complete = True
        self._values: list[tuple[Any, ...]] | None = None
        self._options: list[Options] = []

    def options_by_stage(self) -> list[Options]:
        """Every group's options, for the stages with parameters in their order: a copy, the same until they change."""
        self._opt_called = True  # what torch's schedulers look at before they warn that nobody stepped
        values = [tuple(group.values()) for group in self.param_groups]
        if values != self._values:
            groups = iter([self.param_groups[i] for i in self.own])
            self._options = [
                [{k: _frozen(v) for k, v in next(groups).items() if k not in _OWN} for _ in optimizer.param_groups]
                for optimizer in self._optimizers
            ]
            in_place = any(isinstance(v, torch.Tensor) for group in values for v in group)
            self._values = None if in_place else values  # a tensor may change and stay the same object
        return self._options

    @property  # type: ignore[override]
    def state(self) -> dict[Any, Any]:
        """The state of every stage's optimizer; a merged view, made on each access."""
        self._synchronize()
        merged: dict[Any, Any] = collections.defaultdict(dict)
        for optimizer in self._optimizers:
            merged.update(optimizer.state)
        return merged

    @state.setter
    def state(self, value: dict[Any, Any]) -> None:
        if value:
            raise AttributeError("the state belongs to the stages; use load_state_dict")

    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("the stages step themselves; call pipe.step(inputs, target)")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._complete:
            raise RuntimeError("a stage owns its parameters; make a new pipeline")
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: every stage clears its gradients before each backward."""

    def state_dict(self) -> dict[str, Any]:
        """One state_dict per stage with parameters, and all groups' options as they are now. Of a drained pipe."""
        self._synchronize()
        return {
            "stages": [optimizer.state_dict() for optimizer in self._optimizers],
            "kinds": [_kind(optimizer) for optimizer in self._optimizers],
            "options": [{k: v for k, v in g.items() if k not in _OWN} for g in self.param_groups],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, into a pipe of the same stages.

        Raises:
            ValueError: what :meth:`check` refuses.
        """
        self.check(state_dict)
        self._synchronize()
        self._values = None  # the stages' own options are about to change
        for optimizer, state in zip(self._optimizers, state_dict["stages"], strict=True):
            optimizer.load_state_dict(state)
        for group, values in zip(self.param_groups, state_dict["options"], strict=True):
            group.update({key: value for key, value in values.items() if key != "backend"})  # the machine's

    def check(self, state_dict: dict[str, Any]) -> None:
        """Refuse what :meth:`load_state_dict` would refuse, and load nothing.

        Raises:
            ValueError: another number of stages or groups, other optimizers, or other past weights.
        """
        stages, options = state_dict["stages"], state_dict["options"]
        if len(stages) != len(self._optimizers) or len(options) != len(self.param_groups):
            raise ValueError(
                f"the state is of {len(stages)} stages with {len(options)} groups, this pipeline has "
                f"{len(self._optimizers)} with {len(self.param_groups)}"
            )
        kinds = [_kind(optimizer) for optimizer in self._optimizers]
        if state_dict.get("kinds", kinds) != kinds:
            raise ValueError(f"the state is of {state_dict['kinds']}, this pipeline trains with {kinds}")
        for i in self.own:
            group, values = self.param_groups[i], options[i]
            for key in _PAST:
                if callable(group.get(key)) and key not in values:
                    continue  # a file holds no function
                if group.get(key) != values.get(key):
                    raise ValueError(
                        f"the state's parameter group {i} was trained with {key}={values.get(key)!r}, this pipeline "
                        f"has {key}={group.get(key)!r}; make the pipeline with the same stages, schedule and past"
                    )


def options_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """What other processes see of these stages' parameter groups: no parameters, and nothing that no message holds."""
    return [
        {k: _frozen(v) for k, v in group.items() if k not in _OWN and not callable(v)}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def _without_params(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"params": [], **options} for options in groups]


def joined(states: Sequence[dict[str, Any]], own: Sequence[range]) -> dict[str, Any]:
    """One state of :class:`PipelineOptimizer` from those of all processes, each of which has its ``own`` groups."""
    return {
        "stages": [stage for state in states for stage in state["stages"]],
        "kinds": [kind for state in states for kind in state["kinds"]],
        "options": [state["options"][i] for state, groups in zip(states, own, strict=True) for i in groups],
    }


def part(state: dict[str, Any], stages: range) -> dict[str, Any]:
    """What a process with these stages, counted among those with parameters, has of what :func:`joined` made."""
    own: dict[str, Any] = {key: state[key][stages.start : stages.stop] for key in ("stages", "kinds") if key in state}
    return {**own, "options": state["options"]}


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """An optimizer's name, and of which one a wrapper is."""
    name, inner = type(optimizer).__name__, getattr(optimizer, "optimizer", None)
    return f"{name} of {_kind(inner)}" if isinstance(inner, torch.optim.Optimizer) else name


def _on_host(value: Any) -> Any:
    """Reading an option must not wait for a device."""
    return value.item() if isinstance(value, torch.Tensor) and not value.is_cpu else value


def _frozen(value: Any) -> Any:
    """A learning rate may be a tensor, which a scheduler changes in place."""
    return value.item() if isinstance(value, torch.Tensor) else value


#: What a stage's history was made for.
_PAST = ("delay", "past", "order", "ema_decay")
#: What does not travel from the common view to a stage, whose own optimizer counts its updates.
_OWN = ("params", "param_names", *CLOCK)
