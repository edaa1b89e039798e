"""``layerpipe plan`` as a person uses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from layerpipe.cli.plan import quantity
from tests.cli_runs import refused, run

SMALL = ["plan", "mlp", "--set", "depth=5", "--set", "width=4", "--batch-size", "8"]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, "--stages", "3", "--derivation") == 0
    printed = capsys.readouterr().out
    for word in (
        "Stages",
        "Memory",
        "blend",
        "gpipe",
        "layerpipe",
        "speed-up",
        "layerpipe.split(model, 3, at=[",
        "delayed LMS",
        "lockstep",
    ):
        assert word in printed


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, "--stages", "3", "--schedule", "1f1b", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["delay"] for stage in found["stages"]] == [2, 1, 0]
    assert found["schedules"]["1f1b"]["staleness"] == [2, 1, 0]


@pytest.mark.parametrize(("stages", "drawn"), [(3, {"delays", "schedules", "memory"}), (10, {"schedules", "memory"})])
def test_plots_and_trace(stages: int, drawn: set[str], tmp_path: Path) -> None:
    out, trace = tmp_path / "plots", tmp_path / "more" / "trace.json"
    options = ["--set", "depth=10", "--stages", str(stages), "--plot", str(out), "--trace", str(trace)]
    assert run(*SMALL, *options) == 0
    assert {path.stem for path in out.glob("*.png")} == drawn
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    events = json.loads(trace.read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"sequential", "gpipe", "1f1b", "lockstep", "layerpipe"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "resnet99"], "model 'resnet99' is unknown; there are: resnet18"),
        (["plan", "torch.nn:Linear"], "--input 3,224,224"),
        ([*SMALL, "--stages", "40"], "cannot cut into 40 stages"),
        ([*SMALL, "--memory-per-stage", "lots"], "--memory-per-stage 'lots' is not a positive number"),
        ([*SMALL, "--memory-per-stage", "1"], "kB would do"),
        ([*SMALL, "--memory-per-stage", ""], "--memory-per-stage '' is not a positive number"),
        ([*SMALL, "--link-latency", "inf"], "'--link-latency': inf is not a finite number"),
        (["plan", "mlp", "--set", "width=-1"], "mlp cannot be made with width=-1, which is not more than 0"),
        (["plan", "mlp", "--set", f"width={10**30}"], "mlp cannot be made with width=1"),
        (["plan", "gpt2", "--set", f"layers={10**30}"], "which is more than 10000"),
        (["plan", "gpt2", "--set", "layers=-1"], "gpt2 cannot be made with layers=-1, which is not more than 0"),
        (["plan", "mlp", "--input", str(10**30)], "no minibatch of 32 examples of 1"),
        (["plan", "mlp", "--batch-size", str(10**30)], "--batch-size"),
        (["plan", "mlp", "--accumulate", str(10**9)], "--accumulate"),
        (["plan", "mlp", "--set", "width=wide"], "mlp cannot be made with width='wide': "),
        (["plan", ":build"], "model ':build' is unknown"),
        ([*SMALL, "--set", "depth"], "--set 'depth' is not name=value"),
        ([*SMALL, "--input", "3x4"], "--input '3x4' is not a shape"),
        ([*SMALL, "--input", "3:colour"], "is not a shape like"),
        ([*SMALL, "--past", "momentum", "--momentum", "0"], "needs a momentum"),
    ],
)
def test_mistakes_end_with_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *arguments)


def test_a_model_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\n"
        "def build(width=8):\n"
        "    return nn.Sequential(nn.Linear(6, width), nn.Linear(width, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run("plan", "my_net:build", "--set", "width=5", "--input", "6", "--stages", "2", "--json") == 0
    assert sum(s["parameters"] for s in json.loads(capsys.readouterr().out)["stages"]) == 6 * 5 + 5 + 5 * 2 + 2


def test_a_model_beyond_torch_fx(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["plan", "tests.engine.exported_models:ShapedGPT", "--set", "layers=1", "--input", "6:int64"]
    assert run(*model, "--batch-size", "2", "--stages", "2", "--json") == 0
    layers = [name for stage in json.loads(capsys.readouterr().out)["stages"] for name in stage["layers"]]
    assert layers[:3] == ["tokens", "positions", "blocks.0.ln1"]
    error = refused(capsys, "plan", "tests.engine.test_exported:OnValues", "--input", "4")
    assert "torch.export: Could not guard on data-dependent" in error
    assert "give the stages by hand" in error


def test_quantities() -> None:
    assert quantity("16G", "--x") == 16e9
    assert quantity("1.5t", "--x") == 1.5e12
    assert quantity("200", "--x") == 200
