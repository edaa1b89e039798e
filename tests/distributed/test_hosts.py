"""What processes on several hosts must do besides: they share no loopback and, in these tests, no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import commands, failing, programs
from tests.distributed.hosts import ADDRESSES
from tests.distributed.processes import Failure, Processes

TRAIN = ["train", "--model", "mlp", "--width", "16", "--stages", "3", "--steps", "8", "--warmup", "2", "--no-baseline"]


@pytest.fixture(autouse=True)
def _one_core() -> None:
    torch.set_num_threads(1)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_hosts_give_the_weights_of_one_bit_for_bit(apart: Processes) -> None:
    task = (4, {"schedule": "1f1b"}, [9, 6], [8, 8, 5])
    expected = programs.train(0, "serial", *task)
    for result in apart.all(programs.train, "distributed", *task):
        assert same(result["state"], expected["state"])
        assert torch.equal(result["output"], expected["output"])


def test_a_checkpoint_is_a_file_of_one_host(apart: Processes, tmp_path: Path) -> None:
    expected = programs.drained_once(0, "serial")
    for result in apart.all(programs.write_and_go_on, 2, str(tmp_path / "run.pt")):
        assert same(result["state"], expected["state"])
        assert result["scheduler"] == expected["scheduler"]


def test_a_checkpoint_that_no_process_has_is_the_same_error_in_all(apart: Processes, tmp_path: Path) -> None:
    for path, kind in ((tmp_path / "none.pt", "FileNotFoundError"), (None, "ValueError")):
        for result in apart.run(programs.go_on, "distributed", path and str(path)):
            assert isinstance(result, Failure)
            assert result.kind == kind


def test_a_host_without_a_network_stops_all_and_neighbours_are_named(apart: Processes) -> None:
    """The pipeline waits as long as the group that the caller made; who gives up first is a loss to its neighbours."""
    results = apart.run(failing.unplugged, 2, 10.0)
    for result, stages in zip(results, ("12", "02", "1"), strict=True):
        assert isinstance(result, Failure)
        assert result.kind == "StageError", result.where
        assert result.message.startswith(tuple(f"stage {stage} (" for stage in stages)), result.message
        assert "cannot be reached any more (" in result.message
    assert any("Timed out waiting 10000ms" in result.message for result in results)


def test_the_command_trains_and_resumes_with_its_directory_on_one_host(apart: Processes, tmp_path: Path) -> None:
    for name in ("typer", "sklearn", "matplotlib", "tensorboard"):
        pytest.importorskip(name)
    port = iter(range(28000, 28010))

    def command(*arguments: str) -> list[tuple[Any, str]]:
        found = apart.all(commands.command, 3, (ADDRESSES[0], next(port)), str(tmp_path), list(arguments))
        return [(status, said) for status, said, _ in found]

    def losses(path: Path) -> list[float]:
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["event"] == "step"]

    def weights(path: Path) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(path / "pipeline.checkpoint", weights_only=True)["model"]
        return content

    _train_alone(tmp_path)
    expected, found = tmp_path / "serial", tmp_path / "2" / "run"
    start = [*TRAIN, "--checkpoint-every", "4", "--executor", "distributed", "--out", "run"]
    assert [status for status, _ in command(*start)] == [0, 0, 0]
    assert [list((tmp_path / rank).iterdir()) for rank in "01"] == [[], []]
    assert losses(found) == losses(expected)
    assert same(weights(found), weights(expected))

    assert [status for status, _ in command("train", "--resume", "run")] == [0, 0, 0]
    assert losses(found) == losses(expected)

    for status, said in command(*start):  # only one of them can see that the directory holds a run
        assert status == 2
        assert "already holds a run" in said


def _train_alone(directory: Path) -> None:
    from layerpipe.cli import main

    with pytest.raises(SystemExit):
        main([*TRAIN, "--checkpoint-every", "4", "--executor", "serial", "--out", str(directory / "serial")])
