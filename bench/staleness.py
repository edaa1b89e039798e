"""What a delay costs each optimizer, and what gets it back: exact simulations of delayed training.

    python -m bench.staleness stages=8 optimizer=adam,soap schedule=sequential,1f1b --json staleness.json
    python -m bench.staleness seed=0,1,2 / schedule=sequential / spike_compensation=0,1 microbatches=1,4

Every combination of the values is a run, with slashes those of every part with the first one; names and defaults are
those of ``Run`` and of ``layerpipe.study.settings.Settings``. *Worth* is how many minibatches without a delay
end at the same quality, from sequential runs of several lengths (``schedule=sequential steps=400,600,900``), each with
its own schedule of the learning rate and the best of the others' settings that were run; *extra* is how many times as
many the delayed run took.

Runs are made ``--processes`` at a time, each with one thread. With ``--json`` every finished run is kept at once, and
the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench import engine_training
from bench.report import console, deviation, save
from bench.tasks import TASKS
from layerpipe import drawing
from layerpipe.study.settings import Settings
from layerpipe.study.training import DelayedTraining, Horizon, train

EVERY = 50


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: the network, how it is cut, how long it is trained, and with what.

    Attributes:
        width, batch, context: of the network and its minibatches; 0 is what the task has.
        engine: train by the engine (``bench.engine_training``), not by a simulation.
        past: the weights that a backward sees, see :func:`layerpipe.study.past.parse`.
    """

    task: str = "gpt"
    width: int = 0
    batch: int = 0
    context: int = 0
    stages: int = 8
    schedule: str = "1f1b"
    steps: int = 600
    microbatches: int = 1
    warmup: int = 100
    sync_steps: int = 0
    seed: int = 0
    engine: bool = False
    past: str = "stash"
    settings: Settings = dataclasses.field(default_factory=Settings)

    @classmethod
    def make(cls, values: dict[str, Any]) -> Run:
        """From a flat dictionary of its own fields and those of ``Settings``.

        Raises:
            ValueError: a name that neither has.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"settings"}
        settings = {name: value for name, value in values.items() if name not in own}
        if unknown := settings.keys() - {field.name for field in dataclasses.fields(Settings)}:
            raise ValueError(f"no such option: {', '.join(sorted(unknown))}")
        return cls(**{name: values[name] for name in own & values.keys()}, settings=Settings(**settings))

    def flat(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return values | values.pop("settings")

    def group(self, *besides: str) -> tuple[tuple[str, Any], ...]:
        """What tells it from other runs, except for these options."""
        return tuple((name, value) for name, value in self.flat().items() if name not in besides)


Results = dict[Run, dict[str, Any]]


def measure(run: Run) -> tuple[Run, dict[str, Any]]:
    size = {name: getattr(run, name) for name in ("width", "batch", "context") if getattr(run, name)}
    task, horizon = TASKS[run.task](run.seed, **size), Horizon(run.steps, run.warmup)
    options: dict[str, Any] = {"microbatches": run.microbatches, "sync_steps": run.sync_steps, "past": run.past}
    if run.engine:
        return run, engine_training.train(task, run.stages, run.schedule, run.settings, horizon, every=EVERY, **options)
    return run, train(DelayedTraining(task, run.stages, run.schedule, run.settings, horizon, **options), EVERY)


def load(path: Path) -> Results:
    """What an earlier call has finished."""
    rows = json.loads(path.read_text())["runs"] if path.exists() else []
    return {Run.make(row.pop("options")): row for row in rows}


def grid(arguments: Iterable[str]) -> list[Run]:
    """Every combination of ``name=value,value`` arguments.

    Raises:
        ValueError: an unknown name, or a value of another type than the default's.
    """
    types = {name: type(value) for name, value in Run().flat().items()}
    choices: dict[str, list[Any]] = {}
    for argument in arguments:
        name, _, values = argument.partition("=")
        if name not in types or not values:
            raise ValueError(f"{argument!r} is not NAME=VALUE,... with a name of: {', '.join(types)}")
        parse = {bool: lambda text: {"true": True, "false": False}[text.lower()]}.get(types[name], types[name])
        try:
            choices[name] = [parse(value) for value in values.split(",")]
        except (KeyError, ValueError):
            raise ValueError(f"{argument!r}: {name} is a {types[name].__name__}") from None
    return [Run.make(dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]


def grids(arguments: Sequence[str]) -> list[Run]:
    """Grids between slashes, each with the arguments before the first one: ``steps=9 / lr=0.1 / lr=0.2 seed=0,1``."""
    common, *others = [list(part) for slash, part in itertools.groupby(arguments, "/".__eq__) if not slash] or [[]]
    return [run for other in others for run in grid([*common, *other])] if others else grid(common)


def worth(quality: float, lengths: Sequence[tuple[int, float]]) -> float:
    """The length at which ``(length, quality)`` pairs, interpolated over the length's logarithm, have this quality.

    NaN where that is outside of what was measured.
    """
    for (short, a), (long, b) in itertools.pairwise(sorted(lengths)):
        if a != b and 0 <= (quality - a) / (b - a) <= 1:
            return short * math.exp(math.log(long / short) * (quality - a) / (b - a))
    return math.nan


def undelayed(found: Results, run: Run) -> list[tuple[int, float]]:
    """Best mean quality over seeds of each length, among sequential runs of the same network and optimizer."""
    by_group: dict[Any, list[float]] = {}
    for other, result in found.items():
        if _trained(other) == _trained(run) and other.schedule == "sequential" and not other.engine:
            by_group.setdefault((other.steps, other.group("seed")), []).append(result["quality"])
    best = min if run.task == "gpt" else max
    lengths: dict[int, float] = {}
    for (steps, _), qualities in by_group.items():
        mean = statistics.fmean(qualities)
        lengths[steps] = best(lengths.get(steps, mean), mean)
    return sorted(lengths.items())


def _trained(run: Run) -> tuple[Any, ...]:
    return run.task, run.width, run.batch, run.context, run.settings.optimizer


def table(found: Results, runs: Sequence[Run]) -> Table:
    """Mean ± standard deviation over seeds; only the options that differ between runs have a column."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group("seed"), []).append(run)
    names = varied(runs)
    made = Table(title="Delayed training, simulated", title_justify="left")
    for column in (*names, "seeds", "quality", "worth", "extra"):
        made.add_column(column, justify="left" if column in names else "right")
    for group in groups.values():
        qualities = [found[run]["quality"] for run in group]
        equal = worth(statistics.fmean(qualities), undelayed(found, group[0]))
        known = not math.isnan(equal) and group[0].schedule != "sequential"
        made.add_row(
            *(str(group[0].flat()[name]) for name in names), str(len(group)), deviation(qualities, ".3f"),
            f"{equal:.0f}" if known else "–", f"{group[0].steps / equal:.2f}" if known else "–",
        )  # fmt: skip
    return made


def varied(runs: Sequence[Run]) -> list[str]:
    """Names of the options that are not the same in all runs, without the seed."""
    return [name for name in runs[0].flat() if name != "seed" and len({run.flat()[name] for run in runs}) > 1]


def plot(path: Path, found: Results, runs: Sequence[Run]) -> None:
    """Training loss of every run, the mean of ``EVERY`` minibatches each."""
    figure, axes = drawing.new_figure(figsize=(8, 6))
    default = Run().flat()
    for run in runs:
        curve = found[run]["curve"]
        minibatches = [min(EVERY * (i + 1), run.steps) for i in range(len(curve))]
        values = {name: value for name, value in run.flat().items() if name in varied(runs) and value != default[name]}
        label = ", ".join(f"{name} {value}" for name, value in values.items()) or "defaults"
        axes.plot(minibatches[1:], curve[1:], label=label)
    axes.set(xlabel="minibatches", ylabel="training loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12))
    drawing.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE,...", help=", ".join(Run().flat()))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="keep finished runs here, and do not run again what is there")
    parser.add_argument("--plot", type=Path, help="draw the losses of these runs here")
    given = parser.parse_args()
    try:
        runs = grids(given.options)
    except ValueError as error:
        parser.error(str(error))
    found = load(given.json) if given.json else {}
    out = console(120)
    missing = [run for run in runs if run not in found]
    with multiprocessing.get_context("spawn").Pool(given.processes, torch.set_num_threads, (1,)) as pool:
        for run, result in pool.imap_unordered(measure, missing):
            found[run] = result
            save(given.json, runs=[{"options": run.flat(), **result} for run, result in found.items()])
            out.print(f"{run}: {result['quality']:.3f}", highlight=False)
    out.print(table(found, runs))
    if given.plot:
        plot(given.plot, found, runs)


if __name__ == "__main__":
    main()
