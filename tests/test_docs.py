"""README and docs: every block of Python runs, every link leads somewhere, every result is quoted.

The blocks of a page run one after the other and share their names, beside a small network, its data, and what a reader
has imported. A fence of ``python no-run`` is not run; they are counted.
"""

from __future__ import annotations

import contextlib
import doctest
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from bench import headlines

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Blocks that need several processes, a device or a package that the tests do without.
NOT_RUN = {"distributed.md": 3, "executors.md": 1, "optimizers.md": 1}


class Block(NamedTuple):
    line: int  # of its first line of code
    code: str
    runs: bool


def blocks(page: Path) -> list[Block]:
    found = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(?:python|pycon)(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        assert match[1].strip() in ("", "no-run"), f"{page.name}: a fence says {match[1]!r}"
        found.append(Block(text[: match.start(2)].count("\n") + 1, match[2], not match[1].strip()))
    return found


def network() -> dict[str, Any]:
    """What a page's code is about: a model, its data and a pipeline's arguments."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), *model, nn.Linear(8, 8))
    loader = [(torch.randn(16, 8), torch.randn(16, 8)) for _ in range(8)]
    return {
        "model": model, "x": loader[0][0], "loader": loader, "microbatches": loader, "param": model[0].weight,
        "loss_fn": F.mse_loss, "optimizer": lambda params, **past: lk.SGD(params, lr=0.1, **past),
        "stages": layerpipe.split(model, stages=4, example_inputs=(loader[0][0],)),
    }  # fmt: skip


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A group of one process, as torchrun makes it, once a page asks for one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            patch.setenv(name, value)
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    names: dict[str, Any] = {
        "torch": torch, "nn": nn, "F": F, "Path": Path, "layerpipe": layerpipe, "lk": lk,
    }  # fmt: skip
    with one_process():
        for block in blocks(page):
            if not block.runs:
                continue
            names.update(network())
            if "pipe." in block.code and "pipe = " not in block.code:
                names["pipe"] = layerpipe.Pipeline(names["stages"], F.mse_loss, names["optimizer"])
            if block.code.startswith(">>>"):
                run_dialogue(page, block, names)
            else:
                exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
            for pipe in [value for value in names.values() if isinstance(value, layerpipe.Pipeline)]:
                pipe.close()


def run_dialogue(page: Path, block: Block, names: dict[str, Any]) -> None:
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(block.code, {}, page.name, str(page), block.line)
    test.globs = names
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test, out=said.append, clear_globs=False)
    assert not said, "".join(said)


def test_blocks_that_do_not_run_are_counted() -> None:
    found = {page.name: sum(not block.runs for block in blocks(page)) for page in PAGES}
    assert {name: count for name, count in found.items() if count} == NOT_RUN


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "bench/results/README.md"], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name} links to {target}"


def test_every_result_is_quoted_and_every_run_that_is_quoted_exists() -> None:
    pages = [*PAGES, ROOT / "bench/results/README.md"]
    quoted: dict[str, set[str]] = {}
    for page in pages:
        for file, run in re.findall(
            r"\((?:[a-z./]*/)?([\w.-]+\.json)(?: \"([^\"]+)\")?\)", page.read_text(encoding="utf-8")
        ):
            quoted.setdefault(file, set()).add(run)
    files = {file.name: json.loads(file.read_text()) for file in (ROOT / "bench/results").glob("*.json")}
    assert sorted(quoted) == sorted(files)
    for file, content in files.items():
        runs = content.get("runs")
        assert quoted[file] - {""} == (set(runs) if isinstance(runs, dict) else set()), file


def test_the_first_rows_of_measured_are_what_the_results_say() -> None:
    page = headlines.PAGE.read_text(encoding="utf-8")
    rows = headlines.headlines()
    assert headlines.replaced(page, rows) == page, "run python -m bench.headlines --write"
    assert all((headlines.DOCS / "headlines" / f"{row.name}.png").exists() for row in rows)


@pytest.mark.slow
def test_the_api_reference_has_all_public_names(tmp_path: Path) -> None:
    pdoc = pytest.importorskip("pdoc")
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("layerpipe", "layerpipe_kernels", output_directory=tmp_path)
    for library in (layerpipe, lk):
        page = (tmp_path / f"{library.__name__}.html").read_text(encoding="utf-8")
        for name in library.__all__:
            assert f'id="{name}"' in page or f'href="{library.__name__}/{name}.html"' in page, name
