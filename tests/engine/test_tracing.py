"""A trace says what every stage did, and its summary adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerpipe.tracing import Trace
from layerpipe.tracing.spans import Span
from tests.engine.models import minibatches
from tests.engine.pipelines import EXECUTORS, pipeline


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("split", [False, True])
def test_a_trace_holds_every_action_and_what_it_was_made_of(executor: str, split: bool, tmp_path: Path) -> None:
    with pipeline(executor=executor, split_backward=split) as pipe:
        data = minibatches(30)
        for x, y in data[:10]:
            pipe.step(x, y)
        pipe.watch(trace := Trace(pipe.names))
        for x, y in data[10:20]:
            pipe.step(x, y)
        pipe.watch(None)
        count = sum(map(len, trace.stages))
        for x, y in data[20:]:
            pipe.step(x, y)
        assert sum(map(len, trace.stages)) == count  # nobody looks any more
    for s, spans in enumerate(trace.stages):
        names = [span.name for span in spans]
        assert [n for n in names if n.startswith("F")] == [f"F{m}" for m in range(10 - s, 20 - s)]
        assert [n for n in names if n.startswith("B")] == [f"B{m}" for m in range(10 - 6 + s, 20 - 6 + s)]
        assert names.count("step") == 10
        assert ("past weight" in names) == (s < 3)
        assert ("weight gradients" in names) == (split and s > 0)
    events = json.loads((trace.write(tmp_path / "t.json"), (tmp_path / "t.json").read_text())[1])["traceEvents"]
    assert sum(e["ph"] == "X" for e in events) == count
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == [
        f"stage {s}: {name}" for s, name in enumerate(trace.names)
    ]
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in events if e["ph"] == "X")


def test_the_times_of_a_stage_add_up_to_the_tick() -> None:
    trace = Trace(["a", "b"])
    forward = [Span("layers", 1.0, 3.0), Span("F0", 0.0, 4.0)]
    backward = [Span("past weight", 6.0, 6.5), Span("layers", 5.0, 8.0), Span("step", 8.0, 9.0), Span("B0", 5.0, 10.0)]
    trace.add([forward + backward, [Span("channel", 0.0, 6.0), Span("B0", 0.0, 8.0)]])
    one, two = trace.times()
    assert one == pytest.approx((4.5, 0.5, 1.0, 0.0, 3.0, 1.0, 0.9))
    assert two == pytest.approx((0.0, 0.0, 0.0, 6.0, 2.0, 2.0, 0.2))
    assert sum(one[:6]) == pytest.approx(trace.seconds())
    assert trace.overlap() == pytest.approx(1.1)


def test_where_streams_overlap_work_counts_on_each_and_the_stage_once() -> None:
    """A forward on stream 0, a backward on stream 1 that waits for the forward before its step, and both at once::

    stream 0   channel layers  layers  .       .       .
    stream 1   .       .       layers  wait    step    .
    stage b    .       .       .       .       .       B
    """
    trace = Trace(["a", "b"])
    forward = [Span("channel", 0.0, 1.0, 0), Span("layers", 1.0, 3.0, 0), Span("F3", 0.0, 3.0, 0)]
    backward = [
        Span("layers", 2.0, 3.0, 1),
        Span("wait", 3.0, 4.0, 1),
        Span("step", 4.0, 5.0, 1),
        Span("B0", 2.0, 5.0, 1),
    ]
    trace.add([forward + backward, [Span("B0", 5.0, 6.0, 0)]])
    one, two = trace.times()
    # 6 s, of which stream 0 has 3 and stream 1 has 2; together they work from 1 to 3 and from 4 to 5.
    assert one == pytest.approx((3.0, 0.0, 1.0, 1.0, 0.0, 2.0, 3 / 6))
    assert sum(one[:6]) == pytest.approx(trace.seconds() + 1)  # both from 2 to 3
    assert sum(two[:6]) == pytest.approx(trace.seconds())
    assert trace.overlap() == pytest.approx(4 / 6)


def test_what_happens_while_nobody_watches_is_no_part_of_the_time() -> None:
    trace = Trace(["a"])
    for start in (0.0, 100.0):
        trace.add([[Span("B0", start, start + 1), Span("B1", start + 2, start + 3)]])
    trace.add([[]])
    trace.host.append(Span("tick 0", 0.0, 1.5))
    assert trace.seconds() == 6.0
    assert trace.times()[0].idle == pytest.approx(0.5)
    assert trace.times()[0].utilisation == pytest.approx(4 / 6)
    assert trace.issuing() == pytest.approx(0.25)


def test_a_trace_goes_on_after_an_interruption() -> None:
    with pipeline() as pipe:
        trace = Trace(pipe.names)
        for watched in (trace, None, trace, None):
            pipe.watch(watched)
            for x, y in minibatches(10):
                pipe.step(x, y)
        pipe.watch(None)
    for s, spans in enumerate(trace.stages):
        assert sum(span.name.startswith("F") for span in spans) == 20 - s
    first, last = trace.stages[0][0], trace.stages[0][-1]
    assert 0 < trace.seconds() < last.end - first.start


def test_nothing_watched_is_no_time() -> None:
    assert Trace(["a"]).times()[0].utilisation == 0.0
