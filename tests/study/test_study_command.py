"""``layerpipe study`` as a person uses it: a tiny study, interrupted, gone on with, and its page opened."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from layerpipe.cli import main
from layerpipe.study import runner

TINY = [
    "study", "--model", "mlp", "--width", "1", "--steps", "12", "--warmup", "2", "--batch-size", "8", "--stages", "2,3",
    "--optimizer", "adamw", "--method", "stash,blend", "--schedule", "lockstep", "--seeds", "3", "--lr", "0.01,1e30",
    "--processes", "1",
]  # fmt: skip


def study(path: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as end:
        main([*TINY, "--out", str(path), *more])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("study")
    assert study(path) == 0
    return path


class Page(HTMLParser):
    """What a browser would make of it: tags, text, and anything that it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.meta: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attributes}
        names = ("src", "href", "xlink:href")
        self.fetched += [values[name] for name in names if name in values and not values[name].startswith("#")]
        if tag == "meta":
            self.meta[values.get("name", "charset")] = values.get("content", values.get("charset", ""))
        if tag in ("section", "table", "svg", "pre"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("section", "table", "svg", "pre"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_page_that_needs_nothing_else(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    assert not page.open
    assert not page.fetched
    assert page.meta["viewport"] == "width=device-width, initial-scale=1"
    assert page.tags.count("svg") >= 3
    assert "script" not in page.tags
    assert "layerpipe study --model mlp" in page.text
    for words in ("To reproduce", "seeds", "hours of one core", "weight stashing", "undelayed"):
        assert words in page.text


def test_a_browser_shows_the_report(finished: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no headless browser")
    image = tmp_path / "report.png"
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
        "--window-size=390,800", f"--screenshot={image}", f"file://{finished}/report.html",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    from matplotlib import pyplot as plt

    pixels = plt.imread(image)
    assert pixels.shape[:2] == (800, 390)
    assert 0.01 < (pixels[..., :3].mean(-1) < 0.9).mean() < 0.5  # neither blank nor dark


def test_tables_are_the_same_in_all_forms(finished: Path) -> None:
    file = next(finished.glob("01-*.csv"))
    rows = list(csv.reader(file.open()))
    assert len(rows) == 1 + 1 + 4  # the head, AdamW without a delay, two methods in two and three stages
    markdown = (finished / "tables.md").read_text()
    page = Page((finished / "report.html").read_text())
    for row in rows:
        assert "| " + " | ".join(row) + " |" in markdown
        assert all(cell in page.text for cell in row)
    assert {row[3] for row in rows[1:]} == {"0.01*"}  # the other learning rate diverges


def test_a_study_goes_on_where_it_was_interrupted(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []
    real = runner.run

    def counted(trial, root):  # type: ignore[no-untyped-def]
        if len(trained) == 14:
            raise KeyboardInterrupt
        trained.append(trial.key)
        return real(trial, root)

    path = tmp_path / "study"
    monkeypatch.setattr(runner, "run", counted)
    assert study(path) == 130
    assert "Interrupted" in capsys.readouterr().out
    assert len(list((path / "trials").iterdir())) == 14
    monkeypatch.setattr(runner, "run", lambda trial, root: trained.append(trial.key) or real(trial, root))
    assert study(path) == 0
    assert len(trained) == len(set(trained)) == 10 + 15  # two learning rates of five rows, three seeds of each
    assert (path / "tables.md").read_text() == (finished / "tables.md").read_text()
    assert len(json.loads((path / "study.json").read_text())["sittings"]) == 2
    assert study(path, "--seeds", "4") == 0
    assert len(trained) == 10 + 15 + 5


def test_processes_give_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    fewer = ["--method", "stash", "--stages", "2", "--seeds", "1", "--lr", "0.01"]
    assert study(tmp_path / "study", "--processes", "2", *fewer) == 0
    files = list((tmp_path / "study" / "trials").iterdir())
    assert len(files) == 2
    for file in files:
        ours, theirs = (json.loads(each.read_text())["outcome"] for each in (file, finished / "trials" / file.name))
        assert str(ours["curve"]) == str(theirs["curve"])
        assert str(ours["quality"]) == str(theirs["quality"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "two"], "--stages 'two' is not whole numbers"),
        (["--stages", "40"], "cannot split"),
        (["--lr", "fast"], "--lr 'fast'"),
        (["--model", "gpt"], "gpt takes texts"),
        (["--method", "magic"], "method 'magic' is unknown"),
    ],
)
def test_a_study_that_cannot_be_is_refused_before_anything_is_written(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study"
    assert study(path, *options, "--data", "digits") == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("")
    assert study(tmp_path) == 2
    assert "holds something that is no study" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1
