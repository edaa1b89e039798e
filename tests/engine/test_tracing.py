"""A trace says what every stage did, and its summary adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerpipe.tracing import Trace
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
        names = [name for name, _, _ in spans]
        assert [n for n in names if n.startswith("F")] == [f"F{m}" for m in range(10 - s, 20 - s)]
        assert [n for n in names if n.startswith("B")] == [f"B{m}" for m in range(10 - 6 + s, 20 - 6 + s)]
        assert names.count("step") == 10
        assert ("past weight" in names) == (s < 3)
        assert ("weight gradients" in names) == (split and s > 0)
    events = json.loads((trace.write(tmp_path / "t.json"), (tmp_path / "t.json").read_text())[1])["traceEvents"]
    assert sum(e["ph"] == "X" for e in events) == count
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in events if e["ph"] == "X")


def test_the_times_of_a_stage_add_up_to_the_tick() -> None:
    trace = Trace(["a", "b"])
    trace.stages[0] += [("layers", 1.0, 3.0), ("F0", 0.0, 4.0), ("past weight", 6.0, 6.5), ("layers", 5.0, 8.0)]
    trace.stages[0] += [("step", 8.0, 9.0), ("B0", 5.0, 10.0)]
    trace.stages[1] += [("channel", 0.0, 6.0), ("B0", 0.0, 8.0)]
    one, two = trace.times()
    assert one == pytest.approx((4.5, 0.5, 1.0, 0.0, 3.0, 1.0, 0.9))
    assert two == pytest.approx((0.0, 0.0, 0.0, 6.0, 2.0, 2.0, 0.2))
    assert sum(one[:6]) == pytest.approx(trace.seconds())
    assert trace.overlap() == pytest.approx(1.1)


def test_nothing_watched_is_no_time() -> None:
    assert Trace(["a"]).times()[0].utilisation == 0.0
