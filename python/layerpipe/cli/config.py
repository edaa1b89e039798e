"""One training run, as it is asked for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from layerpipe.errors import UsageError


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are those of ``layerpipe train``. One that is added does by default what was done without it."""

    model: str = "resnet18"
    data: str = "digits"
    width: int = 32
    channels_last: bool = False
    stages: int = 4
    balance: str = "flops"
    at: tuple[str, ...] | None = None  # where the model was cut, once that has been measured
    past: str = "blend"
    order: int = 2
    ema_decay: str | None = None
    past_norm: str | None = None
    schedule: str = "lockstep"
    executor: str = "threads"
    split_backward: bool = False
    optimizer: Literal["sgd", "adamw", "nadam", "muon", "soap"] = "sgd"
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    spike_compensation: float = 0.0
    weight_prediction: float = 0.0
    accumulate: int = 1
    sync_steps: int = 0
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: int = 50
    max_norm: float | None = None
    batch_size: int = 64
    epochs: float | None = None
    steps: int | None = None
    seed: int = 0
    device: str = "cpu"
    data_dir: Path = Path("data")
    checkpoint_every: int | None = None

    #: What ``layerpipe train`` takes for a model where nothing is said, and it is not the default above.
    by_model: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt": {"data": "python", "width": 128, "batch_size": 16, "optimizer": "soap", "max_norm": 1.0}
    }

    #: Steps where neither steps nor epochs are given.
    default_steps = 600

    @classmethod
    def of_model(cls, model: str, **options: Any) -> TrainConfig:
        """A config of these options; one that is ``None`` is what goes with the model."""
        own = cls.by_model.get(model, {})
        given = {n: own.get(n, getattr(cls, n)) if value is None else value for n, value in options.items()}
        return cls(model=model, **given)

    def total_steps(self, images: int) -> int:
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return max(1, round(self.epochs * (images // self.batch_size)))
        return self.default_steps

    def check_past(self) -> None:
        """Refuse options that this kind of past weights has no use for.

        Raises:
            UsageError: there is one.
        """
        if self.order != type(self).order and self.past != "blend":
            raise UsageError(f"--order {self.order} is a blend's; --past {self.past} has none")
        if self.ema_decay is not None and self.past not in ("ema", "blend"):
            raise UsageError(f"--ema-decay {self.ema_decay} is that of averages; --past {self.past} keeps none")

    def past_options(self) -> dict[str, Any]:
        """``past``, ``order`` and the decay as the library takes them.

        Raises:
            ValueError: a decay that is neither a rule nor numbers.
        """
        return {"past": self.past, "order": self.order, "ema_decay": parse_decay(self.ema_decay)}

    def lr_factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with in a step: a linear warm-up, then the schedule."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        if self.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if self.lr_schedule == "linear":
            return max(0.0, 1 - done)
        return 1.0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """What :meth:`to_json` gave. An option that is newer than the file takes its default.

        Raises:
            UsageError: an option that this version does not have, or a value that none could have.
        """
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise UsageError(f"the run's config.json has {', '.join(unknown)}, which this version does not know")
        kinds = get_type_hints(cls)
        for name, value in values.items():
            if not _is(value, kinds[name]):
                raise UsageError(f"the run's config.json has {name}={value!r}, which cannot be")
        options: dict[str, Any] = {**values, "data_dir": Path(values.get("data_dir", cls.data_dir))}
        if options.get("at") is not None:
            options["at"] = tuple(options["at"])
        return cls(**options)

    def to_json(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def _is(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of a field's type."""
    if get_origin(kind) in (Union, UnionType):
        return any(_is(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_is(each, get_args(kind)[0]) for each in value)
    if kind is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    return type(value) is (str if kind is Path else kind)


def parse_decay(text: str | None) -> str | float | tuple[float, ...] | None:
    """``matched``, ``coupled``, ``0.9`` or ``0.5,0.8``."""
    if text is None:
        return None
    from layerpipe_kernels.decay import COUPLED, RULES

    if text in RULES or text == COUPLED:
        return text
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--ema-decay {text!r} is neither a rule ({', '.join((*RULES, COUPLED))}) nor numbers with commas"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers
