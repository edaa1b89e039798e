"""A checkpoint or a run's directory that is damaged is refused in one clear line, and is left as it was."""

from __future__ import annotations

import random
import resource
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
    "a random state of another length": (lambda c: c["random"].update(torch=torch.zeros(3).byte()), "no checkpoint"),
    "no NumPy": (lambda c: c["random"].pop("numpy"), "KeyError 'numpy'"),
    "fewer stages measured": (lambda c: c["measured"].pop(), "'measured' are of 2 stages"),
    "fewer random numbers": (lambda c: c["random_of_stages"].pop(), "'random_of_stages' are of 2 stages"),
    "no optimizer's stages": (lambda c: c["optimizer"].pop("stages"), "KeyError 'stages'"),
    "an optimizer less": (lambda c: c["optimizer"]["stages"].pop(), "the state is of 2 stages"),
    "a group less": (lambda c: c["optimizer"]["stages"][1]["param_groups"].pop(), "group"),
    "a group that is no dict": (lambda c: c["optimizer"]["options"].__setitem__(0, 5), "holds what no checkpoint"),
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
