from __future__ import annotations

import pytest

from layerpipe import schedule as schedules
from layerpipe.theory import retiming


@pytest.mark.parametrize("name", ["lockstep", "1f1b", "sequential"])
@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("fed", [0, 1, 3, 20])
def test_every_minibatch_passes_every_stage_in_order(name: str, stages: int, fed: int) -> None:
    schedule = schedules.make(name, stages)
    done: list[schedules.Action] = []
    for tick in range(schedule.ticks(fed)):
        done += schedule.tick(tick, min(fed, tick + 1) if tick < fed else fed)
    assert schedule.tick(schedule.ticks(fed), fed) == []
    assert len(done) == len(set(done)) == 2 * stages * fed
    when = {action: i for i, action in enumerate(done)}
    for m in range(fed):
        route = [schedules.Action(s, "F", m) for s in range(stages)]
        route += [schedules.Action(s, "B", m) for s in reversed(range(stages))]
        assert [when[a] for a in route] == sorted(when[a] for a in route)


def test_phases_as_a_person_sees_them() -> None:
    schedule = schedules.make("lockstep", 3)
    assert [schedule.phase(tick, 6) for tick in range(8)] == ["fill"] * 4 + ["steady"] * 2 + ["drain"] * 2


@pytest.mark.parametrize("stages", range(1, 13))
def test_1f1b_is_half_as_late_as_lockstep(stages: int) -> None:
    lockstep, one = (schedules.make(name, stages).delays() for name in ("lockstep", "1f1b"))
    assert one == [stages - 1 - s for s in range(stages)]
    assert lockstep == [2 * n for n in one]


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_1f1b_is_the_order_of_pipedream(stages: int) -> None:
    """Each stage: as many forwards as stages follow, then one forward and one backward in turn, then what is left."""
    fed, schedule = 12, schedules.make("1f1b", stages)
    actions = [a for tick in range(schedule.ticks(fed)) for a in schedule.tick(tick, min(fed, tick + 1))]
    for s in range(stages):
        n = stages - 1 - s
        order = [f"F{m}" for m in range(n)]
        order += [name for m in range(fed - n) for name in (f"F{n + m}", f"B{m}")]
        order += [f"B{m}" for m in range(fed - n, fed)]
        assert [f"{a.kind}{a.minibatch}" for a in actions if a.stage == s] == order


@pytest.mark.parametrize("executor", ["serial", "threads", "distributed"])
def test_auto_is_1f1b_where_one_processor_runs_forward_and_backward_in_turn(executor: str) -> None:
    assert schedules.make("auto", 3, executor).name == "1f1b"


@pytest.mark.parametrize("name", ["lockstep", "1f1b", "sequential"])
@pytest.mark.parametrize("stages", range(1, 9))
def test_delays_are_those_that_retiming_derives(name: str, stages: int) -> None:
    assert schedules.make(name, stages).delays() == retiming.delays(stages, name)


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="lockstep, 1f1b, sequential, auto"):
        schedules.make("gpipe", 2)


@pytest.mark.parametrize("executor", ["streams", "graphs"])
def test_auto_is_lockstep_where_a_forward_and_a_backward_may_run_at_once(executor: str) -> None:
    assert schedules.make("auto", 3, executor).name == "lockstep"
