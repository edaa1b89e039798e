"""One training of a study, and what it gave."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from layerpipe.study.methods import METHODS, Method, microbatches
from layerpipe.study.settings import Settings
from layerpipe.study.tasks import task
from layerpipe.study.training import SCHEDULES, DelayedTraining, Horizon, train

#: Their names in a study, and in :mod:`layerpipe.study.optimizers`.
OPTIMIZERS = {"sgd": "sgd", "adamw": "adam", "muon": "muon", "soap": "soap"}
_BETA1 = {"muon": 0.95}

#: Points of a curve of the training loss.
POINTS = 40


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a comparison: everything that trials with other seeds and learning rates have in common.

    Attributes:
        past: of a method that does not say it, see :mod:`layerpipe.study.past`.
        accumulate: microbatches per update, of a method that does not say it.
        sync_steps: minibatches at the beginning without a delay, of a method that does not say it.
    """

    model: str
    data: str
    width: int
    batch_size: int
    steps: int
    warmup: int
    optimizer: str = "adamw"
    method: str = "none"
    past: str = "stash"
    stages: int = 1
    schedule: str = "sequential"
    accumulate: int = 1
    sync_steps: int = 0
    max_norm: float = 1.0

    @classmethod
    def make(cls, **options: Any) -> Row:
        """With what the method fixes filled in, so that equal trainings are equal rows.

        Raises:
            ValueError: options that are unknown or do not fit together.
        """
        row = cls(**options)
        if row.method not in METHODS:
            raise ValueError(f"method {row.method!r} is unknown; there are: {', '.join(METHODS)}")
        for name, known in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
            if getattr(row, name) not in known:
                raise ValueError(f"{name} {getattr(row, name)!r} is unknown; there are: {', '.join(known)}")
        method = METHODS[row.method]
        if row.schedule == "sequential" or row.stages == 1:
            return dataclasses.replace(
                row, method="none", past="stash", stages=1, schedule="sequential", accumulate=1, sync_steps=0
            )
        row = dataclasses.replace(
            row,
            optimizer=method.optimizer or row.optimizer,
            past=method.past or row.past,
            accumulate=microbatches(method, row.stages, row.ahead, row.accumulate),
            sync_steps=round(method.synchronous * row.steps) or row.sync_steps,
        )
        if row.batch_size % row.accumulate:
            raise ValueError(f"a batch of {row.batch_size} cannot be cut into {row.accumulate} microbatches")
        return row

    @property
    def ahead(self) -> int:
        """Microbatches between the first stage's forward and backward."""
        return SCHEDULES[self.schedule] * (self.stages - 1)

    @property
    def delay(self) -> float:
        """Of the first stage, in updates."""
        return self.ahead / self.accumulate

    def undelayed(self, optimizer: str | None = None) -> Row:
        """Ordinary training beside it, with the same optimizer or another one."""
        return Row.make(
            **dataclasses.asdict(self) | {"schedule": "sequential", "optimizer": optimizer or self.optimizer}
        )

    def settings(self, lr: float) -> Settings:
        """Of its optimizer. SGD's learning rate is in torch's scaling, where momentum makes steps longer."""
        method: Method = METHODS[self.method]
        beta1 = _BETA1.get(self.optimizer, 0.9)
        values = {"beta1": beta1, "max_norm": self.max_norm, **method.settings}
        values["lr"] = lr / (1 - beta1) if self.optimizer == "sgd" else lr
        values["lr_delay_steps"] = round(method.rescaled * self.steps)
        return Settings(optimizer=OPTIMIZERS[self.optimizer], **values)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A row with a learning rate and a seed; ``tuning``: one that only chooses the learning rate."""

    row: Row
    lr: float
    seed: int
    tuning: bool = False

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Trial:
        return cls(**{**values, "row": Row(**values["row"])})

    @property
    def key(self) -> str:
        """A name for its file: the network, the method, and a checksum of all options."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
        return f"{self.row.model}-{self.row.optimizer}-{self.row.method}-{digest[:12]}".replace(":", ".")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a trial.

    Attributes:
        quality: on test data, in the unit of :func:`layerpipe.study.tasks.measure_of`; NaN where it diverged.
        validation: the same on validation data.
        curve: mean training loss of ``every`` minibatches each.
        delays: of every stage, in updates; the mean over microbatches.
        errors: of every stage, the mean square error of its past weights relative to the latest ones; ``None`` where
            they are exact.
        seconds: of the processor that it took, with one thread.
    """

    quality: float
    validation: float
    curve: list[float]
    every: int
    delays: list[float]
    errors: list[float | None]
    seconds: float

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.quality)


def run(trial: Trial, root: Path = Path("data")) -> Outcome:
    """Trains.

    Raises:
        ValueError: a network that cannot be made or cut.
        DataError: data that is not here.
    """
    begin = time.process_time()
    row = trial.row
    training = DelayedTraining(
        task(row.model, row.data, row.width, row.batch_size, row.stages, trial.seed, root),
        row.stages, row.schedule, row.settings(trial.lr), Horizon(row.steps, row.warmup),
        microbatches=row.accumulate, sync_steps=row.sync_steps, past=row.past,
    )  # fmt: skip
    every = max(1, row.steps // POINTS)
    torch.manual_seed(trial.seed)
    found = train(training, every)
    diverged = not math.isfinite(found["quality"])
    return Outcome(
        quality=found["quality"],
        validation=math.nan if diverged else training.task.validation(training.task.model),
        curve=found["curve"],
        every=every,
        delays=found["delays"],
        errors=[a / b if b else None for a, b in training.errors],
        seconds=time.process_time() - begin,
    )
