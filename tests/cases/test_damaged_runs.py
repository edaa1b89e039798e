"""A checkpoint or a run's directory that is damaged is refused in one clear line, and is left as it was."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layerpipe
from layerpipe import checkpoint
from layerpipe.errors import CheckpointError
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import pipeline


def written(path: Path) -> Path:
    with pipeline(chain(3)) as pipe:
        for x, y in minibatches(7):
            pipe.step(x, y)
        pipe.checkpoint(path, step=7)
    return path


def state(pipe: layerpipe.Pipeline) -> Any:
    return checkpoint.random_state()["torch"].tolist(), [
        (group["lr"], group.get("updates"), [value.tolist() for value in pipe.state_dict().values()])
        for group in pipe.optimizer.param_groups
    ]


def refused(path: Path, message: str) -> None:
    with pipeline(chain(3)) as pipe:
        before = state(pipe)
        with pytest.raises(CheckpointError, match=message) as caught:
            pipe.resume(path)
        assert str(path) in str(caught.value)
        assert state(pipe) == before


def test_no_single_flipped_bit_is_taken(tmp_path: Path) -> None:
    path, chance = written(tmp_path / "c.pt"), random.Random(0)
    whole = path.read_bytes()
    for _ in range(200):
        at, bit = chance.randrange(len(whole)), chance.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"c\.pt is (damaged|no checkpoint)"):
            checkpoint.read(path)


@pytest.mark.parametrize("length", [0, 1, 50, 1000, -1, -64, -71, -200], ids=str)
def test_a_file_that_was_cut_off_is_refused(length: int, tmp_path: Path) -> None:
    path = written(tmp_path / "c.pt")
    path.write_bytes(path.read_bytes()[:length])
    refused(path, r"c\.pt is (damaged|no checkpoint)")


def test_a_file_that_grew_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "c.pt")
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    refused(path, r"c\.pt is damaged")


def older(path: Path) -> Path:
    """As files were written before they had a checksum of their own."""
    torch.save({**checkpoint.read(written(path)), "layerpipe": 1}, path)
    return path


def test_a_file_without_a_checksum_is_held_to_those_of_its_archive(tmp_path: Path) -> None:
    path = older(tmp_path / "c.pt")
    with pipeline(chain(3)) as pipe:
        assert pipe.resume(path) == {"step": 7}
    whole, weight = path.read_bytes(), checkpoint.read(path)["model"]["0.0.weight"].numpy().tobytes()
    at = whole.index(weight) + 5
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    refused(path, r"damaged: .*data/\d+ does not have the checksum that it was written with")


def test_a_new_file_that_lost_its_checksum_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "c.pt")
    torch.save(checkpoint.read(path), path)
    refused(path, "its checksum is missing")


Change = Callable[[dict[str, Any]], Any]
CHANGES: dict[str, tuple[Change, str]] = {
    "no model": (lambda c: c.pop("model"), "'model' is missing"),
    "no optimizer": (lambda c: c.pop("optimizer"), "'optimizer' is missing"),
    "a number for the random state": (lambda c: c.update(random=3), "'random' is missing or no dict"),
    "a random state of another length": (
        lambda c: c["random"].update(torch=torch.zeros(3).byte()),
        "no state of random",
    ),
    "no NumPy": (lambda c: c["random"].pop("numpy"), "no state of random numbers: KeyError 'numpy'"),
    "fewer stages measured": (lambda c: c["measured"].pop(), "'measured' are not of 3 stages"),
    "fewer random numbers": (lambda c: c["random_of_stages"].pop(), "'random_of_stages' are not of 3 stages"),
    "gradients that are a number": (lambda c: c.update(accumulated=[1, 2, 3]), "'accumulated' are no"),
    "a text for a version": (lambda c: c["versions"].__setitem__(1, "x"), "'versions' are no"),
    "no optimizer's stages": (lambda c: c["optimizer"].pop("stages"), "optimizer's 'stages' are missing"),
    "an optimizer less": (lambda c: c["optimizer"]["stages"].pop(), "the state is of 2 stages"),
    "a group less": (lambda c: c["optimizer"]["stages"][1]["param_groups"].pop(), "group"),
    "a group that is no dict": (
        lambda c: c["optimizer"]["options"].__setitem__(0, 5),
        "'options' are missing or no dict",
    ),
    "a weight of another shape": (lambda c: c["model"].update({"2.bias": torch.zeros(4)}), "differs in 2.bias"),
    "a weight of another dtype": (lambda c: c["model"].update({"2.bias": torch.zeros(3).double()}), "differs in 2.b"),
    "a weight that is no tensor": (lambda c: c["model"].update({"2.bias": 3}), "differs in 2.bias"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_with_other_things_in_it_is_refused_whole(name: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    content = checkpoint.read(written(tmp_path / "c.pt"))
    change(content)
    checkpoint.write(tmp_path / "c.pt", {k: v for k, v in content.items() if k != "layerpipe"})
    refused(tmp_path / "c.pt", message)


def test_a_disk_that_is_full_says_so_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = written(tmp_path / "c.pt")
    whole = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pipeline(chain(3)) as pipe:
        try:
            pipe.checkpoint(tmp_path / "other.pt")
            most = (tmp_path / "other.pt").stat().st_size
            (tmp_path / "other.pt").unlink()
            for size in (10, 700, 5_000, most - 1):
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
                with pytest.raises(OSError, match="File too large"):
                    pipe.checkpoint(path)
                assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == whole


# -- directories of runs ---------------------------------------------------------------------------------------------

OPTIONS = ["--model", "mlp", "--width", "2", "--steps", "12", "--warmup", "3", "--batch-size", "16", "--lr", "0.05",
           "--stages", "2", "--checkpoint-every", "5", "--executor", "serial"]  # fmt: skip
FILES = ["config.json", "metrics.jsonl", "pipeline.checkpoint", "sequential.checkpoint"]


def ran(*arguments: str) -> int:
    pytest.importorskip("typer")
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    from layerpipe.cli import main

    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended in its second training, after a checkpoint of each, and what it would have come to."""
    from layerpipe.cli.progress import TrainingBar

    root = tmp_path_factory.mktemp("runs")
    assert ran("train", *OPTIONS, "--out", str(root / "whole")) == 0

    class Crash(Exception):
        pass

    def crash(bar: Any, step: Any) -> None:
        if step.step == 8 and bar._name == "sequential":
            raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingBar, "step", crash)
        with pytest.raises(Crash):
            cli_main(["train", *OPTIONS, "--out", str(root / "run")])
    for picture in (root / "run").glob("*.png"):
        picture.unlink()
    return root / "run"


def cli_main(arguments: list[str]) -> None:
    from layerpipe.cli import main

    main(arguments)


def losses(path: Path) -> list[Any]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return sorted(
        (line["run"], line["event"], line["step"], line.get("loss"), line.get("accuracy"))
        for line in lines
        if line["event"] in ("step", "test")
    )


def content(path: Path) -> dict[str, bytes | str]:
    return {file.name: file.read_bytes() if file.is_file() else "directory" for file in path.iterdir()}


def bits(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    count = chance.choice([1, 1, 1, 2, 20])
    for _ in range(count):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return f"{count} flipped bits"


def shortened(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    path.write_bytes(data[: chance.choice([0, 1, chance.randrange(len(data)), len(data) - chance.randint(1, 80)])])
    return "cut off"


def zeroed(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.choice([16, 512, 4096]))
    path.write_bytes(data[:start] + b"\0" * (end - start) + data[end:])
    return "zeroed"


def moved(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    at, size = chance.randrange(len(data)), chance.randint(1, 40)
    path.write_bytes(data[:at] + data[at + size :] if chance.random() < 0.5 else data[:at] + b"x" * size + data[at:])
    return "shifted"


def gone(path: Path, chance: random.Random) -> str:
    path.unlink()
    kind = chance.choice(["nothing", "a directory", "a loop", "noise"])
    if kind == "a directory":
        path.mkdir()
    elif kind == "a loop":
        path.symlink_to(path)
    elif kind == "noise":
        path.write_bytes(chance.randbytes(500))
    return f"{kind} in its place"


def swapped(path: Path, chance: random.Random) -> str:
    other = path.with_name(chance.choice([name for name in FILES if name != path.name]))
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)
    return f"swapped with {other.name}"


def lines_changed(path: Path, chance: random.Random) -> str:
    path = path.with_name("metrics.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    kind, at = (
        chance.choice(["dropped", "twice", "exchanged", "another value", "nested", "no JSON"]),
        chance.randrange(12),
    )
    if kind == "dropped":
        del lines[at]
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "exchanged":
        lines[at], lines[at + 1] = lines[at + 1], lines[at]
    elif kind == "another value":
        said = json.loads(lines[at])
        said[chance.choice([*said])] = chance.choice(VALUES)
        lines[at] = json.dumps(said).encode() + b"\n"
    elif kind == "nested":
        lines[at] = b"[" * 100_000 + b"\n"
    else:
        lines[at] = b"\xff\xfe{\n"
    path.write_bytes(b"".join(lines))
    return f"line {at} {kind}"


VALUES = [None, True, -1, 0, 10**9, 10**30, 1e300, float("nan"), float("inf"), -1e-300, "", "x", [], [1], {}, {"a": 1}]


def option_changed(path: Path, chance: random.Random) -> str:
    path = path.with_name("config.json")
    values = json.loads(path.read_text())
    signed = chance.random() < 0.7
    if signed:
        del values["checksum"]  # as earlier versions wrote it
    name, value = chance.choice(sorted(values)), chance.choice(VALUES)
    values[name] = value
    path.write_text(json.dumps(values))
    return f"{name}={value!r}"


def extra_changed(path: Path, chance: random.Random) -> str:
    path = path.with_name(chance.choice(FILES[2:]))
    held = checkpoint.read(path)
    del held["layerpipe"]
    where = chance.choice([held, held["extra"], held["optimizer"], held["random"]])
    name, value = chance.choice(sorted(where)), chance.choice(VALUES)
    where[name] = value
    checkpoint.write(path, held)
    return f"{name}={value!r} in a new {path.name}"


KINDS = [bits, bits, bits, shortened, zeroed, moved, gone, swapped, lines_changed, option_changed, extra_changed]
#: What changes no number of a run: where its data lies, what it was made on, and what is only counted.
HARMLESS = ("data_dir", "environment", "baseline", "executor", "seconds", "measured")


def damaged(interrupted: Path, path: Path, number: int, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """One damage by its number: what it was, and what came of it."""
    chance = random.Random(number)
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(interrupted, path)
    kind, file = chance.choice(KINDS), path / chance.choice(FILES)
    how = f"{kind.__name__} {file.name}: {kind(file, chance)}"
    before = content(path)
    capsys.readouterr()
    status = ran("train", "--resume", str(path))
    error = capsys.readouterr().err
    if status == 0:
        assert losses(path) == losses(interrupted.with_name("whole")), how
        return how, "went on, with the numbers of the whole run"
    assert status == 2, how
    assert error.startswith("layerpipe: "), how
    assert error.count("\n") == 1, how
    assert content(path) == before, how
    return how, error


@pytest.mark.slow
@pytest.mark.parametrize("damages", [16, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_a_damaged_run_is_refused_in_a_line_or_goes_on_with_the_same_numbers(
    damages: int, interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [damaged(interrupted, tmp_path / "run", number, capsys) for number in range(damages)]
    for how, what in found:
        name = how.split(": ", 1)[1].split("=")[0]
        if what.startswith("went on") and "option_changed" in how:
            assert name in HARMLESS or "12" in how or "None" in how, how
    refusals = sum(not what.startswith("went on") for _, what in found)
    assert refusals > 0.8 * damages
    print(f"{damages} damages: {refusals} refused, {damages - refusals} went on with the same numbers")
