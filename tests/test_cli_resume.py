"""``layerpipe train --resume``: interrupted runs go on bit for bit."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from layerpipe import checkpoint

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from layerpipe.cli import main
from layerpipe.cli.config import TrainConfig
from layerpipe.cli.progress import TrainingBar
from layerpipe.cli.training import Step
from layerpipe.errors import UsageError
from tests import forks
from tests.cli_runs import SMALL, metrics, refused, run


def final_state(path: Path, run: str = "pipeline") -> dict[str, Any]:
    return checkpoint.read(path / f"{run}.checkpoint")


def assert_same_run(a: Path, b: Path) -> None:
    """Losses, accuracies and the last checkpoint, bit for bit."""
    for name in ("pipeline", "sequential"):
        said = [[(m["event"], m["step"], m.get("loss"), m.get("accuracy"), m.get("lr")) for m in metrics(path)
                 if m["run"] == name and m["event"] in ("step", "test")] for path in (a, b)]  # fmt: skip
        assert said[0] == said[1]
        one, two = final_state(a, name), final_state(b, name)
        assert one["versions"] == two["versions"]
        assert one["measured"] == two["measured"]
        for key, value in one["model"].items():
            assert torch.equal(value, two["model"][key]), key
        for mine, theirs in zip(one["optimizer"]["stages"], two["optimizer"]["stages"], strict=True):
            for index, state in mine["state"].items():
                for key, value in state.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][index][key])), key


CHECKPOINTED = ["--checkpoint-every", "7", "--past", "blend", "--stages", "3"]


@pytest.mark.slow
@pytest.mark.parametrize(("when", "optimizer"), [(9, "sgd"), (24, "sgd"), (9, "muon"), (16, "soap")])
def test_a_resumed_run_is_the_one_that_was_not_interrupted(
    when: int, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*SMALL, *CHECKPOINTED, "--optimizer", optimizer]
    assert run("train", *options, "--out", str(tmp_path / "whole")) == 0

    class Crash(Exception):
        pass

    def crash(bar: TrainingBar, step: Step) -> None:
        if step.step == when:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(TrainingBar, "step", crash)
        with pytest.raises(Crash):
            main(["train", *options, "--out", str(tmp_path / "resumed")])
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"run": "pipeline", "ev')  # killed while it wrote
    asked = json.loads((tmp_path / "resumed" / "config.json").read_text())
    for option in ("split_backward", "channels_last", "checksum"):  # begun by a version without them
        del asked[option]
    (tmp_path / "resumed" / "config.json").write_text(json.dumps(asked))
    assert run("train", "--resume", str(tmp_path / "resumed")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    for name in ("loss.png", "past_weights.png", "timeline.png"):
        assert (tmp_path / "resumed" / name).exists()


def silent(arguments: list[str], _: Any) -> None:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        main(arguments)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_the_one_that_was_not(tmp_path: Path) -> None:
    arguments = [*SMALL, *CHECKPOINTED, "--steps", "120"]
    assert run("train", *arguments, "--out", str(tmp_path / "whole")) == 0
    out, kills = tmp_path / "killed", 0
    command = ["train", *arguments, "--out", str(out)]
    while kills < 3:
        process, _ = forks.start(silent, command)
        seen = (out / "pipeline.checkpoint").stat().st_mtime_ns if kills else 0
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            file = out / "pipeline.checkpoint"
            if file.exists() and file.stat().st_mtime_ns > seen:
                break
            time.sleep(0.005)
        process.kill()
        process.join()
        kills += 1
        command = ["train", "--resume", str(out)]
    assert run("train", "--resume", str(out)) == 0
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "none"], "config.json cannot be read"),
        (["--resume", "plain"], "started without --checkpoint-every"),
        (["--resume", "plain", "--lr", "0.1", "--batch-size", "4"], "leave out --lr, --batch-size"),
        (["--resume", "newer"], "config.json has lookahead, which this version does not know"),
        (["--resume", "comparison"], "a run of layerpipe compare, which cannot go on"),
        (["--resume", "typed"], "config.json has stages='three'"),
        (["--resume", "list"], "its config.json holds no options"),
        (["--resume", "noise"], "noise/metrics.jsonl has lines that are not of a run"),
    ],
    ids=str,
)
def test_what_cannot_be_resumed_is_said(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    runs: dict[str, dict[str, Any]] = {
        "plain": {},
        "newer": {"lookahead": 2},
        "comparison": {"past": ["blend"], "seeds": 3},
        "typed": {"stages": "three"},
        "noise": {"checkpoint_every": 5, "model": "mlp"},
    }
    for name, more in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**TrainConfig().to_json(), **more}))
    (tmp_path / "noise" / "metrics.jsonl").write_text("[1]\n")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    assert message in refused(capsys, "train", *arguments)


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    assert run("train", *SMALL, *CHECKPOINTED, "--no-baseline", "--out", str(path)) == 0
    before = (path / "metrics.jsonl").read_bytes()
    config = json.loads((path / "config.json").read_text())
    del config["checksum"]
    (path / "config.json").write_text(json.dumps({**config, "past": "stash"}))
    capsys.readouterr()
    assert run("train", "--resume", str(path)) == 2
    assert "past" in capsys.readouterr().err
    assert (path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": "many"}, {"past": 5}, {"max_norm": "x"}, {"at": 3}, {"at": [3]}, {"lr_schedule": "foo"},
        {"checkpoint_every": "x"}, {"lr": True}, {"data_dir": 1}, {"width": 2.5},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_config_cannot_hold_is_named(wrong: dict[str, Any]) -> None:
    (name, value), *_ = wrong.items()
    with pytest.raises(UsageError, match=re.escape(f"config.json has {name}={value!r}, which cannot be")):
        TrainConfig.from_json({**TrainConfig().to_json(), **wrong})
    whole = TrainConfig(at=("a", "b"), max_norm=1, steps=5)
    assert TrainConfig.from_json(json.loads(json.dumps(whole.to_json()))) == whole
