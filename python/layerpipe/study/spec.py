"""The trainings of a study, from a TOML file or from options of the command line.

Every table ``[[grid]]`` stands for all combinations of its values; what is said outside of them holds for all::

    seeds = 3
    steps = 300
    lr = {adamw = [0.001, 0.003], soap = [0.003, 0.006]}

    [[grid]]
    model = ["mlp", "gpt"]
    method = ["stash", "latest", "ours"]
    stages = [4, 8]
    schedule = "1f1b"
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerpipe.errors import UsageError
from layerpipe.models import MODELS
from layerpipe.models.factory import is_name
from layerpipe.study import past
from layerpipe.study.trial import OPTIMIZERS, Row, Trial

#: Learning rates that a row's is chosen from.
LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "sgd": (0.02, 0.05, 0.1),
    "adamw": (0.001, 0.002, 0.004),
    "muon": (0.005, 0.01, 0.02),
    "soap": (0.003, 0.006, 0.012),
}
#: What goes with a model; anything may be said otherwise.
BY_MODEL: dict[str, dict[str, Any]] = {
    "gpt": {"data": "python", "width": 32, "batch_size": 8},
    "vit": {"width": 32},
}
DEFAULTS: dict[str, Any] = {
    "model": "mlp",
    "data": "digits",
    "width": 8,
    "batch_size": 64,
    "steps": 300,
    "warmup": 30,
    "optimizer": "adamw",
    "method": "none",
    "past": "stash",
    "stages": 4,
    "schedule": "1f1b",
    "accumulate": 1,
    "sync_steps": 0,
    "max_norm": 1.0,
}
_OF_THE_STUDY = ("name", "seeds", "seed", "lr", "grid")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Rows, their learning rates and their seeds.

    Attributes:
        rows: without repetitions; those without a delay that others are compared with come first.
        learning_rates: by optimizer.
        seeds: of every row, the same in all: differences are formed within a seed.
    """

    name: str
    rows: tuple[Row, ...]
    learning_rates: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]

    @property
    def tuning_seed(self) -> int:
        """The seed that chooses learning rates, and is not reported."""
        return self.seeds[0] + 1_000_000

    def tuning(self) -> list[Trial]:
        """The trials that choose a learning rate where there are several."""
        return [
            Trial(row, lr, self.tuning_seed, tuning=True)
            for row in self.rows
            if len(self.learning_rates[row.optimizer]) > 1
            for lr in self.learning_rates[row.optimizer]
        ]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Spec:
        """Make a study of :meth:`to_json`'s result."""
        return cls(
            name=values["name"],
            rows=tuple(Row(**row) for row in values["rows"]),
            learning_rates={name: tuple(rates) for name, rates in values["learning_rates"].items()},
            seeds=tuple(values["seeds"]),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "learning_rates": {name: list(rates) for name, rates in self.learning_rates.items()},
            "seeds": list(self.seeds),
        }


def read(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UsageError: it is not there, or is no TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}") from error


def make(values: Mapping[str, Any]) -> Spec:
    """The study that a file or the command line asks for.

    Raises:
        UsageError: an unknown name, or values that do not fit together.
    """
    unknown = [name for name in values if name not in DEFAULTS and name not in _OF_THE_STUDY]
    if unknown:
        raise UsageError(f"a study has no {', '.join(unknown)}; there are: {', '.join((*_OF_THE_STUDY, *DEFAULTS))}")
    common = {name: value for name, value in values.items() if name in DEFAULTS}
    rows: dict[Row, None] = {}
    try:
        for grid in values.get("grid", [{}]):
            for options in _combinations({**common, **grid}):
                rows[_row(options)] = None
        compared = list(dict.fromkeys(row.undelayed(name) for row in rows for name in (row.optimizer, "adamw")))
    except ValueError as error:
        raise UsageError(str(error)) from error
    seeds, first = _number(values, "seeds", 3), _number(values, "seed", 0)
    if seeds < 1:
        raise UsageError(f"a study has at least one seed, got {seeds}")
    return Spec(
        name=str(values.get("name", "study")),
        rows=tuple(dict.fromkeys([*compared, *rows])),
        learning_rates=_learning_rates(values.get("lr", {})),
        seeds=tuple(range(first, first + seeds)),
    )


def _combinations(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if unknown := [name for name in options if name not in DEFAULTS]:
        raise ValueError(f"a grid has no {', '.join(unknown)}; there are: {', '.join(DEFAULTS)}")
    lists = [value if isinstance(value, list | tuple) else [value] for value in options.values()]
    for values in itertools.product(*lists):
        yield dict(zip(options, values, strict=True))


def _row(options: dict[str, Any]) -> Row:
    own = BY_MODEL.get(options.get("model", DEFAULTS["model"]), {})
    values = {**DEFAULTS, **own, **options}
    for name, value in values.items():
        kind = type(DEFAULTS[name])
        if kind is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is not kind:
            raise ValueError(f"{name}={value!r} is not of type {kind.__name__}")
    for name in ("width", "batch_size", "steps", "stages", "accumulate"):
        if values[name] < 1:
            raise ValueError(f"{name}={values[name]} is less than 1")
    for name in ("warmup", "sync_steps", "max_norm"):
        if values[name] < 0:
            raise ValueError(f"{name}={values[name]} is less than 0")
    if values["warmup"] > values["steps"]:
        raise ValueError(f"warmup={values['warmup']} is longer than the training, which has {values['steps']} steps")
    if values["model"] not in MODELS and not is_name(values["model"]):
        raise ValueError(f"model {values['model']!r} is unknown; there are: {', '.join(MODELS)}")
    past.parse(values["past"])
    return Row.make(**values)


def _number(values: Mapping[str, Any], name: str, default: int) -> int:
    value = values.get(name, default)
    if type(value) is not int:
        raise UsageError(f"{name}={value!r} is not a whole number")
    return value


def _learning_rates(given: Any) -> dict[str, tuple[float, ...]]:
    if isinstance(given, int | float | list | tuple):
        given = dict.fromkeys(OPTIMIZERS, given)
    found = dict(LEARNING_RATES)
    for name, rates in given.items():
        if name not in OPTIMIZERS:
            raise UsageError(f"lr is by optimizer: {', '.join(OPTIMIZERS)}; not {name!r}")
        several: Sequence[Any] = rates if isinstance(rates, list | tuple) else [rates]
        if not several or not all(isinstance(rate, int | float) and rate > 0 for rate in several):
            raise UsageError(f"lr of {name} is numbers more than 0, got {rates!r}")
        found[name] = tuple(sorted(float(rate) for rate in several))
    return found
