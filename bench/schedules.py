"""Lockstep and 1F1B side by side: throughput, measured delays, accuracy and the error of the past weights.

    python -m bench.schedules

*Throughput*: both pipelines of a case take turns within a round, the first one changing from round to round; ``ratio``
is 1F1B's rate over lockstep's, formed within a round: median and quartiles.

*Training*: a ResNet-18 is trained under both schedules, and as ordinary training, with the same seeds, data and
learning rates. ``n`` is the delay that nearly all backwards of the first stage saw, beside the rule's; *error* is the
mean square error of its reconstructed past weights, relative to using the latest weights (1.0). Everything per stage is
in the JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from bench.networks import Case
from bench.others import Others
from bench.pipeline import Options, pipelined
from bench.report import console, save, spread, summary
from layerpipe import data as datasets
from layerpipe.cli.config import TrainConfig
from layerpipe.cli.runs import sequential
from layerpipe.cli.training import train
from layerpipe.schedule import AUTO

SCHEDULES = ("lockstep", "1f1b")


def throughput(case: Case, stages: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Samples per second of both schedules in every round."""
    options = Options(stages, "time", "blend", SCHEDULES, compiled=False, split_backward=False)
    made = {schedule: pipelined(case, options, schedule) for schedule in SCHEDULES}
    rates: dict[str, list[float]] = {schedule: [] for schedule in SCHEDULES}
    try:
        steps = max(5, round(seconds / max(run(3) for _, run in made.values())))
        for number in track(range(rounds), description=str(case), transient=True):
            for schedule in SCHEDULES[:: -1 if number % 2 else 1]:
                pipe, run = made[schedule]
                rates[schedule].append(case.batch / run(steps))
                pipe.drain()  # so that its workers rest while the other one is timed
    finally:
        for pipe, _ in made.values():
            pipe.close()
    return {
        "case": dataclasses.asdict(case),
        "stages": stages,
        "steps_per_round": steps,
        **{schedule: summary(values) for schedule, values in rates.items()},
        "ratio": summary([b / a for a, b in zip(*rates.values(), strict=True)]),
    }


def training(config: TrainConfig, seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Per schedule and seed: accuracy, and each stage's delays and errors."""
    images = datasets.load(config.data, config.data_dir)
    kinds = {"sequential": sequential(config)}
    kinds |= {schedule: dataclasses.replace(config, schedule=schedule) for schedule in SCHEDULES}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for number in track(range(seeds * len(kinds)), description="training", transient=True):
        seed, name = config.seed + number // len(kinds), list(kinds)[number % len(kinds)]
        result = train(dataclasses.replace(kinds[name], seed=seed), images)
        found[name].append(
            {
                "seed": seed,
                "test_accuracy": result.test_accuracy,
                "diverged": result.diverged,
                "delays": [stage.delay for stage in result.stages],
                "measured_delays": [stage.measured for stage in result.stages],
                "past_weight_error": [stage.error for stage in result.stages],
            }
        )
    return found


def throughput_table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Samples per second: median (quartiles) over rounds", title_justify="left")
    for column in ("case", "stages", *SCHEDULES, "ratio"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for result in results:
        rates = [spread(result[schedule]["values"], ".0f") for schedule in SCHEDULES]
        ratio = spread(result["ratio"]["values"], ".2f")
        table.add_row(str(Case(**result["case"])), str(result["stages"]), *rates, ratio)
    return table


def training_table(found: dict[str, list[dict[str, Any]]], config: TrainConfig) -> Table:
    title = (
        f"{config.model} of width {config.width}, {config.data}, {config.stages} stages, {config.total_steps(0)} steps"
    )
    table = Table(title=title, title_justify="left")
    for column in ("schedule", "n, rule", "n, measured", "error of past", "test accuracy"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for name, runs in found.items():
        delays: dict[int, int] = {}
        for run in runs:
            for n, count in run["measured_delays"][0].items():
                delays[n] = delays.get(n, 0) + count
        most = max(delays, key=lambda n: delays[n])
        errors = [run["past_weight_error"][0] for run in runs if run["past_weight_error"][0] is not None]
        good = [run["test_accuracy"] for run in runs if run["test_accuracy"] is not None]
        deviation = f" ± {statistics.stdev(good):.2f}" if len(good) > 1 else ""
        accuracy = f"{statistics.fmean(good):.2f}{deviation} %" if good else ""
        lost = sum(bool(run["diverged"]) for run in runs)
        table.add_row(
            name, str(runs[0]["delays"][0]), f"{most} ({delays[most] / sum(delays.values()):.0%})",
            f"{statistics.fmean(errors):.2g}" if errors else "–",
            accuracy + (f"{' ' if accuracy else ''}{lost} diverged" if lost else ""),
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of the throughput")
    parser.add_argument("--seconds", type=float, default=1.5, help="about how long a schedule runs in a round")
    parser.add_argument("--data", default="digits", help="what is trained on")
    parser.add_argument("--width", type=int, default=8, help="channels of the trained ResNet-18's first layer")
    parser.add_argument("--stages", type=int, default=4, help="in the training; throughput has 2")
    parser.add_argument("--steps", type=int, default=250, help="of training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    torch.set_num_threads(1)
    cases = [Case("resnet18", 16, 64, 28), Case("resnet18", 16, 8, 28), Case("gpt", 256, 16, 128)]
    config = TrainConfig(data=given.data, width=given.width, stages=given.stages, steps=given.steps)
    with Others() as others:
        rates = [throughput(case, 2, given.rounds, given.seconds) for case in cases]
    out = console()
    out.print(throughput_table(rates))
    out.print(str(others), highlight=False)
    trained = training(config, given.seeds)
    out.print(training_table(trained, config))
    out.print(f"schedule='auto' with executor='threads' is {AUTO['threads']}.", highlight=False)
    save(
        given.json, throughput=rates, others_share=others.share, training={"config": config.to_json(), "runs": trained}
    )


if __name__ == "__main__":
    main()
