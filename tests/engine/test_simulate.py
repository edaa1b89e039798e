from __future__ import annotations

import itertools
import json

import pytest

from layerpipe.theory.simulate import (
    BUILDERS,
    Key,
    Link,
    StageCost,
    Task,
    Wait,
    in_order,
    layerpipe,
    place,
    report,
    run,
    to_chrome,
)

EVEN = StageCost(forward=1, backward=1, gradient=1, received=100)


@pytest.mark.parametrize("stages", [1, 2, 4, 7])
@pytest.mark.parametrize("parts", [1, 4, 8, 32])
def test_gpipe_has_its_published_bubble(stages: int, parts: int) -> None:
    found = report(run(BUILDERS["gpipe"]([EVEN] * stages, 1, parts)))
    assert found.bubble == pytest.approx((stages - 1) / (parts + stages - 1))
    assert found.staleness == [0] * stages
    assert found.in_flight == [parts] * stages


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize(("name", "factor"), [("sequential", 0), ("gpipe", 0), ("1f1b", 1), ("lockstep", 2)])
def test_counted_staleness_is_the_solvers(name: str, factor: int, stages: int) -> None:
    from layerpipe.theory import retiming

    found = report(run(BUILDERS[name]([EVEN] * stages, 30, 4)))
    assert found.staleness == [factor * (stages - 1 - s) for s in range(stages)]
    if name in retiming.CLOCKINGS:
        derivation = retiming.derive(stages, [[s] for s in range(stages)], name)
        assert found.staleness == derivation.delays
        assert found.in_flight == derivation.in_flight


def test_async_schedules_keep_every_processor_busy_and_sequential_one() -> None:
    stages = [EVEN] * 4
    for name, period in (("sequential", 12), ("1f1b", 3), ("lockstep", 3), ("gpipe", 3 * (8 + 3) / 8)):
        found = report(run(BUILDERS[name](stages, 60, 8)))
        assert found.period == pytest.approx(period), name


def test_the_slowest_stage_sets_the_pace() -> None:
    stages = [EVEN, StageCost(2, 2, 1), EVEN]
    for name in ("1f1b", "lockstep"):
        assert report(run(BUILDERS[name](stages, 60, 1))).period == pytest.approx(5)


def test_gpipe_updates_once_per_minibatch() -> None:
    costs = [StageCost(1, 1, 1, update=10)] * 2
    tasks = BUILDERS["gpipe"](costs, 3, 4)
    assert sum(task.updates for task in tasks) == 2 * 3
    assert sum(task.seconds for task in tasks) == pytest.approx(2 * 3 * (3 + 10))


def test_an_update_that_ends_when_a_backward_starts_counts() -> None:
    costs = [StageCost(forward=0, backward=1, gradient=1)] * 3  # nothing lies between two backwards
    assert report(run(BUILDERS["1f1b"](costs, 20, 1))).staleness == [2, 1, 0]


def test_links_take_time_and_1f1b_feels_it_before_lockstep_does() -> None:
    stages = [EVEN] * 4
    slow = Link(latency=0.7)
    one, lock = (report(run(BUILDERS[name](stages, 80, 1), slow)).period for name in ("1f1b", "lockstep"))
    assert lock == pytest.approx(3)  # there is a tick of slack each way
    assert one > 3.5
    bytes_sent = report(run(BUILDERS["1f1b"](stages, 10, 1))).bytes_sent
    assert bytes_sent == 2 * 3 * 100


def test_a_link_carries_one_message_at_a_time() -> None:
    source = [Task(Key("F", 0, m), 0, 1.0) for m in range(2)]
    sink = [Task(Key("F", 1, m), 1, 0.0, (Wait(Key("F", 0, m), 30),)) for m in range(2)]
    timeline = run([*source, *sink], Link(bandwidth=10, latency=0.5))
    assert [(m.start, m.end) for m in timeline.messages] == [(1.0, 4.5), (4.0, 7.5)]
    assert timeline.makespan == 7.5


def test_ready_tasks_run_by_priority_and_ordered_ones_in_order() -> None:
    tasks = [Task(Key("F", 0, m), 0, 1.0, priority=(-m,)) for m in range(3)]
    assert [e.key.minibatch for e in run(tasks).tasks] == [2, 1, 0]
    assert [e.key.minibatch for e in run(in_order(tasks)).tasks] == [0, 1, 2]


@pytest.mark.parametrize("name", BUILDERS)
def test_nothing_overlaps_on_a_processor_and_nothing_runs_before_what_it_needs(name: str) -> None:
    stages = [StageCost(1 + s % 2, 2, 1, 0.5, 10) for s in range(4)]
    tasks = BUILDERS[name](stages, 9, 3)
    timeline = run(tasks, Link(100.0, 0.1))
    ends = {event.key: event.end for event in timeline.tasks}
    starts = {event.key: event.start for event in timeline.tasks}
    assert len(ends) == len(tasks)
    for task in tasks:
        assert all(ends[wait.key] <= starts[task.key] for wait in task.after)
    for processor in range(4):
        mine = [event for event in timeline.tasks if event.processor == processor]
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine))


def test_mistakes_are_named() -> None:
    a, b = Key("F", 0, 0), Key("F", 1, 0)
    with pytest.raises(ValueError, match="wait for each other"):
        run([Task(a, 0, 1, (Wait(b),)), Task(b, 0, 1, (Wait(a),))])
    with pytest.raises(ValueError, match="does not exist"):
        run([Task(a, 0, 1, (Wait(b),))])
    with pytest.raises(ValueError, match="two tasks"):
        run([Task(a, 0, 1), Task(a, 0, 2)])
    with pytest.raises(ValueError, match="nothing ran"):
        report(run([]))
    with pytest.raises(ValueError, match="at least one processor"):
        place([EVEN], 0)


# -- LayerPipe -----------------------------------------------------------------------------------------------------


def test_layerpipe_does_all_the_work_once() -> None:
    layers = [StageCost(1 + (i % 3), 1 + (i % 2), 1, received=10) for i in range(9)]
    for processors in range(1, 8):
        pieces = place(layers, processors).pieces
        for number in range(9):
            for kind in "FBW":
                shares = [p.share for p in pieces if p.kind == kind and p.layer == number]
                assert sum(shares) == pytest.approx(1)
                assert len(shares) <= (2 if kind == "B" else 1)
        order = [p.processor for p in pieces]
        assert order == sorted(order)


def test_layerpipe_balances_what_whole_layers_cannot() -> None:
    """Three equal layers on two processors: whole layers give 6 and 3, split gradients 4.5 each."""
    layers = [EVEN] * 3
    assert place(layers, 2).period == pytest.approx(4.5)
    found = report(run(layerpipe(layers, 2, 60)))
    assert found.period == pytest.approx(4.5, rel=0.03)
    assert sum(found.busy) == pytest.approx(60 * 9)


def test_layerpipe_is_never_faster_than_its_busiest_processor() -> None:
    layers = [StageCost(1 + (i % 4), 2 + (i % 2), 1.5, received=10) for i in range(11)]
    for processors in (1, 3, 5, 8):
        bound = place(layers, processors).period
        assert bound <= report(run(layerpipe(layers, processors, 120))).period <= 1.15 * bound


def test_layerpipe_sends_weights_where_a_layer_is_spread() -> None:
    whole = report(run(layerpipe([EVEN] * 4, 2, 40, [10**6] * 4)))
    spread = report(run(layerpipe([EVEN] * 3, 2, 40, [10**6] * 3)))
    assert whole.bytes_sent < 10**6 <= spread.bytes_sent


# -- out -----------------------------------------------------------------------------------------------------------


def test_the_chrome_trace_holds_every_task() -> None:
    tasks = BUILDERS["1f1b"]([EVEN] * 2, 3, 1)
    events = json.loads(to_chrome({"1f1b": run(tasks, Link(100.0))}))["traceEvents"]
    assert sum(e["ph"] == "X" for e in events) == len(tasks)
    assert {e["name"] for e in events if e["ph"] == "X"} == {f"{k}{m}" for k in "FB" for m in range(3)}
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")
    assert sum(e["ph"] == "s" for e in events) == sum(e["ph"] == "f" for e in events) == 6
