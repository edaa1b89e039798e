"""Optimizers and texts on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from layerpipe import data
from layerpipe.cli.config import TrainConfig
from layerpipe.cli.optimizers import DEFAULTS, with_defaults
from layerpipe.cli.training import make_pipeline
from tests.cli_runs import metrics, refused, run

MLP = ["--model", "mlp", "--width", "2", "--steps", "12", "--warmup", "3", "--batch-size", "16", "--stages", "3"]
GPT = ["--model", "gpt", "--width", "8", "--steps", "6", "--warmup", "2", "--batch-size", "2", "--stages", "2"]
ALONE = ["--no-baseline", "--executor", "serial"]


def config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", DEFAULTS)
def test_every_optimizer_trains_with_its_own_defaults(optimizer: str, tmp_path: Path) -> None:
    assert run("train", *MLP, *ALONE, "--optimizer", optimizer, "--out", str(tmp_path)) == 0
    written, own = config(tmp_path), DEFAULTS[optimizer]
    assert written["optimizer"] == optimizer
    assert (written["lr"], written["weight_decay"]) == (own.lr_images, own.weight_decay)
    losses = [line["loss"] for line in metrics(tmp_path) if line["event"] == "step"]
    assert len(set(losses)) == 12


def test_what_is_said_goes_before_an_optimizers_defaults(tmp_path: Path) -> None:
    said = ["--optimizer", "muon", "--lr", "0.5", "--momentum", "0.3", "--weight-decay", "0", "--steps", "5"]
    assert run("train", *MLP, *ALONE, *said, "--out", str(tmp_path)) == 0
    written = config(tmp_path)
    assert (written["lr"], written["momentum"], written["weight_decay"]) == (0.5, 0.3, 0.0)


def test_a_stage_averages_late_gradients_longer_and_knows_its_knobs(tmp_path: Path) -> None:
    images = data.load("digits", Path())
    config = with_defaults(TrainConfig(model="mlp", width=2, optimizer="soap"), lr=None, momentum=None,
                           weight_decay=None, spike_compensation=None, weight_prediction=0.25)  # fmt: skip
    with make_pipeline(config, images, lambda output, target: output.sum()) as pipe:
        groups = pipe.optimizer.param_groups
    assert {(g["betas"][0], g["beta1_delay"]) for g in groups} == {(0.9, 14.0)}
    assert {(g["spike_compensation"], g["weight_prediction"]) for g in groups} == {(1.0, 0.25)}


def test_a_pipeline_accumulates_and_begins_without_a_delay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--accumulate", "2", "--sync-steps", "4"]
    assert run("train", *MLP, *ALONE, *options, "--out", str(tmp_path)) == 0
    stages = [m for m in metrics(tmp_path) if m["event"] == "stage"]
    assert [stage["delay"] for stage in stages] == [2, 1, 0]
    assert stages[0]["measured"]["0"] >= 4


def test_a_config_of_before_there_were_optimizers_is_sgds() -> None:
    assert TrainConfig.from_json({"lr": 0.1}).optimizer == "sgd"


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.randint(256, (2000,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(data, "python_sources", lambda: (text[:1600], text[1600:]))


@pytest.mark.usefixtures("short_texts")
def test_a_gpt_learns_text_with_soap_beside_sequential_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", *GPT, "--out", str(tmp_path)) == 0
    written = config(tmp_path)
    assert (written["data"], written["optimizer"], written["max_norm"]) == ("python", "soap", 1.0)
    assert written["lr"] == DEFAULTS["soap"].lr_text
    assert "gpt of width 8 on python with soap: 2 stages" in " ".join(capsys.readouterr().out.split())
    for name in ("pipeline", "sequential"):
        assert len([m for m in metrics(tmp_path) if m["run"] == name and m["event"] == "step"]) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("short_texts")
def test_compare_takes_an_optimizer_and_texts(tmp_path: Path) -> None:
    options = ["--optimizer", "adamw", "--past", "blend,latest", "--seeds", "1", *ALONE]
    assert run("compare", *GPT, *options, "--out", str(tmp_path)) == 0
    assert set(json.loads((tmp_path / "summary.json").read_text())["results"]) == {"blend", "latest"}
    assert config(tmp_path)["optimizer"] == "adamw"


def test_text_is_cut_into_examples_and_the_bytes_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.arange(300) % 256
    monkeypatch.setattr(data, "python_sources", lambda: (text, text + 0))
    loaded = data.load("python", Path())
    assert loaded.train_x.shape == loaded.train_y.shape == (4, data.CONTEXT)
    assert torch.equal(loaded.train_x.flatten(), text[:256])
    assert torch.equal(loaded.train_y.flatten(), text[1:257])
    assert loaded.classes == 256


def test_pythons_own_library_is_found() -> None:
    train, test = data.python_sources()
    assert train.dtype == test.dtype == torch.int64
    assert len(train) > len(test) > 10_000
    assert 0 <= int(train.min()) <= int(train.max()) < 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt", "--data", "digits"], "gpt takes texts"),
        (["--model", "mlp", "--data", "python"], "mlp takes square images"),
        (["--model", "mlp", "--optimizer", "soap", "--momentum", "0.5"], "--momentum is sgd's and muon's"),
        (["--model", "mlp", "--optimizer", "muon", "--past", "momentum"], "--past momentum extrapolates sgd's"),
        (["--model", "mlp", "--optimizer", "soap", "--executor", "graphs"], "cannot those of soap"),
        (["--model", "mlp", "--optimizer", "adagrad"], "'adagrad' is not one of"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "train", *arguments, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
