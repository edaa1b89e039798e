"""A checkpoint is always whole, and training goes on from it bit for bit."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from layerpipe import checkpoint
from tests import forks
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import EXECUTORS, pipeline


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.invariant(7)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
@pytest.mark.parametrize("past", ["blend", "stash"])
@pytest.mark.parametrize("when", [1, 4, 11])
def test_a_resumed_pipeline_does_what_the_one_that_went_on_does(
    executor: str, schedule: str, past: str, when: int, tmp_path: Path
) -> None:
    data = minibatches(24)
    options: dict[str, Any] = {"executor": executor, "schedule": schedule, "past": past}
    with pipeline(**options) as whole, pipeline(chain(seed=9), **options) as resumed:
        scheduler, other = (torch.optim.lr_scheduler.StepLR(p.optimizer, 3, gamma=0.7) for p in (whole, resumed))
        losses: list[Any] = []
        for x, y in data[:when]:
            losses.append(whole.step(x, y))
            scheduler.step()
        losses += whole.checkpoint(tmp_path / "c.pt", scheduler=scheduler.state_dict(), note="here")
        assert sum(loss is not None for loss in losses) == when
        assert whole.in_flight == 0
        numbers = [torch.rand(2), random.random(), np.random.rand()]
        extra = resumed.resume(tmp_path / "c.pt")
        assert extra["note"] == "here"
        assert [stage.version for stage in resumed.stages] == [when] * 4
        other.load_state_dict(extra["scheduler"])
        again = [torch.rand(2), random.random(), np.random.rand()]
        assert torch.equal(numbers[0], again[0])
        assert numbers[1:] == again[1:]
        for pipe, each in ((whole, scheduler), (resumed, other)):
            for x, y in data[when:]:
                pipe.step(x, y)
                each.step()
            pipe.drain()
        assert_equal(whole.state_dict(), resumed.state_dict())
        assert whole.measured_delays() == resumed.measured_delays()
        for a, b in zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params, **past: lk.SGD(params, lr=0.05, momentum=0.9, **past),
    "AdamW": lambda params, **past: lk.AdamW(params, lr=0.01, **past),
    "PastWeights": lambda params, **past: lk.PastWeights(torch.optim.SGD(params, lr=0.05, momentum=0.9), **past),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_pipeline_keeps_its_averages_design_while_the_momentum_is_scheduled(
    kind: str, tmp_path: Path
) -> None:
    data = minibatches(40)

    def started(seed: int) -> tuple[layerpipe.Pipeline, torch.optim.lr_scheduler.OneCycleLR]:
        pipe = layerpipe.Pipeline(chain(seed=seed), F.cross_entropy, OPTIMIZERS[kind])
        return pipe, torch.optim.lr_scheduler.OneCycleLR(pipe.optimizer, max_lr=0.1, total_steps=60)

    (whole, scheduler), (resumed, other) = started(0), started(9)
    with whole, resumed:
        for x, y in data[:15]:
            whole.step(x, y)
            scheduler.step()
        whole.checkpoint(tmp_path / "c.pt", scheduler=scheduler.state_dict())
        other.load_state_dict(resumed.resume(tmp_path / "c.pt")["scheduler"])
        for pipe, each in ((whole, scheduler), (resumed, other)):
            for x, y in data[15:]:
                pipe.step(x, y)
                each.step()
            pipe.drain()
        assert_equal(whole.state_dict(), resumed.state_dict())


def test_a_checkpoint_of_the_same_model_cut_elsewhere_is_refused_whole(tmp_path: Path) -> None:
    """Stages with as many parameters of the same shapes, so that nothing else would tell."""

    def made(at: str) -> layerpipe.Pipeline:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)]
        return pipeline(layerpipe.split(nn.Sequential(*layers), 2, at=[at]))

    with made("1") as one, made("2") as other:
        for x, y in minibatches(3):
            one.step(x, y)
        one.checkpoint(tmp_path / "c.pt")
        before = copy.deepcopy((other.state_dict(), other.optimizer.state_dict()))
        with pytest.raises(layerpipe.CheckpointError, match=r"cut elsewhere: stage 0 has 2 parameters, .* here 4"):
            other.resume(tmp_path / "c.pt")
        assert_equal(before[0], other.state_dict())
        assert str(before[1]) == str(other.optimizer.state_dict())
    with made("1") as again:
        again.resume(tmp_path / "c.pt")
        assert_equal(one.state_dict(), again.state_dict())


def test_a_learning_rate_set_after_the_last_tick_is_the_one_that_goes_on() -> None:
    with pipeline(chain(2), schedule="sequential") as pipe:
        own: Any = pipe.stages[0].optimizer
        pipe.step(*minibatches(1)[0])
        pipe.optimizer.param_groups[0]["lr"] = 0.5
        state = copy.deepcopy(pipe.optimizer.state_dict())  # the stage's own lr is the one it last trained with
        assert own.param_groups[0]["lr"] != 0.5
        pipe.step(*minibatches(1)[0])
        pipe.optimizer.load_state_dict(state)
        pipe.step(*minibatches(1)[0])
        assert own.param_groups[0]["lr"] == 0.5


def test_a_decay_rule_that_is_a_function_is_not_written_and_stays(tmp_path: Path) -> None:
    def rule(n: int) -> float:
        return n / (n + 2)

    with pipeline(past=lk.EMA(decay=rule)) as one, pipeline(past=lk.EMA(decay=rule)) as two:
        one.step(*minibatches(1)[0])
        one.checkpoint(tmp_path / "c.pt")
        two.resume(tmp_path / "c.pt")
        assert two.optimizer.param_groups[0]["past"].decay is rule


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pipeline() as pipe:
        for x, y in minibatches(6):
            pipe.step(x, y)
        pipe.checkpoint(path)
    for change, message in (
        ({"schedule": "1f1b"}, "4 stages and schedule 'lockstep', this pipeline has 4 and '1f1b'"),
        ({"stages": chain(3)}, ": of 4 stages"),
        ({"stages": chain(width=7)}, r"another model, it differs in 0\.0\.bias, 0\.0\.weight"),
        ({"past": "stash"}, "trained with past='blend', this pipeline has past='stash'"),
    ):
        with pipeline(**change) as other:  # type: ignore[arg-type]
            before = copy.deepcopy(other.state_dict())
            with pytest.raises(layerpipe.CheckpointError, match=message):
                other.resume(path)
            assert_equal(before, other.state_dict())
            assert not other.optimizer.state


def test_another_optimizers_checkpoint_is_refused_whole(tmp_path: Path) -> None:
    def made(kind: str) -> layerpipe.Pipeline:
        return layerpipe.Pipeline(chain(2), F.cross_entropy, OPTIMIZERS[kind])

    with made("SGD") as pipe:
        pipe.step(*minibatches(1)[0])
        pipe.checkpoint(tmp_path / "c.pt")
    for kind, name in (("AdamW", "AdamW"), ("PastWeights", "PastWeights of SGD")):
        with made(kind) as other:
            message = rf"the state is of \['SGD', 'SGD'\], this pipeline trains with \['{name}', '{name}'\]"
            with pytest.raises(layerpipe.CheckpointError, match=message):
                other.resume(tmp_path / "c.pt")
            assert not other.optimizer.state
    content = checkpoint.read(tmp_path / "c.pt")
    del content["optimizer"]["kinds"]  # as files were before
    checkpoint.write(tmp_path / "old.pt", content)
    with made("SGD") as again:
        again.resume(tmp_path / "old.pt")
        assert_equal(again.state_dict(), pipe.state_dict())


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pipeline() as pipe:
        with pytest.raises(FileNotFoundError):
            pipe.resume(tmp_path / "none.pt")
        (tmp_path / "text").write_text("hello")
        torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
        torch.save({"layerpipe": 99}, tmp_path / "new.pt")
        (tmp_path / "code.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        for name, message in (
            ("text", "text is no checkpoint"),
            ("other.pt", "no checkpoint of layerpipe"),
            ("new.pt", "format 99"),
            ("code.pt", "is no checkpoint"),
        ):
            with pytest.raises(layerpipe.CheckpointError, match=message):
                pipe.resume(tmp_path / name)
        pipe.checkpoint(tmp_path / "c.pt")
        pipe.step(*minibatches(1)[0])
        with pytest.raises(RuntimeError, match="drain"):
            pipe.resume(tmp_path / "c.pt")


def test_a_write_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.write(path, {"value": 1})
    with pytest.raises(Exception, match=r"pickle|local object"):
        checkpoint.write(path, {"value": lambda: None})
    assert checkpoint.read(path)["value"] == 1
    assert os.listdir(tmp_path) == ["c.pt"]


def write_again_and_again(path: Path, said: Connection) -> None:
    torch.set_num_threads(1)
    for count in itertools.count(1):
        checkpoint.write(path, {"count": count, "weights": [torch.full((200_000,), float(count)) for _ in range(4)]})
        said.send(count)


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_last_checkpoint_is_whole(kills: int, tmp_path: Path) -> None:
    path, chance = tmp_path / "c.pt", random.Random(0)
    for _ in range(kills):
        path.unlink(missing_ok=True)
        writer, pipe = forks.start(write_again_and_again, path)
        assert pipe.poll(120)
        said = [pipe.recv()]
        time.sleep(chance.uniform(0, 0.05))
        writer.kill()
        with contextlib.suppress(EOFError, OSError):
            while True:
                said.append(pipe.recv())
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        content = checkpoint.read(path)
        assert content["count"] >= max(said)  # nothing that was said to be written is lost
        for weights in content["weights"]:
            assert torch.equal(weights, torch.full((200_000,), float(content["count"])))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_checkpoint_that_fails_keeps_the_losses_for_the_next_drain(executor: str, tmp_path: Path) -> None:
    def trained(pipe: layerpipe.Pipeline, count: int) -> list[Tensor | None]:
        return [pipe.step(x, y) for x, y in minibatches(count)]

    with pipeline(executor=executor) as one, pipeline(executor=executor) as other:
        for count in (5, 2):
            expected, given = trained(one, count), trained(other, count)
            for path, extra in ((None, {}), (tmp_path / "no" / "c.pt", {}), (tmp_path / "c.pt", {"data": object()})):
                with pytest.raises((ValueError, OSError, TypeError)):
                    other.checkpoint(path, **extra)
            expected += one.checkpoint(tmp_path / "one.pt")
            given += other.drain() if count == 5 else other.checkpoint(tmp_path / "other.pt")
            assert [x for x in given if x is not None] == [x for x in expected if x is not None]
        assert other.drain() == []


def test_a_file_brings_no_backend(tmp_path: Path) -> None:
    with pipeline() as pipe:
        pipe.step(*minibatches(1)[0])
        pipe.checkpoint(tmp_path / "c.pt")
    content = checkpoint.read(tmp_path / "c.pt")
    for group in content["optimizer"]["options"]:
        group["backend"] = "one that this machine lacks"
    checkpoint.write(tmp_path / "c.pt", content)
    with pipeline() as pipe:
        pipe.resume(tmp_path / "c.pt")
        pipe.step(*minibatches(1)[0])
        pipe.drain()


def test_random_numbers_of_more_devices_than_there_are_here_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", told.extend)
    checkpoint.set_random_state({**checkpoint.random_state(), "cuda": ["first", "second"]})
    assert told == ["first"]


def test_batchnorm_is_in_a_checkpoint(tmp_path: Path) -> None:
    with pipeline() as pipe:
        for x, y in minibatches(5):
            pipe.step(x, y)
        pipe.checkpoint(tmp_path / "c.pt")
        norms = [m for stage in pipe.modules for m in stage.modules() if isinstance(m, nn.BatchNorm1d)]
        means = [norm.running_mean.clone() for norm in norms if norm.running_mean is not None]
        for norm in norms:
            norm.reset_running_stats()
        pipe.resume(tmp_path / "c.pt")
        assert all(torch.equal(n.running_mean, m) for n, m in zip(norms, means, strict=True))  # type: ignore[arg-type]
        assert all(n.num_batches_tracked == 5 for n in norms)


@pytest.mark.parametrize(
    "extra", [Path("data"), torch.nn.Linear(2, 2), [{"a": object()}]], ids=lambda x: type(x).__name__
)
def test_what_could_not_be_read_again_is_not_written(extra: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pipeline() as pipe:
        pipe.checkpoint(path, epoch=1)
        with pytest.raises(TypeError, match=r"would not be readable with .* in it; give"):
            pipe.checkpoint(path, epoch=2, more=extra)
        assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]
        assert pipe.resume(path) == {"epoch": 1}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("options", [{"past": "stash"}, {"past": lk.Blend(materialize=True)}], ids=str)
def test_loaded_weights_are_their_own_past(options: dict[str, Any], capturable: bool) -> None:
    def optimizer(params: Any, **past: Any) -> lk.SGD:
        return lk.SGD(params, lr=0.05, capturable=capturable, **{**past, **options})

    with layerpipe.Pipeline(chain(), F.cross_entropy, optimizer) as pipe:
        start = copy.deepcopy(pipe.state_dict())
        for x, y in minibatches(12):
            pipe.step(x, y)
        pipe.drain()
        pipe.load_state_dict(start)
        for stage in pipe.stages:
            assert isinstance(stage.optimizer, lk.SGD)
            assert all(torch.equal(stage.optimizer.past_weight(p), p) for p in stage.module.parameters())
