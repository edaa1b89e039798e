"""Processes that were started with something else are refused before the first minibatch, all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed import differing
from tests.distributed.commands import one_command_each
from tests.distributed.processes import Processes


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("lr", "the optimizer of stage 0 has lr=0.1 in process 1 and lr=0.05 in process 0"),
        ("momentum", "the optimizer of stage 0 has momentum=0.5 in process 1 and momentum=0.9 in process 0"),
        ("class", "the optimizer of stage 0 has class='AdamW' in process 1 and class='SGD' in process 0"),
        ("seed", "torch's seed is 7 in process 1 and 0 in process 0: call torch.manual_seed alike in all"),
        ("dtype", "stage 0 has other parameters in process 1 than in process 0"),
        ("weights", "the weights of stage 0 in process 1 are not those in process 0: seed all processes alike"),
        ("buffers", "the weights of stage 2 in process 1 are not those in process 0"),
        ("stages", "the number of stages is 5 in process 1 and 4 in process 0"),
        ("max_norm", "max_norm is 1.0 in process 1 and None in process 0"),
        ("schedule", "schedule is '1f1b' in process 1 and 'lockstep' in process 0"),
        ("past", "past is 'blend:order=1' in process 1 and 'blend' in process 0"),
        ("split_backward", "split_backward is True in process 1 and False in process 0"),
        ("check_finite", "check_finite is False in process 1 and True in process 0"),
    ],
)
def test_a_process_with_something_else_is_named_in_all(two: Processes, what: str, message: str) -> None:
    for said in two.all(differing.disagrees, what):
        assert said.startswith("ValueError: ")
        assert message in said


@pytest.mark.parametrize(
    "what", ["nothing", "nothing, and every stage has a rate of its own", "nothing, and only own stages have a rate"]
)
def test_processes_that_agree_are_served(two: Processes, what: str) -> None:
    assert two.all(differing.disagrees, what) == ["made", "made"]


RUN = ["train", "--model", "mlp", "--width", "2", "--stages", "2", "--steps", "8", "--executor", "distributed"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--lr", "0.5", "--lr is 0.5 in process 1 and 0.02 in process 0"),
        ("--momentum", "0.5", "--momentum is 0.5 in process 1 and 0.9 in process 0"),
        ("--max-norm", "1", "--max-norm is 1.0 in process 1 and None in process 0"),
        ("--schedule", "1f1b", "--schedule is '1f1b' in process 1 and 'lockstep' in process 0"),
        ("--seed", "3", "--seed is 3 in process 1 and 0 in process 0"),
        ("--steps", "9", "--steps is 9 in process 1 and 8 in process 0"),
        ("--stages", "3", "--stages is 3 in process 1 and 2 in process 0"),
        ("--executor", "threads", "--executor is 'threads' in process 1 and 'distributed' in process 0"),
        ("--data", "fashion-mnist", "--data is 'fashion-mnist' in process 1 and 'digits' in process 0"),
        ("--checkpoint-every", "4", "--checkpoint-every is 4 in process 1 and None in process 0"),
        ("--profile", "", "--profile is True in process 1 and False in process 0"),
        ("--resume", "somewhere", "--resume is True in process 1 and False in process 0"),
    ],
)
def test_a_command_with_another_option_is_named_in_all(
    two: Processes, tmp_path: Path, option: str, value: str, message: str
) -> None:
    pytest.importorskip("typer")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    other = ["train"] if option == "--resume" else RUN
    commands = [RUN, [*other, option, *([value] if value else [])]]
    found = two.all(one_command_each, 2, ("127.0.0.1", store.port), str(tmp_path), commands)
    for status, error, _ in found:
        assert status == 2
        assert message in error
        assert error.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
