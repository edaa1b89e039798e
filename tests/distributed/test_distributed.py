"""Invariant 3 across processes: the same weights as in one, bit for bit; and nobody hangs when one of them fails."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from layerpipe.delays import OnLoss
from layerpipe.executors.ranks import Ranks
from tests.distributed import failing, programs
from tests.distributed.processes import Failure, Processes
from tests.engine.pipelines import pipeline


@pytest.fixture(autouse=True)
def _one_core() -> None:
    torch.set_num_threads(1)


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def failed(result: Any, kind: str, *said: str) -> None:
    assert isinstance(result, Failure), result
    assert result.kind == kind, result.where
    for text in said:
        assert text in result.message


def flat(losses: list[Any]) -> list[float]:
    """Of every minibatch, in order; how many calls they took is another matter."""
    return [x for part in losses for x in (part if isinstance(part, list) else [part]) if x is not None]


@pytest.mark.invariant(3)
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b", "sequential"])
@pytest.mark.parametrize("stages", [3, 5])
@pytest.mark.parametrize("past", ["blend", "stash"])
def test_processes_give_the_weights_of_one_bit_for_bit(three: Processes, schedule: str, stages: int, past: str) -> None:
    task = (stages, {"schedule": schedule, "past": past}, [9, 6], [8, 8, 5])
    expected = programs.train(0, "serial", *task)
    found = three.all(programs.train, "distributed", *task)
    for result in found:
        assert same_state(result["state"], expected["state"])
        assert torch.equal(result["output"], expected["output"])
        assert flat(result["losses"]) == flat(expected["losses"])
        assert result["measured"] == expected["measured"]
        assert result["memory"] == expected["memory"]
        assert result["in_flight"] == 0
        fill = len(list(itertools.takewhile(lambda loss: loss is None, result["losses"])))
        assert (
            fill == result["latency"] == {"lockstep": 2 * (stages - 1), "1f1b": stages - 1, "sequential": 0}[schedule]
        )
    assert [stage for result in found for stage in result["own"]] == list(range(stages))


@pytest.mark.parametrize(
    "options",
    [
        {"split_backward": True},
        {"max_norm": 0.1},
        {"past": "ema"},
        {"past": "latest"},
        {"accumulate": 5},
        {"sync_steps": 5, "accumulate": 2},
        {"delay_policy": OnLoss(window=1, decrease=0.1, rise=0.05)},
    ],
)
def test_options_mean_the_same(two: Processes, options: dict[str, Any]) -> None:
    task = (4, options, [24], [8])
    expected = programs.train(0, "serial", *copy.deepcopy(task))  # a policy remembers
    for result in two.all(programs.train, "distributed", *task):
        assert same_state(result["state"], expected["state"])
        assert result["measured"] == expected["measured"]


def test_what_stages_exchange_keeps_its_dtypes_shapes_and_gaps(two: Processes) -> None:
    expected = programs.exchange(0, "serial")
    for result in two.all(programs.exchange, "distributed"):
        assert same_state(result["state"], expected["state"])
        assert result["losses"] == expected["losses"]


def test_what_stages_exchange_lies_in_memory_as_it_did(two: Processes) -> None:
    """Or other kernels would run, and round otherwise."""
    expected = programs.strides(0, "serial")
    assert expected["1.seen"].tolist() == [1, 8, 12, 1, 6, 3, 1, 0, 8, 18, 1]
    assert expected["0.gradients"].tolist() == [1, 0, 8]
    for result in two.all(programs.strides, "distributed"):
        assert same_state(result, expected)


def test_random_layers_draw_what_they_draw_in_one_process(two: Processes, three: Processes) -> None:
    expected = programs.drop(0, "serial")
    for result in two.all(programs.drop, "distributed") + three.all(programs.drop, "distributed"):
        assert same_state(result, expected)


def test_losses_do_not_keep_the_gradients_that_came_with_them(two: Processes) -> None:
    first, _ = two.all(programs.loss_bytes)
    assert first == 4


def test_a_checkpoint_goes_on_in_other_processes(two: Processes, three: Processes, tmp_path: Any) -> None:
    """Written by 3 processes, read by 2 and by 1, and the other way round: as if nobody had stopped."""
    expected = programs.drained_once(0, "serial")
    for first, then in ((three, two), (two, three)):
        path = str(tmp_path / f"{first.size}.pt")
        first.all(programs.write, "distributed", path)
        for result in then.all(programs.go_on, "distributed", path):
            assert same_state(result["state"], expected["state"])
            assert result["scheduler"] == expected["scheduler"]
            assert result["options"] == expected["options"]
        assert same_state(programs.go_on(0, "serial", path)["state"], expected["state"])
    path = str(tmp_path / "1.pt")
    programs.write(0, "serial", path)
    for result in three.all(programs.go_on, "distributed", path):
        assert same_state(result["state"], expected["state"])
        assert result["scheduler"] == expected["scheduler"]


def test_every_process_has_its_own_random_numbers_again(two: Processes, tmp_path: Any) -> None:
    path = str(tmp_path / "run.pt")
    assert two.all(programs.draw, path, False) == two.all(programs.draw, path, True)


def test_a_file_that_one_process_cannot_write_or_read_is_an_error_in_all(two: Processes, tmp_path: Any) -> None:
    for function, path in ((programs.write, tmp_path / "no" / "run.pt"), (programs.go_on, tmp_path / "none.pt")):
        results = two.run(function, "distributed", str(path))
        assert [type(result) for result in results] == [Failure, Failure]
        assert results[0].kind == "FileNotFoundError"
        assert all(str(path) in result.message for result in results)
    path = str(tmp_path / "run.pt")
    two.all(programs.write, "distributed", path)
    for result in two.run(programs.go_on, "distributed", path, "stash"):
        failed(result, "CheckpointError", "past='blend'")


@pytest.mark.parametrize("where", ["forward", "backward", "loss"])
def test_an_error_in_one_process_stops_all_and_names_the_stage(three: Processes, where: str) -> None:
    results = three.run(failing.fails, where, 5)
    stage = 2 if where == "loss" else 1
    for result in results:
        failed(result, "StageError", f"stage {stage} (", "on purpose")


def test_divergence_in_one_process_is_divergence_in_all(three: Processes) -> None:
    for result in three.run(failing.diverges):
        failed(result, "DivergenceError", "stage 2", "not finite")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_stops_the_others(three: Processes, rank: int) -> None:
    results = three.run(failing.dies, rank, 4)
    assert results[rank] is None
    near = [r for r in (rank - 1, rank + 1) if r in range(3)]
    for other in near:
        failed(results[other], "StageError", f"stage {rank} (", "cannot be reached")
    assert all(isinstance(results[r], Failure) for r in range(3) if r != rank)


def test_different_numbers_of_minibatches_are_an_error_and_no_deadlock(two: Processes) -> None:
    for counts in ((6, 8), (8, 6)):
        results = two.run(failing.uneven, list(counts))
        assert all(result.kind == "StageError" for result in results)
        assert any("same number of minibatches" in result.message for result in results)


def test_ctrl_c_in_one_process_stops_all(three: Processes) -> None:
    results = three.run(failing.interrupted, 1)
    failed(results[1], "KeyboardInterrupt")
    for other in (0, 2):
        failed(results[other], "StageInterrupted", "KeyboardInterrupt")


def test_a_pipeline_closed_in_one_process_stops_the_other(two: Processes) -> None:
    results = two.run(failing.closes, 0)
    assert results[0] == "closed"
    failed(results[1], "StageError", "closed its pipeline")


def test_two_pipelines_at_once_do_not_mix(two: Processes) -> None:
    expected = programs.interleaved(0, "serial")
    for result in two.all(programs.interleaved, "distributed"):
        assert all(same_state(*pair) for pair in zip(result, expected, strict=True))


def test_a_trace_has_the_rows_of_all_stages(two: Processes) -> None:
    for rows in two.all(programs.traced):
        assert [any(name.startswith("B") for name in row) for row in rows] == [True] * 4


def test_without_a_process_group_the_message_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="torchrun"):
        pipeline(executor="distributed")


def test_fewer_stages_than_processes_are_refused(three: Processes) -> None:
    for result in three.run(programs.train, "distributed", 2, {}, [1], [8]):
        failed(result, "ValueError", "3 processes need at least as many stages, got 2")


def test_a_process_with_nothing_to_train_is_refused_in_all(two: Processes) -> None:
    for result in two.run(failing.untrained):
        failed(result, "ValueError", "no stage has parameters to train in process 1")


def test_processes_with_other_cuts_are_refused_in_all(two: Processes) -> None:
    for result in two.run(failing.cut_differently):
        failed(result, "ValueError", "stage 0 has other parameters in process 1 than in process 0", "cut_at")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_optimizer_that_one_process_cannot_make_is_an_error_in_all(two: Processes, stage: int) -> None:
    own, other = ("ArithmeticError", "RuntimeError") if stage < 2 else ("RuntimeError", "ArithmeticError")
    for result, kind in zip(two.run(failing.refuses, stage), (own, other), strict=True):
        failed(result, kind, "on purpose")


def test_stages_are_shared_out_in_order() -> None:
    ranks = Ranks(7)
    ranks.size = 3
    assert [list(ranks.held_by(r)) for r in range(3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [ranks.of(s) for s in range(7)] == [0, 0, 0, 1, 1, 2, 2]
