"""Whatever ends a pipeline or a run, from inside or outside, ends all of it: nobody waits on, and what was measured is
there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import layerpipe
from tests.distributed import failing
from tests.distributed.processes import Processes
from tests.engine.models import CallsAt, chain, minibatches
from tests.engine.pipelines import EXECUTORS, sgd, workers


def closed_short_run(number: int, executor: str) -> None:
    """One of many: sizes, schedule, and who closes when, by its number; some are closed in several places at once."""
    chance = random.Random(number)
    stages, fed = chance.randint(1, 4), chance.randint(1, 8)
    made: list[layerpipe.Pipeline] = []

    def close(value: Any = None) -> Any:
        for pipe in made:
            pipe.close()
        return value

    parts = chain(stages)
    several = chance.random() < 0.3
    for victim in range(stages) if several else [chance.randrange(stages)]:
        where = chance.choice(["forward", "backward"])
        parts[victim] = nn.Sequential(parts[victim], CallsAt(close, where, chance.randint(1, fed)))
    in_loss = CallsAt(close, "forward", chance.randint(1, fed)) if chance.random() < 0.3 else nn.Identity()
    options: dict[str, Any] = {"threads_per_stage": 1} if executor == "threads" else {}
    pipe = layerpipe.Pipeline(
        parts, lambda output, target: in_loss(F.cross_entropy(output, target)), sgd, executor=executor,
        schedule=chance.choice(["lockstep", "1f1b", "sequential"]), split_backward=chance.random() < 0.5, **options,
    )  # fmt: skip
    made.append(pipe)
    watchdog = threading.Timer(0.02 * chance.random(), close)
    if chance.random() < 0.2:
        watchdog.start()
    with pytest.raises(RuntimeError, match="the pipeline is closed"):
        for x, y in minibatches(fed):
            pipe.step(x, y)
        pipe.drain()
    watchdog.cancel()
    assert all(torch.isfinite(value).all() for value in pipe.state_dict().values())
    pipe.close()


@pytest.mark.parametrize("runs", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_pipeline_closed_from_inside_says_so_and_never_hangs(executor: str, runs: int) -> None:
    torch.set_num_threads(1)
    before = workers()
    for number in range(runs):
        closed_short_run(number, executor)
    assert workers() == before


@pytest.mark.parametrize("size", [8, 20_000], ids=["small", "large"])
@pytest.mark.parametrize(("stage", "where"), [(0, "forward"), (3, "backward"), (5, "forward"), (5, "loss")])
def test_a_pipeline_closed_inside_one_process_ends_in_all(three: Processes, stage: int, where: str, size: int) -> None:
    for at in (1, 4, 30):
        said = three.all(failing.closes_inside, stage, where, at, size)
        assert said[stage // 2] == "RuntimeError: the pipeline is closed"
        for rank in {0, 1, 2} - {stage // 2}:
            assert "closed its pipeline" in said[rank] or "the pipeline is closed" in said[rank], said


# -- the command line ------------------------------------------------------------------------------------------------

RUN = [
    "train",
    "--model",
    "mlp",
    "--width",
    "2",
    "--steps",
    "60",
    "--warmup",
    "5",
    "--batch-size",
    "16",
    "--stages",
    "2",
]


def interrupted_run(out: Path, number: int, at: int, where: str, executor: str) -> tuple[int, list[dict[str, Any]]]:
    """``layerpipe train``, sent a signal inside its own writing; its status, and its metrics."""
    from layerpipe.cli import main
    from layerpipe.cli.board import Board
    from layerpipe.cli.output import RunDirectory
    from layerpipe.cli.progress import TrainingBar

    kind, name = {
        "bar": (TrainingBar, "step"), "metrics": (RunDirectory, "write"), "board": (Board, "scalar"),
        "flush": (Board, "flush"), "checkpoint": (RunDirectory, "metrics_so_far"),
    }[where]  # fmt: skip
    inner, calls = getattr(kind, name), 0

    def sent(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), number)
        return inner(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(kind, name, sent)
        main([*RUN, "--executor", executor, "--checkpoint-every", "10", "--out", str(out)])
    assert calls >= at
    return end.value.code, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: signal.Signals(n).name)
@pytest.mark.parametrize(("where", "at"), [("bar", 3), ("metrics", 7), ("board", 20), ("flush", 11), ("checkpoint", 2)])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_signal_inside_what_a_run_writes_leaves_a_report_and_whole_files(
    where: str, at: int, number: int, executor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("typer", "sklearn", "matplotlib", "tensorboard"):
        pytest.importorskip(module)
    handler = signal.getsignal(number)
    if handler is signal.SIG_IGN:
        pytest.skip("whoever started the tests ignores this signal, as nohup does")
    status, lines = interrupted_run(tmp_path / "run", number, at, where, executor)
    assert status == 128 + number
    assert signal.getsignal(number) == handler
    printed = capsys.readouterr()
    assert "Interrupted; what was measured until then is written." in printed.out
    assert "Traceback" not in printed.err
    assert lines[-1]["event"] == "end"
    assert lines[-1]["interrupted"] is True
    steps = [line["step"] for line in lines if line["event"] == "step"]
    assert steps == list(range(1, lines[-1]["minibatches"] + 1))
    for name in ("loss.png", "past_weights.png", "timeline.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "run").glob("*.partial"))
    (events,) = (tmp_path / "run").glob("events.out.tfevents.*")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(events))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/pipeline")] == steps


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: signal.Signals(n).name)
def test_a_signal_to_processes_leaves_the_same_report(number: int, tmp_path: Path) -> None:
    for module in ("typer", "sklearn", "matplotlib", "tensorboard"):
        pytest.importorskip(module)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "layerpipe", *RUN, "--steps", "1000000", "--executor", "distributed"]
    process = subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 20:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        printed, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    assert printed.count("Interrupted; what was measured until then is written.") == 1
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["interrupted"] is True
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
