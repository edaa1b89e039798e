"""What a delay costs a small GPT, and how much of it momentum that looks ahead brings back.

    python -m bench.delay

Trains the network of ``examples/gpt.py`` on the sources of Python's library, once per configuration and seed. A seed's
runs begin with the same weights and see the same minibatches, so *beside one stage*, how much higher the loss is than
without a delay, is formed within a seed. Both columns: mean ± standard deviation over seeds.

Two runs at a time, each in a process with one thread: executors differ in speed only, weights are the same bit for bit.
With ``--json`` every finished run is kept at once, and the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from bench.report import console, deviation, save
from examples import gpt

#: Stages, schedule, optimizer, past.
CONFIGURATIONS = [
    (1, "lockstep", "adamw", "blend"),
    (1, "lockstep", "nadam", "blend"),
    (2, "lockstep", "adamw", "blend"),
    (2, "lockstep", "nadam", "blend"),
    (4, "lockstep", "adamw", "stash"),
    (4, "lockstep", "adamw", "blend"),
    (4, "lockstep", "nadam", "blend"),
]


@dataclasses.dataclass(frozen=True)
class Run:
    stages: int
    schedule: str
    optimizer: str
    past: str
    seed: int
    steps: int


Results = dict[Run, dict[str, Any]]


def measure(run: Run) -> tuple[Run, dict[str, Any]]:
    torch.manual_seed(run.seed)
    text, unseen = gpt.sources()
    generator = torch.Generator().manual_seed(run.seed)
    x, _ = gpt.minibatch(text, generator)
    with gpt.pipeline(x, run.stages, run.optimizer, run.past, run.schedule, "serial") as pipe:
        for _ in gpt.train(pipe, text, run.steps, generator):
            pass
        kept = sum(memory.history for memory in pipe.memory())
        return run, {"delays": pipe.delays, "loss": gpt.evaluate(pipe, unseen), "kept_bytes": kept}


def load(path: Path) -> Results:
    """What an earlier call has finished."""
    rows = json.loads(path.read_text())["runs"] if path.exists() else []
    names = [field.name for field in dataclasses.fields(Run)]
    return {Run(**{name: row.pop(name) for name in names}): row for row in rows}


def table(found: Results, seeds: int, steps: int) -> Table:
    made = Table(title=f"Loss on unseen modules after {steps} minibatches, {seeds} seeds", title_justify="left")
    for column in ("stages", "schedule", "delays", "optimizer", "past", "loss", "beside one stage", "kept, MB"):
        made.add_column(column, justify="right" if column in ("stages", "kept, MB") else "left")

    def losses(configuration: tuple[int, str, str, str]) -> list[float]:
        return [found[Run(*configuration, seed, steps)]["loss"] for seed in range(seeds)]

    for configuration in CONFIGURATIONS:
        stages, schedule, optimizer, past = configuration
        mine, undelayed = losses(configuration), losses((1, "lockstep", optimizer, "blend"))
        result = found[Run(*configuration, 0, steps)]
        more = deviation([a - b for a, b in zip(mine, undelayed, strict=True)], "+.3f")
        made.add_row(
            str(stages), schedule, ", ".join(map(str, result["delays"])), optimizer, past if stages > 1 else "–",
            deviation(mine, ".3f"), more if stages > 1 else "–", f"{result['kept_bytes'] / 1e6:.1f}",
        )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="keep finished runs here, and do not run again what is there")
    options = parser.parse_args()
    found = load(options.json) if options.json else {}
    runs = [
        Run(*configuration, seed, options.steps) for seed in range(options.seeds) for configuration in CONFIGURATIONS
    ]
    missing = [run for run in runs if run not in found]
    out = console()
    with multiprocessing.get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        for run, result in track(pool.imap_unordered(measure, missing), "training", len(missing), console=out):
            found[run] = result
            save(options.json, runs=[{**dataclasses.asdict(run), **result} for run, result in found.items()])
            out.print(f"{run}: {result['loss']:.3f}")
    out.print(table(found, options.seeds, options.steps))


if __name__ == "__main__":
    main()
