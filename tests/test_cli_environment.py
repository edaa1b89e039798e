"""The command line as a process: where its output goes, what it is called, a model and data of the user's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from layerpipe import __version__
from layerpipe.cli import main

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = [sys.executable, "-m", "layerpipe"]
PLAN = ["plan", "mlp", "--set", "width=2", "--stages", "3"]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **more}


def test_a_terminal_of_ascii_gets_something_like_each_character() -> None:
    ended = subprocess.run(
        [*PROGRAM, *PLAN, "--derivation"], env=environment(PYTHONIOENCODING="ascii"), capture_output=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout.isascii()
    assert b"lockstep" in ended.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_disk_under_the_output_is_one_line_and_status_1() -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([*PROGRAM, *PLAN], env=environment(), stdout=full, stderr=subprocess.PIPE, timeout=200)
    assert (ended.returncode, ended.stderr) == (1, b"layerpipe: No space left on device\n")


def test_the_version_is_said_by_the_module() -> None:
    ended = subprocess.run([*PROGRAM, "--version"], env=environment(), capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"layerpipe {__version__}, torch ")


def test_the_version_is_said_by_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"layerpipe {__version__}, torch ")


def test_the_model_and_data_of_the_document_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(# mine\.py.*?)```", text, re.DOTALL)
    command = re.search(r"^layerpipe (train --model mine:make_model .*)$", text, re.MULTILINE)
    assert len(blocks) == 1
    assert command is not None
    (tmp_path / "mine.py").write_text(blocks[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit) as end:
        main([*command.group(1).split(), "--executor", "serial", "--out", "run"])
    assert end.value.code == 0
    losses = [
        line["loss"]
        for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if line["event"] == "step" and line["run"] == "pipeline"
    ]
    assert len(losses) == 200
    assert sum(losses[-20:]) < sum(losses[:20])
