"""A trace with the device's clock, on a device that counts ops: see fake_device."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerpipe
from layerpipe.tracing import Trace
from layerpipe.tracing.spans import INNER, Span
from tests.engine.fake_device import FakeDevice, fake_device
from tests.engine.graph_pipelines import pipeline
from tests.engine.models import chain, minibatches

DEVICES = ["streams", "graphs"]
STAGES = 4
#: Ticks. Of four stages in lockstep the last is captured in tick 13, and the last that began before leaves in tick 18.
SKIPPED, WATCHED = 20, 8


def watched(pipe: layerpipe.Pipeline, before: int = SKIPPED) -> Trace:
    """A trace of 8 ticks in the middle of more."""
    data = minibatches(before + WATCHED + 4)
    for x, y in data[:before]:
        pipe.step(x, y)
    pipe.watch(trace := Trace(pipe.names))
    for x, y in data[before : before + WATCHED]:
        pipe.step(x, y)
    pipe.watch(None)
    for x, y in data[before + WATCHED :]:
        pipe.step(x, y)
    return trace


def traced(executor: str, before: int = SKIPPED, **options: Any) -> Trace:
    with fake_device() as device:
        trace = watched(pipeline(chain(STAGES), executor, **options), before)
    assert not device.errors, device.errors[0]
    return trace


def actions_in(spans: list[Span]) -> list[tuple[Span, list[Span]]]:
    """Each action, and what it was made of, which is written down before it and lies in it."""
    found: list[tuple[Span, list[Span]]] = []
    parts: list[Span] = []
    for span in spans:
        if span.name in INNER:
            parts.append(span)
            continue
        for part in parts:
            assert part.stream == span.stream
            assert span.start <= part.start <= part.end <= span.end
        found.append((span, parts))
        parts = []
    assert not parts
    return found


@pytest.mark.parametrize("executor", DEVICES)
@pytest.mark.parametrize("split", [False, True])
def test_every_action_has_its_spans(executor: str, split: bool) -> None:
    trace = traced(executor, split_backward=split)
    for s, spans in enumerate(trace.stages):
        actions, last = actions_in(spans), s == STAGES - 1
        forwards, backwards = SKIPPED - s, SKIPPED - 2 * (STAGES - 1) + s
        assert [a.name for a, _ in actions if a.name[0] == "F"] == [f"F{forwards + i}" for i in range(WATCHED)]
        assert [a.name for a, _ in actions if a.name[0] == "B"] == [f"B{backwards + i}" for i in range(WATCHED)]
        for action, parts in actions:
            names = [span.name for span in parts if span.name != "past weight"]
            if action.name[0] == "F":
                assert names == ["channel", "layers", "layers"] if last else ["channel", "layers"]
            else:
                weights = ["weight gradients"] if split and s else []
                assert names == [*([] if last else ["channel"]), "layers", *weights, "wait", "step"]


def test_past_weights_are_timed_in_streams_and_are_a_part_of_a_captured_backward() -> None:
    for executor, before in (("streams", SKIPPED), ("graphs", SKIPPED), ("graphs", 6)):
        for s, spans in enumerate(traced(executor, before).stages):
            past = {a.name: [p for p in parts if p.name == "past weight"] for a, parts in actions_in(spans)}
            layers = {a.name: [p for p in parts if p.name == "layers"] for a, parts in actions_in(spans)}
            eager = executor == "streams" or before == 6  # the pipe is full, and its delays are not
            assert any(past.values()) == (eager and s < STAGES - 1)
            for name, made in past.items():
                assert not made or name[0] == "B"
                for span in made:
                    assert layers[name][0].start <= span.start < span.end <= layers[name][0].end


@pytest.mark.parametrize("executor", DEVICES)
def test_watching_costs_no_race_no_wait_in_a_tick_and_changes_no_bit(executor: str) -> None:
    states, records = [], []
    for watch in (False, True):
        with fake_device() as device:
            pipe = pipeline(chain(STAGES), executor)
            device.host_waits.clear()  # of making the optimizers
            if watch:
                pipe.watch(Trace(pipe.names))
                assert device.host_waits.pop()[0] == "Streams.settle"
            for x, y in minibatches(24):
                pipe.step(x, y)
            records.append(device.timed_records)
            assert not device.host_waits
            if watch:
                pipe.watch(None)
            pipe.drain()
            states.append(copy.deepcopy(pipe.state_dict()))
        assert not device.errors, device.errors[0]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert records[0] == 0 < records[1]


@pytest.mark.parametrize("executor", DEVICES)
def test_nothing_is_recorded_once_watching_has_stopped(executor: str) -> None:
    with fake_device() as device:
        pipe = pipeline(chain(2), executor)
        trace = watched(pipe)
        spans, ticks, records = [len(s) for s in trace.stages], len(trace.host), device.timed_records
        for x, y in minibatches(4):
            pipe.step(x, y)
        pipe.watch(None)
    assert [len(s) for s in trace.stages] == spans
    assert len(trace.host) == ticks == WATCHED
    assert device.timed_records == records


@pytest.mark.parametrize("executor", DEVICES)
def test_an_action_begins_when_what_its_stream_waits_for_in_the_stage_is_over(executor: str) -> None:
    for spans in traced(executor).stages:
        ended = {"F": 0.0, "B": 0.0}
        for action, _ in actions_in(spans):
            assert action.start >= ended["B"]
            if action.name[0] == "F":
                assert action.start >= ended["F"]
            ended[action.name[0]] = action.end


def test_the_wait_for_a_neighbour_is_in_the_channel_and_that_for_the_stages_forward_before_the_step() -> None:
    class Slow(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(200):
                x = x * 1
            return super().forward(x)

    def longest(spans: list[Span], kind: str, part: str) -> float:
        return max(
            (p.end - p.start for a, parts in actions_in(spans) if a.name[0] == kind for p in parts if p.name == part),
            default=0.0,
        )

    with fake_device():
        slow, quick = watched(pipeline([Slow(6, 6), nn.Linear(6, 3)], "streams")).stages
    assert longest(quick, "F", "channel") > 0.15  # seconds of the slow stage's forward
    assert longest(slow, "F", "channel") < 0.01  # the data are there
    assert longest(slow, "B", "wait") > 0.1  # its update waits for the forward beside it
    assert longest(quick, "B", "wait") < 0.01


def test_streams_of_a_stage_overlap_and_count_once() -> None:
    trace = traced("streams")
    times = trace.times()
    for s, (spans, time) in enumerate(zip(trace.stages, times, strict=True)):
        assert {span.stream for span in spans} == set(range(len({span.stream for span in spans})))
        actions = sorted((span.start, span.end) for span in spans if span.name not in INNER)
        overlapped = sum(max(0.0, end - then[0]) for (_, end), then in itertools.pairwise(actions))
        assert (overlapped > 0) == (s < STAGES - 1)
        assert sum(time[:6]) * WATCHED >= trace.seconds() - 1e-9
        assert min(time) > -1e-9
        assert time.utilisation <= 1 + 1e-9
    assert sum(times[-1][:6]) * WATCHED == pytest.approx(trace.seconds())  # on its only stream nothing overlaps
    assert sum(times[0][:6]) * WATCHED > 1.05 * trace.seconds()
    assert 1 < trace.overlap() <= STAGES


@pytest.mark.parametrize("executor", DEVICES)
def test_a_row_for_each_stage_and_stream_and_one_for_the_host(executor: str, tmp_path: Path) -> None:
    trace = traced(executor)
    trace.write(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(rows) == list(range(len(rows)))
    streams = {0: 4, 1: 3, 2: 3, 3: 1}  # as layerpipe.executors.streams.ring has them
    names = [f"stage {s}: {trace.names[s]}, stream {k}" for s, count in streams.items() for k in range(count)]
    assert list(rows.values()) == ["host", *names]
    spans = [e for e in events if e["ph"] == "X"]
    assert [e["name"] for e in spans if e["tid"] == 0] == [f"tick {SKIPPED + i}" for i in range(WATCHED)]
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in spans)
    for row in range(1, len(rows)):  # one after the other on a stream
        actions = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["tid"] == row and e["name"][0] in "FB")
        assert actions
        assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(actions))


def test_every_device_has_an_origin_of_its_own_after_all_are_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_device() as first:
        pipe = pipeline(chain(2), "streams")
        for x, y in minibatches(6):
            pipe.step(x, y)
        second = FakeDevice()
        executor: Any = pipe._executor
        executor._devices.append(second)
        executor.lanes[1].device = second
        done: list[str] = []
        monkeypatch.setattr(first, "wait", lambda: done.append("first waits"))
        monkeypatch.setattr(second, "wait", lambda: done.append("second waits"))
        for name, device in (("first", first), ("second", second)):
            event = device.event
            monkeypatch.setattr(device, "event", lambda event=event, name=name, **o: (done.append(name), event(**o))[1])
        pipe.watch(Trace(pipe.names))
        assert done == ["first waits", "second waits", "first", "second"]
        clocks = [stage.spans._clock for stage in pipe.stages if stage.spans is not None]
        assert [clock._origin.device for clock in clocks] == [first, second]  # type: ignore[attr-defined]


def test_the_fake_device_tells_no_time_that_a_device_could_not() -> None:
    device = FakeDevice()
    plain, one, two = device.event(), device.event(timed=True), device.event(timed=True)
    for event in (plain, one):
        event.record(device.current())
    for first, then, message in ((one, two, "must be recorded"), (one, plain, "with timing"), (one, one, "not ready")):
        with pytest.raises(RuntimeError, match=message):
            first.elapsed_time(then)
    device.wait()
    assert one.elapsed_time(one) == 0
