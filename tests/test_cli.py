"""The command line as a person uses it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli_runs import SMALL, metrics, refused, run

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from typer.main import get_command

from layerpipe.cli.app import app
from layerpipe.cli.config import TrainConfig
from layerpipe.cli.runs import prepare
from layerpipe.cli.training import make_stages
from tests.engine.fake_device import fake_device


def test_channels_last_is_how_the_weights_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    assert run("train", "--width", "4", "--channels-last", "--out", str(tmp_path)) == 2
    assert "width of at least" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
    options = [
        "--width",
        "16",
        "--steps",
        "4",
        "--stages",
        "2",
        "--batch-size",
        "8",
        "--no-baseline",
        "--channels-last",
    ]
    assert run("train", *options, "--out", str(tmp_path)) == 0
    config = TrainConfig.from_json(
        {"channels_last": json.loads((tmp_path / "config.json").read_text())["channels_last"]}
    )
    weights = [p for stage in make_stages(config, prepare(config)) for p in stage.parameters() if p.ndim == 4]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.parametrize("past", ["stash", "latest", "ema", "momentum", "blend"])
def test_train_writes_what_it_promises(past: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run("train", *SMALL, "--past", past, "--stages", "3", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    for word in ("pipeline", "sequential", "test accuracy", "past-weight error", "activations", "would keep"):
        assert word in printed
    for name in ("loss.png", "past_weights.png", "timeline.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert list(out.glob("events.out.tfevents.*"))
    config = json.loads((out / "config.json").read_text())
    assert (config["past"], config["stages"], config["steps"]) == (past, 3, 25)
    lines = metrics(out)
    for name in ("pipeline", "sequential"):
        steps = [line["step"] for line in lines if line["run"] == name and line["event"] == "step"]
        assert steps == list(range(1, 26))
    stages = [line for line in lines if line["run"] == "pipeline" and line["event"] == "stage"]
    assert [stage["delay"] for stage in stages] == [4, 2, 0]
    errors = [stage["relative_error"] for stage in stages]
    assert errors[2] is None
    assert errors[0] == {"stash": 0.0, "latest": 1.0}.get(past, errors[0])


def test_the_pipeline_of_one_sequential_stage_is_the_baseline(tmp_path: Path) -> None:
    for name, more in (("a", []), ("b", ["--stages", "3", "--schedule", "sequential", "--executor", "serial"])):
        assert run("train", *SMALL, "--no-baseline", "--out", str(tmp_path / name), *(more or ["--stages", "1"])) == 0
    losses = [[m["loss"] for m in metrics(tmp_path / name) if m["event"] == "step"] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_compare_makes_one_table_and_one_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "comparison"
    arguments = ["--past", "stash,blend:order=1", "--seeds", "2", "--stages", "3"]
    assert run("compare", *SMALL, *arguments, "--out", str(out)) == 0
    printed = capsys.readouterr().out
    for word in ("stash", "blend:order=1", "sequential", "±", "0 of 2"):
        assert word in printed
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())["results"]
    assert summary["stash"]["past_weight_error"] == [[0.0, 0.0, None]] * 2
    assert all(0 < accuracy < 100 for accuracy in summary["blend:order=1"]["test_accuracy"])
    assert {m["run"] for m in metrics(out)} == {
        f"{k}/seed{s}" for k in ("sequential", "stash", "blend:order=1") for s in (0, 1)
    }


def test_compare_puts_schedules_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--past", "blend", "--schedule", "lockstep,1f1b", "--seeds", "1", "--stages", "3", "--no-baseline"]
    assert run("compare", *SMALL, *arguments, "--out", str(tmp_path / "c")) == 0
    rows = {line.split()[1]: line.split() for line in capsys.readouterr().out.splitlines() if "blend " in line}
    assert (rows["lockstep"][2], rows["1f1b"][2]) == ("4", "2")
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())["results"]
    assert [summary[f"blend {name}"]["delays"] for name in ("lockstep", "1f1b")] == [[4, 2, 0], [2, 1, 0]]


def test_compare_takes_matched_norms_and_coupled_averages(tmp_path: Path) -> None:
    kinds = ["ema", "ema:norm=match", "blend", "blend:order=3:decay=coupled"]
    arguments = ["--past", ",".join(kinds), "--seeds", "1", "--stages", "4", "--no-baseline"]
    assert run("compare", *SMALL, *arguments, "--out", str(tmp_path / "c")) == 0
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())["results"]
    assert list(summary) == kinds
    assert len({str(result["past_weight_error"]) for result in summary.values()}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("past", ["blend:norm=match", "blend:decay=coupled"])
def test_train_with_an_option_of_the_past_trains_otherwise(past: str, tmp_path: Path) -> None:
    losses = []
    for name, more in (("with", ["--past", past]), ("without", [])):
        assert run("train", *SMALL, "--stages", "4", "--no-baseline", *more, "--out", str(tmp_path / name)) == 0
        events = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([event["loss"] for event in events if event["event"] == "step"])
    assert losses[0] != losses[1]
    assert json.loads((tmp_path / "with" / "config.json").read_text())["past"] == past


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--schedule", "lockstep,never"], "--schedule 'never' is unknown; there are: lockstep, 1f1b"),
        (["train", "--past", "yesterday"], "past='yesterday' is unknown; there are: stash"),
        (["train", "--stages", "0"], "--stages"),
        (["train", "--model", "mlp", "--width", str(10**30)], "'--width'"),
        (["train", "--model", "mlp", "--width", str(10**9)], "mlp of width 1000000000 cannot be made: "),
        (["train", "--model", "mlp", "--epochs", "1", "--steps", "5"], "--steps 5 and --epochs 1 both say how long"),
        (
            ["train", "--model", "mlp", "--steps", "5", "--warmup", "6"],
            "--warmup 6 is longer than the run, which has 5",
        ),
        (["train", "--colour", "blue"], "--colour"),
        (["train", "--batch-size", "5000"], "a batch of 5000 does not fit the 1437 training images of digits"),
        (["train", "--model", "mlp", "--stages", "99"], "into 99 stages: it has"),
        (["train", "--past", "ema:decay=soon"], "past='ema:decay=soon': decay cannot be 'soon'"),
        (["train", "--past", "ema:decay=1.5"], "decay must be in [0, 1)"),
        (["train", "--momentum", "0", "--past", "momentum", "--model", "mlp"], "needs a momentum"),
        (["train", "--device", "quantum", "--model", "mlp"], "--device quantum"),
        (["train", "--executor", "streams", "--model", "mlp"], "'streams' needs a CUDA device; the stages are on cpu"),
        (["train", "--executor", "streams", "--profile", "--model", "mlp"], "'streams' needs a CUDA device"),
        (["train", "--executor", "graphs", "--model", "mlp"], "'graphs' needs a CUDA device; the stages are on cpu"),
        (["train", "--out", __file__, "--model", "mlp"], "is not a directory"),
        (["train", "--epochs", "inf"], "'--epochs': inf is not a finite number"),
        (["train", "--epochs", "0"], "'--epochs': 0.0 is not more than 0"),
        (["train", "--max-norm", "0"], "'--max-norm': 0.0 is not more than 0"),
        (["train", "--timeout", "inf", "--executor", "distributed"], "'--timeout': inf is not a finite number"),
        (["train", "--seed", "99999999999999999999"], "'--seed': 99999999999999999999 has more than 63 bits"),
        (["train", "--device", "meta", "--model", "mlp"], "--device meta"),
        (["compare", "--past", "stash,soon"], "--past 'soon': past='soon' is unknown"),
        (["compare", "--past", "stash,ema:decay=coupled"], "--past 'ema:decay=coupled': "),
        (["train", "--past", "blend:norm=double"], "must be None or 'match', got 'double'"),
        (["train", "--past", "blend:order=1:decay=coupled"], "couples two EMAs"),
        (["train", "--past", "stash:order=3"], "stash has no option 'order'; it has none"),
        (["plan", "mlp", "--batch-size", "4", "--microbatches", "5"], "--microbatches 5: a minibatch has --batch-size"),
        (["fly"], "fly"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_data_that_is_missing_without_a_network_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("torchvision").datasets

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    assert "CIFAR10 is not in" in refused(capsys, "train", "--data", "cifar10", "--data-dir", str(tmp_path))


def test_an_output_directory_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious")
    assert run("train", *SMALL, "--out", str(tmp_path)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_divergence_ends_with_the_stage_and_what_to_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run("train", *SMALL, "--lr", "1e25", "--past", "latest", "--out", str(out)) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "diverged: stage" in printed
    assert "lower learning rate" in printed
    end = [m for m in metrics(out) if m["event"] == "end"]
    assert len(end) == 1
    assert "not finite" in end[0]["diverged"]


def test_ctrl_c_ends_cleanly_and_leaves_readable_metrics(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", "from layerpipe.cli import main; main()", "train", *SMALL]
    process = subprocess.Popen(
        [*command, "--steps", "1000000", "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 20:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "Interrupted" in output
    assert metrics(out)[-1]["interrupted"] is True


def test_a_profile_is_a_trace_of_every_stage_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # the path may be long, and would be broken
    out = tmp_path / "run"
    assert run("train", *SMALL, "--stages", "3", "--profile", "--no-baseline", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    for word in ("Time per tick", "compute", "channel", "Python", "at work", "trace.json"):
        assert word in printed
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert {e["tid"] for e in events if e["ph"] == "X"} == {0, 1, 2}
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert len(names) == 3


def test_a_profile_of_graphs_has_the_devices_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--stages", "2", "--steps", "15", "--executor", "graphs"]
    with fake_device():
        assert run("train", *SMALL, *options, "--profile", "--no-baseline", "--out", str(out)) == 0
    assert "The host issued for" in " ".join(capsys.readouterr().out.split())
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert names[0] == "host"
    assert all(", stream " in name for name in names[1:])
    assert {e["tid"] for e in events if e["ph"] == "X"} == set(range(len(names)))


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    assert commands.keys() == {"train", "compare", "plan", "study"}
    for name, command in commands.items():
        assert run(name, "--help") == 0
        printed = capsys.readouterr().out
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"
            assert all(option in printed for option in parameter.opts if option.startswith("--"))


def test_learning_rate_warms_up_and_falls() -> None:
    config = TrainConfig(warmup=10)
    factors = [config.lr_factor(step, 110) for step in range(110)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[60] == pytest.approx(0.5)
    assert factors[-1] < 0.001
    assert TrainConfig(lr_schedule="constant").lr_factor(400, 500) == 1
    assert TrainConfig(lr_schedule="linear", warmup=0).lr_factor(250, 500) == 0.5


def test_steps_go_before_epochs() -> None:
    assert TrainConfig(steps=7, epochs=3).total_steps(1000) == 7
    assert TrainConfig(epochs=2.5, batch_size=10).total_steps(100) == 25
