"""Replicas times stages: the weights of one process with all minibatches, on whatever mesh and executor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from layerpipe.delays import OnLoss
from tests.distributed import mesh_programs as programs
from tests.distributed.processes import Failure, Processes
from tests.engine.pipelines import pipeline

Shape = tuple[int, int]


@pytest.fixture(autouse=True)
def _one_core() -> None:
    torch.set_num_threads(1)


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in one
    )


@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
@pytest.mark.parametrize("model", ["chain", "dropping"])
def test_threads_in_processes_give_the_weights_of_one_process(two: Processes, schedule: str, model: str) -> None:
    task = (model, {"schedule": schedule})
    expected = programs.train(0, None, "serial", *task)
    for result in two.all(programs.train, (1, 2), "threads", *task):
        assert same_state(result["state"], expected["state"])
        flat = [x for part in result["losses"] for x in (part if isinstance(part, list) else [part])]
        assert [x for x in flat if x is not None] == [
            x for part in expected["losses"] for x in (part if isinstance(part, list) else [part]) if x is not None
        ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "1f1b", "accumulate": 3, "max_norm": 0.2},
        {"max_norm": 0.3, "max_norm_of": "network", "split_backward": True},
        {"delay_policy": OnLoss(window=2, decrease=0.1, rise=0.05)},
    ],
)
def test_two_replicas_of_two_stages_equal_one_with_all_samples(four: Processes, options: dict[str, Any]) -> None:
    """To rounding; both replicas to the bit, and so whoever runs the stages."""
    expected = programs.train(0, None, "serial", "plain", copy.deepcopy(options))  # a policy remembers
    results = four.all(programs.train, (2, 2), "serial", "plain", options)
    assert [(r["replica"], r["own"]) for r in results] == [(0, [0, 1]), (0, [2, 3]), (1, [0, 1]), (1, [2, 3])]
    assert close_state(results[0]["state"], expected["state"])
    for result in results[1:]:
        assert same_state(result["state"], results[0]["state"])
    threads = four.all(programs.train, (2, 2), "threads", "plain", options)
    assert all(same_state(result["state"], results[0]["state"]) for result in threads)


def test_replicas_without_a_cut_are_plain_data_parallel(two: Processes) -> None:
    expected = programs.train(0, None, "serial", "plain", {})
    one, other = two.all(programs.train, (2, 1), "serial", "plain", {})
    assert close_state(one["state"], expected["state"])
    assert same_state(one["state"], other["state"])


def test_replicas_share_the_first_ones_buffers_and_draw_other_numbers(four: Processes) -> None:
    results = four.all(programs.train, (2, 2), "serial", "chain", {})
    assert all(same_state(result["state"], results[0]["state"]) for result in results)
    one, _, other, _ = four.all(programs.train, (2, 2), "threads", "dropping", {})
    assert same_state(one["state"], other["state"])
    again = four.all(programs.train, (2, 2), "serial", "dropping", {})
    assert same_state(one["state"], again[0]["state"])


@pytest.mark.parametrize(("accumulate", "name"), [(1, "run.pt"), (2, "run.pt"), (2, "directory")])
def test_a_checkpoint_of_replicas_goes_on_bit_for_bit(
    four: Processes, tmp_path: Any, accumulate: int, name: str
) -> None:
    task = ("dropping", {"accumulate": accumulate, "max_norm": 0.3, "max_norm_of": "network"}, str(tmp_path / name))
    expected = four.all(programs.half, (2, 2), "serial", *task)
    for result in four.all(programs.rest, (2, 2), "threads", *task):
        assert same_state(result, expected[0])


@pytest.mark.parametrize("name", ["run.pt", "directory"])
def test_a_checkpoint_goes_on_with_another_number_of_replicas(
    four: Processes, two: Processes, tmp_path: Any, name: str
) -> None:
    """The same samples per update, so the same weights to rounding."""
    task = ("plain", {}, str(tmp_path / name))
    expected = four.all(programs.half, (2, 2), "serial", *task)[0]
    assert close_state(programs.rest(0, None, "serial", *task), expected)
    for shape in ((1, 2), (2, 1)):
        assert close_state(two.all(programs.rest, shape, "serial", *task)[0], expected)


@pytest.mark.parametrize("how", ["dies", "raises"])
def test_a_replica_that_fails_stops_all_others(four: Processes, how: str) -> None:
    results = four.run(programs.fails, 3, how)
    assert all(isinstance(result, Failure) for result in results[:3]), results
    assert ("cannot be reached" if how == "dies" else "ArithmeticError: on purpose") in results[1].message
    assert all(result.kind == "StageError" for result in results[:3])


def test_replicas_that_are_given_different_numbers_of_minibatches_are_told(two: Processes) -> None:
    for result in two.run(programs.uneven):
        assert isinstance(result, Failure)
        assert result.kind == "StageError"
        assert "same number of minibatches" in result.message


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("names", "name them 'dp' (replicas) and 'pp' (pipeline)"),
        ("executor", "executor='streams' on a mesh of 'cpu'"),
        ("stages", "4 processes need at least as many stages, got 2"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_all(four: Processes, what: str, said: str) -> None:
    for result in four.all(programs.wrong, what):
        assert said in result


def test_the_norm_of_all_stages_is_clipped_alike_by_all_executors(two: Processes) -> None:
    """And not as each stage's own."""
    task = ("plain", {"max_norm": 0.3, "max_norm_of": "network"})
    expected = programs.train(0, None, "serial", *task)["state"]
    assert same_state(programs.train(0, None, "threads", *task)["state"], expected)
    for executor in ("serial", "threads"):
        for result in two.all(programs.train, (1, 2), executor, *task):
            assert same_state(result["state"], expected)
    assert not same_state(programs.train(0, None, "serial", "plain", {"max_norm": 0.3})["state"], expected)


def test_the_norm_of_one_stage_is_the_networks() -> None:
    assert pipeline(programs.plain(1), max_norm=0.3, max_norm_of="network").delays == [0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_norm_of": "network"}, "give max_norm, too"),
        ({"max_norm": 1.0, "max_norm_of": "all"}, "there are: stage, network"),
    ],
)
def test_what_max_norm_is_of_is_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pipeline(**options)
