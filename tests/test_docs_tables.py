"""The tables of the documents are those that the measurements give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("sklearn")

from bench import tables


@pytest.mark.parametrize("path", tables.documents(), ids=lambda path: path.name)
def test_a_documents_tables_are_what_the_measurements_give(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert tables.written(text) == text, "python -m bench.tables"


def test_a_figure_that_was_changed_by_hand_is_put_right() -> None:
    text = next(path for path in tables.documents() if path.name == "study.md").read_text(encoding="utf-8")
    marked = tables.MARKED.search(text[text.index("table: accuracy") - 10 :])
    assert marked is not None
    changed = text.replace("81.1 ± 1.5", "86.1 ± 0.5")
    assert changed != text
    assert tables.written(changed) == text


def test_no_mark_is_left_open() -> None:
    for path in tables.documents():
        text = path.read_text(encoding="utf-8")
        assert (
            len(re.findall("<!-- table:", text))
            == len(re.findall("<!-- end of table -->", text))
            == len(tables.MARKED.findall(text))
        ), path


def test_a_table_of_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(KeyError, match="magic"):
        tables.written("<!-- table: magic -->\n<!-- end of table -->")
