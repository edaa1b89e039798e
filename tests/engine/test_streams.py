"""The streams executor on a device that finds races: see fake_device."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import layerpipe
from layerpipe.executors.streams import Lane, ring
from layerpipe.stage.in_place import PastInPlace
from tests.engine.fake_device import Site, fake_device
from tests.engine.models import chain, minibatches
from tests.engine.stream_networks import network, pipeline, run, sgd, train

#: (network, stages, options)
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("chain", 1, {}),
    ("chain", 2, {}),
    ("chain", 3, {"past": "stash"}),
    ("chain", 4, {"max_norm": 1.0}),
    ("chain", 4, {"schedule": "1f1b"}),
    ("chain", 3, {"schedule": "1f1b", "split_backward": True, "past": "ema"}),
    ("chain", 3, {"schedule": "sequential"}),
    ("chain", 3, {"split_backward": True}),
    ("skip", 4, {}),
    ("skip", 3, {"schedule": "1f1b", "split_backward": True}),
    ("recomputed", 3, {}),
    ("dropout", 3, {}),
    ("shifted", 3, {}),
    ("chain", 4, {"accumulate": 3}),
    ("shifted", 3, {"accumulate": 2, "split_backward": True, "past": "stash"}),
]


@pytest.mark.invariant(3)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_races_and_the_weights_are_the_serial_ones(case: tuple[str, int, dict[str, Any]]) -> None:
    kind, count, options = case
    with pipeline(network(kind, count), "serial", **options) as serial:
        want, losses = train(serial, 24), copy.deepcopy(serial.state_dict())
    with fake_device() as device:
        pipe = pipeline(network(kind, count), "streams", **options)
        got = train(pipe, 24)
        state = pipe.state_dict()
    assert not device.errors, device.errors[0]
    assert all(map(torch.equal, want, got))
    assert all(torch.equal(state[name], losses[name]) for name in losses)


def test_a_tick_waits_for_nothing_on_the_host() -> None:
    with fake_device() as device:
        pipe = pipeline(chain(), "streams", max_norm=1.0)
        for x, y in minibatches(12):
            pipe.step(x, y)
        assert not device.host_waits
        pipe.state_dict()
        pipe(*minibatches(1)[0][:1])
        assert not device.host_waits


def test_closing_waits_for_what_has_been_issued() -> None:
    """It uses memory that goes with the pipeline."""
    with fake_device() as device:
        pipe = pipeline(chain(), "streams")
        for x, y in minibatches(3):
            pipe.step(x, y)
        pipe.close()
        assert device.waits == 1
        pipe.close()
        assert device.waits == 1


def sites() -> dict[Site, str]:
    """Every place of the engine that makes a stream wait or keeps memory for it."""
    found: dict[Site, str] = {}
    for case in CASES:
        found.update(run(case, ticks=10).sites)
    return found


@pytest.mark.slow
def test_every_wait_is_needed() -> None:
    """Each one left out is found; else it is one too many, or the detector sees nothing."""
    found = sites()
    assert len(found) >= 8
    missed = []
    for site, what in found.items():
        if not any(run(case, site, ticks=12).errors for case in CASES):
            missed.append((what, site))
    assert not missed


def test_a_recomputing_backward_counts_as_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PastInPlace, "_tell", lambda _: None)
    assert run(("recomputed", 3, {})).errors


def test_everything_in_a_lockstep_tick_may_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But the last stage's forward and its own backward, and updates."""
    ran: list[tuple[Lane, int, dict[int, int]]] = []
    with fake_device() as device:
        clocks = device.handler.syncs.current_sync_states

        def note(lane: Lane) -> None:
            stream = device.current().number
            ran.append((lane, stream, dict(clocks[stream])))

        end, before = Lane.end, Lane.before_update
        monkeypatch.setattr(Lane, "end", lambda lane, a, s: (note(lane) if a.kind == "F" else None, end(lane, a, s)))
        monkeypatch.setattr(Lane, "before_update", lambda lane: (note(lane), before(lane)))
        pipe = pipeline(chain(4), "streams")
        for x, y in minibatches(16):
            ran.clear()
            pipe.step(x, y)
    assert len(ran) == 8
    ordered = [
        (first[0].stage.index, then[0].stage.index)
        for first, then in itertools.combinations(ran, 2)
        if then[2].get(first[1], -1) >= first[2][first[1]]
    ]
    assert ordered == [(3, 3)]


@pytest.mark.parametrize("delay", range(12))
def test_a_forward_and_the_backward_of_its_tick_have_different_streams(delay: int) -> None:
    streams = ring(delay)
    assert (delay % streams != 0) == (delay > 0)
    assert streams <= 5


def test_without_a_cuda_device_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="executor='streams' needs a CUDA device; the stages are on cpu"):
        layerpipe.Pipeline(chain(), F.cross_entropy, sgd, executor="streams")
