"""All stages' optimizers as one, for schedulers and loggers."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from layerpipe.executors.ranks import Ranks
from layerpipe.stage import Stage
from layerpipe.stage.options import OWN, Options, StageOptions, frozen_options, holds_what_changes, on_host, same
from layerpipe_kernels.optim.checkpoint import GROUP_STATE
from layerpipe_kernels.past import Past


class PipelineOptimizer(torch.optim.Optimizer):
    """The optimizer that schedulers, loggers and checkpoints see: the parameter groups of every stage in one list.

    Options set here, such as a scheduler's learning rate, reach a stage with the next tick that is submitted; a tick
    that already runs keeps those it was submitted with. What an optimizer changes in its groups itself, such as a step
    count, stays as it is there and is shown here when the pipe is drained and whenever a state is made; what is set
    here meanwhile takes its place. The stages step themselves: :meth:`step` refuses to.

    Args:
        stages: options of the stages of this process that have parameters.
        synchronize: called before their states are read.
        before, after: :func:`options_of` the stages of other processes. Their groups are in the list, too, without
            parameters: a scheduler is the same in all processes, and so is its state. What their optimizers change
            themselves is not shown.
        replayed: whether the stages' steps are replayed from graphs, in which no hook is called.
    """

    def __init__(
        self,
        stages: Sequence[StageOptions],
        synchronize: Callable[[], None] = lambda: None,
        *,
        before: Sequence[dict[str, Any]] = (),
        after: Sequence[dict[str, Any]] = (),
        replayed: bool = False,
    ) -> None:
        if not stages:
            raise ValueError("no stage has parameters to train")
        self._stages, self._synchronize, self._replayed = list(stages), synchronize, replayed
        self._optimizers = [stage.optimizer for stage in stages]
        own = [
            {
                key: value if key in OWN else on_host(key, value)
                for key, value in group.items()
                if key not in GROUP_STATE
            }
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
        self._made_for = [{key: self.param_groups[i].get(key) for key in _PAST} for i in self.own]

    def options_by_stage(self) -> list[Options]:
        """Every group's options, for the stages with parameters in their order: a copy, the same until they change.

        Raises:
            ValueError: the delay of a group has been changed, or how it has its past weights.
        """
        self._opt_called = True  # what torch's schedulers look at before they warn that nobody stepped
        values = [tuple(group.values()) for group in self.param_groups]
        if self._values is None or not _all_same(values, self._values):
            for i, made_for in zip(self.own, self._made_for, strict=True):
                self._check_past(i, made_for)
            self._options = [[frozen_options(view) for view in views] for views in self._views()]
            self._values = None if any(map(holds_what_changes, self.param_groups)) else values
        return self._options

    def _check_past(self, i: int, made_for: dict[str, Any]) -> None:
        group = self.param_groups[i]
        for key, value in made_for.items():
            now = group.get(key)
            if now is not value and not same(now, value):
                raise ValueError(
                    f"parameter group {i} was made with {key}={value!r}, which stages in training cannot change to "
                    f"{now!r}; make a new pipeline"
                )

    def refresh(self) -> None:
        """Show what the stages' optimizers have changed in their groups. No stage may be at work."""
        for stage, views in zip(self._stages, self._views(), strict=True):
            stage.show(views)

    def _views(self) -> Iterator[list[dict[str, Any]]]:
        """Of each stage of this process, its groups in the common list."""
        groups = iter([self.param_groups[i] for i in self.own])
        for optimizer in self._optimizers:
            yield [next(groups) for _ in optimizer.param_groups]

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

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a pipeline's optimizer cannot be copied or pickled; pipe.optimizer.state_dict() can")

    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("the stages step themselves; call pipe.step(inputs, target)")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._complete:
            raise RuntimeError("a stage owns its parameters; make a new pipeline")
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: every stage clears its gradients before each backward."""

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Call ``hook(optimizer, args, kwargs)`` before every update of every stage of this process, with that stage's
        own optimizer and in the thread that runs the stage: once per stage and minibatch.

        Raises:
            RuntimeError: the updates are replayed from graphs.
        """
        return self._register("_optimizer_step_pre_hooks", hook)

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """As :meth:`register_step_pre_hook`, after every update."""
        return self._register("_optimizer_step_post_hooks", hook)

    def _register(self, kind: str, hook: Any) -> RemovableHandle:
        if self._replayed:
            raise RuntimeError(
                "executor='graphs' replays the stages' updates, and no replay calls a hook; use executor='streams'"
            )
        self._synchronize()
        hooks = [getattr(optimizer, kind) for optimizer in self._optimizers]
        handle = _StageHooks(self._synchronize, hooks)
        for registered in hooks:
            registered[handle.id] = hook
        return handle

    def state_dict(self) -> dict[str, Any]:
        """One state_dict per stage with parameters, and all groups' options as they are now. Of a drained pipe."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._synchronize()
        self.refresh()
        state: dict[str, Any] = {
            "stages": [optimizer.state_dict() for optimizer in self._optimizers],
            "kinds": [_kind(optimizer) for optimizer in self._optimizers],
            "options": [{k: v for k, v in g.items() if k not in OWN} for g in self.param_groups],
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, into a pipe of the same stages.

        Raises:
            ValueError: what :meth:`check` refuses.
        """
        state_dict = {**state_dict}
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.check(state_dict)
        self._synchronize()
        for stage, state in zip(self._stages, state_dict["stages"], strict=True):
            stage.optimizer.load_state_dict(state)
            stage.reset()
        for group, values in zip(self.param_groups, state_dict["options"], strict=True):
            group.update({key: value for key, value in values.items() if key != "backend"})  # the machine's
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def check(self, state_dict: dict[str, Any]) -> None:
        """Refuse what :meth:`load_state_dict` would refuse, and load nothing.

        Raises:
            ValueError: another number of stages or groups, other optimizers, or other past weights.
        """
        stages, options = state_dict["stages"], state_dict["options"]
        kinds = [_kind(optimizer) for optimizer in self._optimizers]
        theirs = state_dict.get("kinds", kinds)
        if len(theirs) == len(kinds) and theirs != kinds:
            raise ValueError(f"the state is of {theirs}, this pipeline trains with {kinds}")
        if len(stages) != len(self._optimizers) or len(options) != len(self.param_groups):
            raise ValueError(
                f"the state is of {len(stages)} stages with {len(options)} groups, this pipeline has "
                f"{len(self._optimizers)} with {len(self.param_groups)}"
            )
        for i in self.own:
            group, values = self.param_groups[i], options[i]
            for key in _PAST:
                if holds_function(group.get(key)) and key not in values:
                    continue  # a file holds no function
                if group.get(key) != values.get(key):
                    raise ValueError(
                        f"the state's parameter group {i} was trained with {key}={values.get(key)!r}, this pipeline "
                        f"has {key}={group.get(key)!r}; make the pipeline with the same stages, schedule and past"
                    )


def common_optimizer(
    stages: Sequence[Stage], synchronize: Callable[[], None], ranks: Ranks, *, replayed: bool
) -> PipelineOptimizer:
    """One view of the stages' optimizers in all processes, each of which gives its own stages."""
    own = [stage.options for stage in stages if stage.options is not None]
    groups, rank = ranks.gather(options_of([stage.optimizer for stage in own])), ranks.rank
    return PipelineOptimizer(
        own,
        synchronize,
        before=[*itertools.chain(*groups[:rank])],
        after=[*itertools.chain(*groups[rank + 1 :])],
        replayed=replayed,
    )


def options_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """Return what other processes see of these stages' parameter groups: no parameters, and nothing that no message
    holds."""
    return [
        {key: value for key, value in frozen_options(group).items() if not holds_function(value)}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def holds_function(value: Any) -> bool:
    """Return whether an option is a function, or a kind of past weights with one, which its group could not spell."""
    return callable(value) or isinstance(value, Past)


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
    """Return a process's part of what :func:`joined` made; stages are counted among those with parameters."""
    own: dict[str, Any] = {key: state[key][stages.start : stages.stop] for key in ("stages", "kinds") if key in state}
    return {**own, "options": state["options"]}


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """An optimizer's name, and of which one a wrapper is."""
    name, inner = type(optimizer).__name__, getattr(optimizer, "optimizer", None)
    return f"{name} of {_kind(inner)}" if isinstance(inner, torch.optim.Optimizer) else name


def _all_same(now: list[tuple[Any, ...]], before: list[tuple[Any, ...]]) -> bool:
    try:
        return now == before
    except Exception:  # an option that cannot be compared, such as a tensor in the place of a number
        return False


class _StageHooks(RemovableHandle):
    """Removes a hook of all stages, none of which may be calling it."""

    def __init__(self, synchronize: Callable[[], None], hooks: Sequence[Any]) -> None:
        super().__init__(hooks[0], extra_dict=list(hooks[1:]))
        self._synchronize = synchronize

    def remove(self) -> None:
        self._synchronize()
        super().remove()


#: What a stage's history was made for.
_PAST = ("delay", "past")
