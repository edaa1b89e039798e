from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from layerpipe.cli import main
from tests.distributed import commands
from tests.distributed.processes import Processes

SIZES = ["--width", "16", "--stages", "2", "--steps", "12", "--warmup", "3", "--checkpoint-every", "5"]
OPTIONS = ["--model", "mlp", "--no-baseline", *SIZES]


def lines(path: Path, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if k not in ("samples_per_s", "phase", "seconds")} for line in found]
    return [line for line in timeless if line["event"] == event]


def in_processes(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    command = [sys.executable, "-m", "layerpipe.cli", "train", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_those(two: Processes, monkeypatch: pytest.MonkeyPatch, directory: Path, *arguments: str) -> str:
    """The same with processes that are there already: they run what the launcher is told to."""
    told: list[Any] = []

    def launch(config: Any, entrypoint: str) -> Any:
        told.extend((config.nproc_per_node, entrypoint))
        return lambda *command: told.extend(command)

    with monkeypatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RANK", raising=False)
        patch.setattr("torch.distributed.launcher.api.elastic_launch", launch)
        with pytest.raises(SystemExit):
            main(["train", *arguments])
    assert told == [2, sys.executable, "-m", "layerpipe.cli", "train", *arguments]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = two.all(commands.command, 2, ("127.0.0.1", store.port), str(directory), ["train", *arguments], True)
    assert [status for status, _, _ in found] == [0, 0], found
    return "".join(printed for _, _, printed in found)


@pytest.mark.slow
def test_a_run_in_processes_reports_what_one_in_this_process_does(
    two: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses, accuracies, errors of the past weights and memory; and so from its last checkpoint on."""
    torch.set_num_threads(1)
    expected, found = tmp_path / "serial", tmp_path / "distributed"
    with pytest.raises(SystemExit) as status:
        main(["train", *OPTIONS, "--executor", "serial", "--out", str(expected)])
    assert status.value.code == 0
    said = in_processes(*OPTIONS, "--executor", "distributed", "--out", str(found))
    assert said.count("Kept for past weights") == 1
    for event in ("step", "test", "past weights", "stage", "end"):  # whose order differs: losses come later
        assert lines(found, event) == lines(expected, event)
    assert {p.name for p in found.iterdir()} >= {"loss.png", "past_weights.png", "timeline.png"}

    in_those(two, monkeypatch, tmp_path, "--resume", str(found))
    for event in ("step", "test"):
        assert lines(found, event) == lines(expected, event)


def test_a_cut_that_is_measured_is_the_same_in_all_processes_and_when_resumed(
    two: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    said = in_those(
        two, monkeypatch, tmp_path, *OPTIONS, "--balance", "time", "--executor", "distributed", "--out", str(path)
    )
    assert said.count("Kept for past weights") == 1
    at = json.loads((path / "config.json").read_text())["at"]
    assert len(at) == 1
    begins = [line["layers"].split(" ")[0] for line in lines(path, "stage")]
    assert begins[1] == at[0]
    in_those(two, monkeypatch, tmp_path, "--resume", str(path))
    assert json.loads((path / "config.json").read_text())["at"] == at


def test_mistakes_are_named_once_and_before_processes_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "layerpipe.cli", "train", "--executor", "distributed", "--model", "mlp"]
    done = subprocess.run([*command, "--stages", "99"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_more_processes_than_stages_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "layerpipe.cli", "train", *OPTIONS, "--executor", "distributed", "--stages", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "--stages 1: 2 processes need at least as many stages" in done.stderr
    assert not (tmp_path / "run").exists()


def test_compare_refuses_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--executor", "distributed", "--out", str(tmp_path / "run")])
    assert "--executor distributed" in capsys.readouterr().err


def test_replicas_report_what_one_with_all_samples_does(four: Processes, tmp_path: Path) -> None:
    """To rounding: one progress bar, one directory, the mean of their losses."""
    options = [*OPTIONS[:-2], "--schedule", "1f1b"]
    expected, found = tmp_path / "serial", tmp_path / "replicas"
    with pytest.raises(SystemExit):
        main(["train", *options, "--executor", "serial", "--out", str(expected)])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = ["train", *options, "--executor", "distributed", "--dp", "2", "--out", str(found)]
    said = four.all(commands.command, 4, ("127.0.0.1", store.port), str(tmp_path), arguments, True)
    assert [status for status, _, _ in said] == [0] * 4, said
    assert [bool(printed) for _, _, printed in said] == [False, False, False, True]
    for one, other in zip(lines(found, "step"), lines(expected, "step"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dp", "2"], "add --executor distributed"),
        (["--dp", "3", "--executor", "distributed"], "--batch-size 64 is not divided by --dp 3 replicas"),
    ],
)
def test_replicas_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    with pytest.raises(SystemExit):
        main(["train", *OPTIONS, *options])
    assert said in " ".join(capsys.readouterr().err.split())
