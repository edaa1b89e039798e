"""The command line, as tests run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerpipe.cli import main

SMALL = ["--model", "mlp", "--width", "2", "--steps", "25", "--warmup", "5", "--batch-size", "16", "--lr", "0.05"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert isinstance(end.value.code, int)
    return end.value.code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of a mistake: one line, and status 2."""
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("layerpipe: ")
    assert error.count("\n") == 1
    return error


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
