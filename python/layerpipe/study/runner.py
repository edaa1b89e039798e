"""Runs the trials of a study, several at a time, and keeps each as it ends: an interrupted study goes on."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import shlex
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import layerpipe
from layerpipe.errors import UsageError
from layerpipe.machine import processor
from layerpipe.partition.profile import intraop_threads
from layerpipe.study.spec import Spec
from layerpipe.study.tasks import measure_of, task
from layerpipe.study.trial import Outcome, Row, Trial, run

Found = dict[Trial, Outcome]


class Records:
    """A directory with the study's options, where it has been run, and a file for each trial that has ended.

    A trial's file is found by its options: a study that is asked for more seeds or methods runs those alone.

    Raises:
        UsageError: the directory cannot be written, or holds something else.
    """

    def __init__(self, path: Path, spec: Spec, command: Sequence[str]) -> None:
        self.path = path
        file = path / "study.json"
        if path.is_dir() and any(path.iterdir()) and not file.exists():
            raise UsageError(f"{path} holds something that is no study; give another --out")
        try:
            (path / "trials").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {path} cannot be written: {error.strerror}") from error
        before = json.loads(file.read_text(encoding="utf-8"))["sittings"] if file.exists() else []
        self.sittings: list[dict[str, Any]] = [*before, environment(command)]
        self.write("study.json", {"study": spec.to_json(), "sittings": self.sittings})

    def write(self, name: str, values: Any) -> None:
        """Whole or not at all."""
        part = self.path / f"{name}.part"
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path / name)

    def keep(self, trial: Trial, outcome: Outcome) -> None:
        self.write(f"trials/{trial.key}.json", {"trial": trial.to_json(), "outcome": dataclasses.asdict(outcome)})

    def found(self, trials: Iterable[Trial]) -> Found:
        """Those that have ended."""
        ended: Found = {}
        for trial in trials:
            file = self.path / "trials" / f"{trial.key}.json"
            if file.exists():
                values = json.loads(file.read_text())
                if Trial.from_json(values["trial"]) != trial:
                    raise UsageError(f"{file} is another trial's; remove it")
                ended[trial] = Outcome(**values["outcome"])
        return ended

    def everything(self, spec: Spec) -> Found:
        """Return what has ended of an interrupted study, up to where it is known which learning rates are chosen."""
        found = self.found(spec.tuning())
        return found if len(found) < len(spec.tuning()) else found | self.found(reported(spec, found))


def save(path: Path, spec: Spec, found: Found, sittings: Sequence[dict[str, Any]]) -> None:
    """A study in one file, its losses to four digits."""
    lines = []
    for trial, outcome in found.items():
        values = dataclasses.asdict(outcome) | {"curve": [float(f"{loss:.4g}") for loss in outcome.curve]}
        lines.append(json.dumps({"trial": trial.to_json(), "outcome": values}))
    text = ",\n".join(lines)
    head = json.dumps({"study": spec.to_json(), "sittings": list(sittings)}, indent=1)
    path.write_text(f'{head[:-2]},\n "trials": [\n{text}\n]\n}}\n', encoding="utf-8")


def load(path: Path) -> tuple[Spec, Found, list[dict[str, Any]]]:
    """Return what :func:`save` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    found = {Trial.from_json(each["trial"]): Outcome(**each["outcome"]) for each in values["trials"]}
    return Spec.from_json(values["study"]), found, values["sittings"]


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Return what a study ran on, by which options of ``layerpipe``."""
    return {
        "layerpipe": layerpipe.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(["layerpipe", *command]),
    }


def check(spec: Spec, root: Path) -> None:
    """Makes every network once, cut as it will be.

    Raises:
        UsageError: it cannot be made or cut; of data that is not here, DataError.
    """
    cuts = {(row.model, row.data, row.width, row.batch_size, row.stages) for row in spec.rows}
    for model, data, width, batch_size, stages in sorted(cuts):
        try:
            next(task(model, data, width, batch_size, stages, 0, root).minibatches)
        except (ValueError, ImportError) as error:
            raise UsageError(f"{model}: {error}") from error


def chosen(spec: Spec, row: Row, found: Found) -> float | None:
    """The learning rate with the best validation, ``None`` where all of them diverged."""
    rates = spec.learning_rates[row.optimizer]
    if len(rates) == 1:
        return rates[0]
    better = measure_of(row.model).better
    best: tuple[float, float] | None = None
    for lr in rates:
        outcome = found[Trial(row, lr, spec.tuning_seed, tuning=True)]
        if not outcome.diverged and (best is None or better(outcome.validation, best[1])):
            best = lr, outcome.validation
    return best[0] if best else None


def reported(spec: Spec, found: Found) -> list[Trial]:
    """The trials whose quality is reported: of every row that did not diverge everywhere, all seeds."""
    rates = {row: chosen(spec, row, found) for row in spec.rows}
    return [Trial(row, lr, seed) for seed in spec.seeds for row, lr in rates.items() if lr is not None]


def execute(
    spec: Spec, records: Records, root: Path, processes: int, on_end: Callable[[Trial, Outcome, int], None]
) -> Found:
    """Runs what has not ended before: first what chooses learning rates, then all seeds.

    Args:
        processes: at a time, with one thread each.
        on_end: called with each trial, its outcome, and how many of its phase are left.
    """
    found = records.found(spec.tuning())
    _run(spec.tuning(), found, records, root, processes, on_end)
    trials = reported(spec, found)
    found |= records.found(trials)
    _run(trials, found, records, root, processes, on_end)
    return found


def _run(
    trials: Sequence[Trial],
    found: Found,
    records: Records,
    root: Path,
    processes: int,
    on_end: Callable[[Trial, Outcome, int], None],
) -> None:
    missing = [(trial, root) for trial in trials if trial not in found]
    if not missing:
        return
    if processes == 1:
        ended: Iterable[tuple[Trial, Outcome]] = map(_measure, missing)
        with intraop_threads(1):
            return _collect(ended, len(missing), found, records, on_end)
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(missing)), _begin) as pool:
        _collect(pool.imap_unordered(_measure, missing), len(missing), found, records, on_end)


def _collect(
    ended: Iterable[tuple[Trial, Outcome]],
    left: int,
    found: Found,
    records: Records,
    on_end: Callable[[Trial, Outcome, int], None],
) -> None:
    for trial, outcome in ended:
        found[trial] = outcome
        records.keep(trial, outcome)
        left -= 1
        on_end(trial, outcome, left)


def _begin() -> None:
    """Of a worker: one thread, and Ctrl-C is the parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _measure(job: tuple[Trial, Path]) -> tuple[Trial, Outcome]:
    return job[0], run(*job)
