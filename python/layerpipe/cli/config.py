"""One training run, as it is asked for: the record from which commands and ``config.json`` take their options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import typer

from layerpipe.cli import optimizers
from layerpipe.cli import options as o
from layerpipe.errors import UsageError


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are those of ``layerpipe train``. One that is added does by default what was done without it."""

    model: o.Model = "resnet18"
    data: o.Data = "digits"
    data_dir: o.DataDir = Path("data")
    width: o.Width = 32
    channels_last: o.ChannelsLast = False
    stages: o.Stages = 4
    balance: o.Balance = "flops"
    at: tuple[str, ...] | None = None  # where the model was cut, once that has been measured
    past: o.Past = "blend"
    schedule: o.Schedule = "lockstep"
    executor: o.ExecutorName = "threads"
    dp: o.Replicas = 1
    split_backward: o.SplitBackward = False
    accumulate: o.Accumulate = 1
    sync_steps: o.SyncSteps = 0
    optimizer: o.OptimizerName = "sgd"
    lr: o.Lr = 0.02
    momentum: o.Momentum = 0.9
    weight_decay: o.WeightDecay = 5e-4
    spike_compensation: o.SpikeCompensation = 0.0
    weight_prediction: o.WeightPrediction = 0.0
    lr_schedule: o.LrSchedule = "cosine"
    warmup: o.Warmup = None
    max_norm: o.MaxNorm = None
    batch_size: o.BatchSize = 64
    epochs: o.Epochs = None
    steps: o.Steps = None
    seed: o.Seed = 0
    device: o.Device = "cpu"
    checkpoint_every: o.CheckpointEvery = None

    #: What ``layerpipe train`` takes for a model where nothing is said, and it is not the default above.
    by_model: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt": {"data": "python", "width": 128, "batch_size": 16, "optimizer": "soap", "max_norm": 1.0},
        "vit": {"width": 64, "optimizer": "soap", "max_norm": 1.0},
    }

    #: Options whose default hangs on the model or the optimizer.
    by_others: ClassVar[tuple[str, ...]] = (
        "data", "width", "optimizer", "lr", "momentum", "weight_decay", "spike_compensation", "weight_prediction",
        "max_norm", "batch_size",
    )  # fmt: skip

    #: Steps where neither steps nor epochs are given.
    default_steps = 600

    @classmethod
    def asked(cls, model: str, otherwise: Mapping[str, Any], **options: Any) -> TrainConfig:
        """A config of these options; one that is ``None`` is what goes with the model and the optimizer.

        Args:
            otherwise: what goes with models that have no values of their own.

        Raises:
            UsageError: a momentum for an optimizer without one.
        """
        own = {**otherwise, **cls.by_model.get(model, {})}
        given = {n: own.get(n, getattr(cls, n)) if value is None else value for n, value in options.items()}
        config = cls(model=model, **given)
        return optimizers.with_defaults(config, **{name: options[name] for name in optimizers.OPTIONS})

    def total_steps(self, images: int) -> int:
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return max(1, round(self.epochs * (images // self.batch_size)))
        return self.default_steps

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageError: there are some.
        """
        if self.steps is not None and self.epochs is not None:
            raise UsageError(f"--steps {self.steps} and --epochs {self.epochs:g} both say how long; leave one out")
        if self.dp > 1 and self.executor != "distributed":
            raise UsageError(f"--dp {self.dp} has replicas in processes of their own: add --executor distributed")
        if self.batch_size % self.dp:
            raise UsageError(f"--batch-size {self.batch_size} is not divided by --dp {self.dp} replicas")

    def check_length(self, images: int) -> None:
        """Refuse a run on so many images that would end before its learning rate has risen.

        Raises:
            UsageError: it is.
        """
        total = self.total_steps(images)
        if self.warmup is not None and self.warmup > total:
            raise UsageError(f"--warmup {self.warmup} is longer than the run, which has {total} minibatches")

    def of_all_processes(self) -> dict[str, Any]:
        """The options that all processes of a run must have alike."""
        return {name: value for name, value in self.to_json().items() if name not in ("data_dir", "device")}

    def lr_factor(self, step: int, steps: int) -> float:
        """Factor of the learning rate in a step: a linear warm-up, then the schedule."""
        warmup = min(50, steps // 2) if self.warmup is None else self.warmup
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        if self.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if self.lr_schedule == "linear":
            return max(0.0, 1 - done)
        return 1.0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """Make a config from :meth:`to_json`'s result. An option that is newer than the file takes its default.

        Raises:
            UsageError: an option that this version does not have, or a value that the command line would refuse.
        """
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise UsageError(f"the run's config.json has {', '.join(unknown)}, which this version does not know")
        kinds, infos = get_type_hints(cls), option_infos(cls)
        for name, value in values.items():
            reason = None if _is(value, kinds[name]) else "which cannot be"
            if reason is None and value is not None and name in infos:
                reason = _refusal(infos[name], value)
            if reason is not None:
                raise UsageError(f"the run's config.json has {name}={value!r}, {reason}")
        options: dict[str, Any] = {**values, "data_dir": Path(values.get("data_dir", cls.data_dir))}
        if options.get("at") is not None:
            options["at"] = tuple(options["at"])
        config = cls(**options)
        try:
            config.check()
        except UsageError as error:
            raise UsageError(f"the run's config.json does not fit together: {error}") from error
        return config

    def to_json(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def option_infos(record: type) -> dict[str, Any]:
    """The record's fields that are options, with what typer shall know of each."""
    found = {}
    for name, hint in get_type_hints(record, include_extras=True).items():
        for extra in getattr(hint, "__metadata__", ()):
            if isinstance(extra, typer.models.OptionInfo):
                found[name] = extra
    return found


def with_options_of(
    record: type[TrainConfig], *, without: tuple[str, ...] = (), **otherwise: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command that takes a record's options besides those of its own, and is called with the record first.

    Args:
        without: options that the command does not take; the record then has its own values.
        otherwise: what goes with models that have no values of their own.
    """
    hints = get_type_hints(record, include_extras=True)
    taken = [name for name in option_infos(record) if name not in without]

    def parameter(name: str) -> inspect.Parameter:
        hint, default = hints[name], getattr(record, name)
        if name in record.by_others:
            hint, default = Annotated[(hint.__origin__ | None, *hint.__metadata__)], None
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _, *own = inspect.signature(function, eval_str=True).parameters.values()

        def command(**given: Any) -> Any:
            rest = {parameter.name: given[parameter.name] for parameter in own}
            return function(record.asked(otherwise=otherwise, **{name: given[name] for name in taken}), **rest)

        parameters = [*map(parameter, taken), *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


def _refusal(info: Any, value: Any) -> str | None:
    """The command line's objection to an option's value; ``None`` if it takes it."""
    if info.min is not None and value < info.min:
        return f"which is less than {info.min}"
    if info.max is not None and value > info.max:
        return f"which is more than {info.max}"
    if info.callback is not None:
        try:
            info.callback(value)
        except typer.BadParameter as error:
            return f"which is refused: {error.message}"
    return None


def _is(value: Any, kind: Any) -> bool:
    """Return whether a value from JSON is of a field's type."""
    if get_origin(kind) in (Union, UnionType):
        return any(_is(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_is(each, get_args(kind)[0]) for each in value)
    if kind is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    return type(value) is (str if kind is Path else kind)
