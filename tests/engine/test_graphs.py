"""The graphs executor on a device whose graphs are lists of ops, and which finds races: see fake_device."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from layerpipe.executors.channels import Lent
from layerpipe.tracing.spans import HostClock, Recorder
from layerpipe_kernels.history import DeviceClock, Norms
from layerpipe_kernels.plan import StepPlan
from tests.engine import stream_networks
from tests.engine.fake_device import FakeDevice, fake_device, qualified_name
from tests.engine.graph_pipelines import pipeline
from tests.engine.models import chain, minibatches
from tests.engine.stream_networks import network, train

#: (network, stages, options)
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("chain", 1, {}),
    ("chain", 2, {}),
    ("chain", 3, {"past": "ema"}),
    ("chain", 3, {"past": "latest"}),
    ("chain", 2, {"past": "stash"}),
    ("chain", 4, {"max_norm": 1.0}),
    ("chain", 4, {"schedule": "1f1b"}),
    ("chain", 3, {"schedule": "sequential"}),
    ("chain", 3, {"split_backward": True}),
    ("chain", 3, {"rule": "AdamW"}),
    ("skip", 4, {}),
    ("skip", 3, {"schedule": "1f1b", "split_backward": True}),
]


run = functools.partial(stream_networks.run, make=pipeline, executor="graphs")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_graphs_race_with_nothing_and_give_the_numbers_of_serial_and_streams(
    case: tuple[str, int, dict[str, Any]],
) -> None:
    """With a learning rate schedule, weights that are read and rewritten on the way, a drain, and a refill."""
    kind, count, options = case
    losses, states, clocks = [], [], []
    for executor in ("serial", "streams", "graphs"):
        with fake_device() if executor != "serial" else contextlib.nullcontext(FakeDevice()) as device:
            pipe = pipeline(network(kind, count), executor, **options)
            losses.append(train(pipe, 10 * max(2, count)))
            states.append({**copy.deepcopy(pipe.state_dict()), **state_of(pipe)})
            clocks.append([pipe.measured_delays(), [s.version for s in pipe.stages]])
            del pipe
        assert not device.errors, device.errors[0]
        assert bool(device.captured) == (executor == "graphs")
    assert clocks[0] == clocks[1] == clocks[2]
    for other in (1, 2):
        assert all(map(torch.equal, losses[0], losses[other]))
        assert [name for name in states[0] if not torch.equal(states[0][name], states[other][name])] == []


def state_of(pipe: layerpipe.Pipeline) -> dict[str, Tensor]:
    """Everything that the optimizers go on from, clocks included."""
    found = {}
    for i, part in enumerate(pipe.optimizer.state_dict()["stages"]):
        for k, state in part["state"].items():
            found.update({f"{i} {k} {name}": v.clone() for name, v in state.items() if isinstance(v, Tensor)})
        for k, group in enumerate(part["param_groups"]):
            found[f"{i} {k} updates"] = torch.as_tensor(group["updates"]).clone()
    return found


def test_the_wait_for_what_a_neighbour_has_still_to_read_is_needed() -> None:
    (site,) = (site for site in run(CASES[1], ticks=20).sites if "CapturedStage" in site[0])
    assert run(CASES[1], site, ticks=20).errors


@pytest.mark.parametrize("reader", ["Buffers.fill", "owned"])
def test_a_neighbour_that_does_not_say_when_it_has_read_is_found(monkeypatch: pytest.MonkeyPatch, reader: str) -> None:
    monkeypatch.setattr(Lent, "was_read", _unless(reader, Lent.was_read))
    assert run(CASES[1], ticks=20).errors


def _unless(name: str, was_read: Any) -> Any:
    def recorded(lent: Lent, stream: Any) -> None:
        if qualified_name(sys._getframe(1)) != name:
            was_read(lent, stream)

    return recorded


def test_a_tick_is_three_launches_per_stage_and_one_for_the_loss_and_no_wait_of_the_host() -> None:
    with fake_device() as device:
        pipe = pipeline(chain(3), "graphs", max_norm=1.0)
        device.host_waits.clear()  # of making the optimizers
        for i, (x, y) in enumerate(minibatches(20)):
            before = device.replays
            pipe.step(x, y)
            assert i <= 15 or device.replays - before == 3 * 3 + 1
        assert not device.host_waits


def test_what_runs_at_once_or_is_still_wanted_shares_no_memory_pool() -> None:
    with fake_device() as device:
        pipe = pipeline(chain(3), "graphs")
        for x, y in minibatches(20):
            pipe.step(x, y)
    pools = list(dict.fromkeys(pool for pool, _ in device.captured))
    # Of the last stage (n = 0): forward and loss, backward and update; then n = 2 and n = 4, a pool for each forward.
    assert [sum(p == pool for p, _ in device.captured) for pool in pools] == [2, 2, 1, 1, 1, 6, 1, 1, 1, 1, 1, 10]
    assert device.forgot == [0, 4, 4, 13, 13, 28]  # before and after every stage
    homes = {lane.home.number for lane in pipe._executor.lanes}  # type: ignore[attr-defined]
    assert {stream for _, stream in device.captured} == homes


def test_a_stage_without_weights_has_no_graph_of_an_update() -> None:
    """torch warns of empty graphs."""
    with fake_device() as device:
        pipe = pipeline([nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)], "graphs")
        for x, y in minibatches(20):
            pipe.step(x, y)
    assert len(device.captured) == 4 + 3 * 2 + 5 * 3
    assert pipe.measured_delays() == [{0: 1, 1: 1, 2: 1, 3: 1, 4: 12}, {0: 1, 1: 1, 2: 15}, {0: 18}]


def test_another_shape_is_refused_with_the_stage_and_both_shapes() -> None:
    with fake_device():
        pipe = pipeline(chain(2), "graphs")
        for x, y in minibatches(10):
            pipe.step(x, y)
        with pytest.raises(
            layerpipe.StageError,
            match=r"stage 0 .*inputs .* captured as \(\(8, 6\) torch.float32\) and are now \(\(5, 6\) .*drop_last",
        ):
            pipe.step(*minibatches(1, size=5)[0])


def test_only_the_learning_rate_may_change() -> None:
    with fake_device():
        pipe = pipeline(chain(2), "graphs")
        for x, y in minibatches(10):
            pipe.step(x, y)
        for group in pipe.optimizer.param_groups:
            group["weight_decay"] = 0.1
        with pytest.raises(
            layerpipe.StageError, match=r"captured weight_decay=0.0 and cannot change it to 0.1; only lr"
        ):
            pipe.step(x, y)


def test_an_optimizer_that_counts_on_the_host_is_refused() -> None:
    with fake_device():
        for make in (
            lambda params, **past: lk.SGD(params, **past),
            lambda params, **past: lk.PastWeights(torch.optim.AdamW(params, capturable=True), **past),
        ):
            with pytest.raises(ValueError, match=r"stage 0 .*capturable=True"):
                layerpipe.Pipeline(chain(2), F.cross_entropy, make, executor="graphs")


def test_a_stage_that_recomputes_is_refused() -> None:
    with fake_device():
        pipe = pipeline(network("recomputed", 2), "graphs")
        with pytest.raises(
            layerpipe.StageError, match=r"cannot capture torch.utils.checkpoint.*use executor='streams'"
        ):
            for x, y in minibatches(10):
                pipe.step(x, y)


def test_a_stage_with_dropout_is_refused() -> None:
    with fake_device():
        pipe = pipeline([nn.Sequential(nn.Linear(6, 6), nn.Dropout()), nn.Linear(6, 3)], "graphs")
        with pytest.raises(layerpipe.StageError, match=r"stage 0 .*draws random numbers .*use executor='streams'"):
            for x, y in minibatches(10):
                pipe.step(x, y)


def test_a_forward_that_reads_on_the_host_is_refused_by_name() -> None:
    class Reads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * float(x.abs().max() > 100))

    with fake_device():
        pipe = pipeline([Reads(6, 6), nn.Linear(6, 3)], "graphs")
        with pytest.raises(
            layerpipe.StageError, match=r"could not capture the forward of this stage: operation not perm"
        ):
            for x, y in minibatches(10):
                pipe.step(x, y)


def test_graphs_are_made_anew_where_a_loaded_state_lies_elsewhere() -> None:
    states = []
    for executor in ("serial", "graphs"):
        with fake_device() as device:
            pipe = pipeline(chain(2), executor)
            for x, y in minibatches(10):
                pipe.step(x, y)
            pipe.drain()
            captured = len(device.captured)
            pipe.optimizer.load_state_dict(copy.deepcopy(pipe.optimizer.state_dict()))
            for x, y in minibatches(10):
                pipe.step(x, y)
            pipe.drain()
            states.append(copy.deepcopy(pipe.state_dict()))
            assert len(device.captured) == 2 * captured
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_graphs_are_kept_where_nothing_was_replaced() -> None:
    with fake_device() as device:
        pipe = pipeline(chain(2), "graphs")
        for _ in range(2):
            for x, y in minibatches(10):
                pipe.step(x, y)
            captured = len(device.captured)
            pipe.drain()
            pipe.eval()
            pipe(x)
            pipe.train()
        assert len(device.captured) == captured


def test_graphs_hold_whatever_their_steps_read_and_the_optimizer_may_drop() -> None:
    with fake_device():
        make = functools.partial(lk.SGD, lr=0.05, momentum=0.9, backend="reference", capturable=True)
        past = lk.Blend(norm="match")
        pipe = layerpipe.Pipeline(chain(2), F.cross_entropy, make, past=past, executor="graphs", check_finite=False)
        for x, y in minibatches(20):
            pipe.step(x, y)
        held = dropped(pipe.stages[0].optimizer)
        assert {type(x()) for x in held} == {nn.Parameter, Tensor, StepPlan, DeviceClock, Norms}


def dropped(optimizer: Any) -> list[weakref.ref[Any]]:
    """The objects with tensors in what an optimizer lets go of when a group is added or a state loaded, and those."""
    before = dict(vars(optimizer))
    optimizer._reset_caches()
    found = [value for name, value in before.items() if vars(optimizer)[name] is not value]
    for x in found:  # which grows
        if isinstance(x, dict | list | tuple) or type(x).__module__.startswith("layerpipe_kernels."):
            found += [y for y in gc.get_referents(x) if not any(y is z for z in found)]
    return [weakref.ref(x) for x in found if isinstance(x, Tensor | StepPlan | DeviceClock | Norms)]


def test_a_second_capture_has_the_options_of_the_last_update() -> None:
    states = []
    for executor in ("serial", "graphs"):
        with fake_device():
            pipe = pipeline(chain(3), executor)
            for i, (x, y) in enumerate(minibatches(40)):
                if i == 20:
                    pipe.drain()
                    for group in pipe.optimizer.param_groups:
                        group["lr"] = torch.tensor(0.2)
                if i == 20 + 9:  # stage 0's fifth update was its last before it is captured anew
                    for p in pipe.stages[0].module.parameters():
                        p.data = p.data.clone()
                    pipe.state_dict()
                pipe.step(x, y)
            pipe.drain()
            states.append(copy.deepcopy(pipe.state_dict()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_replayed_backward_of_the_wrong_age_is_refused_as_any_other() -> None:
    with fake_device():
        pipe = pipeline(chain(2), "graphs")
        for x, y in minibatches(10):
            pipe.step(x, y)
        pipe.stages[0].version += 1  # an update that the schedule does not have
        with pytest.raises(layerpipe.StageError, match=r"minibatch 8 is 3 updates old; the schedule says 2"):
            pipe.step(x, y)


def test_a_rehearsal_that_fails_leaves_a_stage_where_it_was() -> None:
    pipe = pipeline(chain(3), "serial", split_backward=True)
    stage, seen = pipe.stages[1], list[Any]()
    for x, y in minibatches(8):
        pipe.step(x, y)
    stage.probe = seen.append
    stage.watch(recorder := Recorder(HostClock()))
    before = stage.version, stage.measured.copy(), stage.in_flight
    with contextlib.suppress(ZeroDivisionError), stage.rehearsal():
        stage.version -= 2
        (y,) = stage.forward(0, (torch.ones(8, 6, requires_grad=True),))
        stage.version += 2
        stage.backward(0, (torch.ones_like(y),))
        assert stage.half_done
        stage.version += 1 / 0
    assert (stage.version, stage.measured, stage.in_flight) == before
    assert (stage.probe, stage.spans, stage.half_done) == (seen.append, recorder, False)
    assert not seen
    assert not recorder.spans()


def test_nothing_is_collected_during_a_capture() -> None:
    """A pipeline that was forgotten waits for its device when it is collected, which would break the capture."""
    seen: set[tuple[bool, bool]] = set()

    class Watching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.add((device.capturing, gc.isenabled()))
            return super().forward(x)

    with fake_device() as device:
        pipe = pipeline([Watching(6, 6), nn.Linear(6, 3)], "graphs")
        for x, y in minibatches(12):
            pipe.step(x, y)
    assert seen == {(False, True), (True, False)}


def test_without_a_cuda_device_graphs_are_refused() -> None:
    with pytest.raises(ValueError, match="executor='graphs' needs a CUDA device; the stages are on cpu"):
        pipeline(chain(), "graphs")
