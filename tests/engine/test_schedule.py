from __future__ import annotations

import pytest

from layerpipe import schedule as schedules


@pytest.mark.parametrize("name", ["lockstep", "sequential"])
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


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="lockstep, sequential"):
        schedules.make("gpipe", 2)
