"""A checkpoint in a directory: whole at any moment, refused if damaged, and an ordinary state_dict for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import layerpipe
from layerpipe import sharded
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import pipeline

DATA = minibatches(16)


def trained(pipe: layerpipe.Pipeline, begin: int, end: int) -> dict[str, Any]:
    for x, y in DATA[begin:end]:
        pipe.step(x, y)
    pipe.drain()
    return {name: value.clone() for name, value in pipe.state_dict().items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def written(path: Path, **options: Any) -> dict[str, Any]:
    """A checkpoint after 9 minibatches; the weights after 16."""
    with pipeline(chain(4), **options) as pipe:
        for x, y in DATA[:9]:
            pipe.step(x, y)
        pipe.checkpoint(path, sharded=True, note={"lr": torch.tensor(0.1), "names": ["a"]})
        return trained(pipe, 9, 16)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "max_norm": 0.3, "max_norm_of": "network"}])
def test_a_resumed_run_is_the_one_that_goes_on_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = written(tmp_path / "run", **options)
    with pipeline(chain(4, seed=7), executor="threads", **options) as pipe:
        extra = pipe.resume(tmp_path / "run")
        assert same(trained(pipe, 9, 16), expected)
    assert extra == {"note": {"lr": torch.tensor(0.1), "names": ["a"]}}


def test_its_weights_are_an_ordinary_state_dict(tmp_path: Path) -> None:
    with pipeline(chain(4)) as pipe:
        expected = trained(pipe, 0, 9)
        pipe.checkpoint(tmp_path / "directory", sharded=True)
        pipe.checkpoint(tmp_path / "file.pt")
    for name in ("directory", "file.pt"):
        found = layerpipe.state_dict_of(tmp_path / name)
        assert same(found, expected)
        torch.nn.Sequential(*chain(4, seed=3)).load_state_dict(found)


def test_the_one_before_is_read_where_somebody_was_stopped_between_the_two(tmp_path: Path) -> None:
    path = tmp_path / "run"
    expected = written(path)
    path.rename(tmp_path / "run.old")
    (tmp_path / "run.partial").mkdir()
    with pipeline(chain(4, seed=7)) as pipe:
        pipe.resume(path)
        pipe.checkpoint(path, sharded=True)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["run"]
        assert same(trained(pipe, 9, 16), expected)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "layerpipe.json"])
def test_a_changed_byte_is_refused_and_nothing_loaded(tmp_path: Path, name: str) -> None:
    written(tmp_path / "run")
    data = bytearray((tmp_path / "run" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "run" / name).write_bytes(data)
    with pipeline(chain(4, seed=7)) as pipe:
        before = {key: value.clone() for key, value in pipe.state_dict().items()}
        with pytest.raises(layerpipe.CheckpointError, match=r"run is (damaged|no checkpoint)"):
            pipe.resume(tmp_path / "run")
        assert same(pipe.state_dict(), before)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run"
    written(path)
    for stages, options, said in (
        (chain(5), {}, "of 4 stages and schedule 'lockstep', this pipeline has 5"),
        ([*chain(4)[:3], torch.nn.Linear(6, 5)], {}, "differs in 3.bias, 3.weight"),
        (chain(4), {"past": "stash"}, "past='blend'"),
        (chain(4), {"accumulate": 3}, "accumulate=1"),
    ):
        with pipeline(stages, **options) as pipe, pytest.raises(layerpipe.CheckpointError, match=said):
            pipe.resume(path)
    with pipeline() as pipe:
        with pytest.raises(FileNotFoundError):
            pipe.resume(tmp_path / "none")
        (tmp_path / "file").touch()
        with pytest.raises(layerpipe.CheckpointError, match="is a file"):
            pipe.checkpoint(tmp_path / "file", sharded=True)
        with pytest.raises(ValueError, match="its path in every process"):
            pipe.checkpoint(None, sharded=True)


def test_what_could_not_be_read_again_is_refused_and_the_one_before_stays(tmp_path: Path) -> None:
    path = tmp_path / "run"
    expected = written(path)
    with pipeline(chain(4)) as pipe, pytest.raises(TypeError, match="would not be readable"):
        pipe.checkpoint(path, sharded=True, function=written)
    with pipeline(chain(4, seed=7)) as pipe:
        pipe.resume(path)
        assert same(trained(pipe, 9, 16), expected)


def test_a_structure_of_everything_is_the_same_again() -> None:
    value = {"a": [torch.arange(3), (1, 2.5, None)], 3: {"b": torch.tensor(True)}, "c": "text"}
    again = sharded.unpacked("x", sharded.packed("x", value))
    assert torch.equal(again["a"][0], value["a"][0])  # type: ignore[index,call-overload]
    assert again["a"][1] == (1, 2.5, None)
    assert bool(again[3]["b"])
    assert again["c"] == "text"
