"""The simulation of delayed training, beside a slower one, and its table."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich")
from bench import engine_training, staleness
from layerpipe.study import stability
from layerpipe.study.optimizers import DelayedOptimizer
from layerpipe.study.settings import Settings
from layerpipe.study.training import DelayedTraining, Horizon, Task, train
from layerpipe.theory.planning import stability as planning_stability
from tests.engine.delayed_training import DelayedTraining as Slow

CONSTANT = Horizon(steps=1000, warmup=0, final=1.0)


def loss_fn(y: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(y, target)


def task() -> Task:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4)]
    data = itertools.cycle((torch.randn(6, 5), torch.randn(6, 5)) for _ in range(12))
    loss = lambda model, xy: loss_fn(model(xy[0]), xy[1])
    return Task(
        nn.Sequential(*layers), lambda name: int(name[0]), 4, lambda name: "weight" in name, data, loss, lambda _: 1.0
    )


@pytest.mark.parametrize("schedule", ["sequential", "1f1b", "lockstep"])
@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        (Settings(optimizer="sgd", lr=0.1, beta1=0.0, max_norm=0.0), lambda ps: torch.optim.SGD(ps, lr=0.1)),
        (
            Settings(optimizer="adam", lr=0.01, weight_decay=0.1),
            lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
        ),
    ],
)
def test_it_is_the_slow_simulation(
    schedule: str, settings: Settings, optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> None:
    mine = task()
    slow_model = copy.deepcopy(mine.model)
    assert isinstance(slow_model, nn.Sequential)
    data = [next(mine.minibatches) for _ in range(12)]
    mine.minibatches = iter(data)
    training = DelayedTraining(mine, 4, schedule, settings, CONSTANT)
    losses = [training.step() for _ in data]
    slow = Slow(
        list(slow_model), loss_fn, optimizer, schedule=schedule, past="stash", max_norm=settings.max_norm or None
    )
    expected = slow.train(data)
    torch.testing.assert_close(losses, [x.item() for x in expected], rtol=1e-5, atol=1e-6)
    for a, stage in zip(training.weights, slow.stages, strict=True):
        torch.testing.assert_close(a, [p.detach() for p in stage.parameters()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["sequential", "1f1b", "lockstep"])
@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_the_engine_trains_as_the_simulation_does(optimizer: str, schedule: str) -> None:
    def classes() -> Task:
        made = task()
        data = itertools.cycle([(x, y.argmax(1)) for x, y in itertools.islice(made.minibatches, 12)])
        loss = lambda model, xy: nn.functional.cross_entropy(model(xy[0]), xy[1])
        return dataclasses.replace(made, minibatches=data, loss=loss, matrices=lambda name: name == "1.0.weight")

    settings = Settings(optimizer, lr=0.01, spike_compensation=1.0, weight_prediction=0.5, beta1_delay=14.0, refresh=1)
    horizon = Horizon(steps=12, warmup=6)
    simulated = train(DelayedTraining(classes(), 4, schedule, settings, horizon, microbatches=2), every=1)
    engine = engine_training.train(classes(), 4, schedule, settings, horizon, every=1, microbatches=2, past="stash")
    assert engine["delays"] == simulated["delays"]
    exact = optimizer == "adam"  # SOAP's first gradient makes no step in the engine, as in its authors' code
    torch.testing.assert_close(engine["curve"], simulated["curve"], rtol=1e-5 if exact else 0.05, atol=1e-6)


def test_the_first_minibatches_have_no_delay() -> None:
    training = DelayedTraining(task(), 4, "lockstep", Settings(), CONSTANT, sync_steps=3)
    delays = []
    for _ in range(7):
        delays.append([training.delay(stage) for stage in range(4)])
        training.step()
    assert delays == [[0] * 4] * 4 + [[1, 1, 1, 0], [2, 2, 2, 0], [3, 3, 2, 0]]


@pytest.mark.parametrize(("schedule", "unit"), [("1f1b", 1), ("lockstep", 2)])
@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_delays_of_microbatches_are_those_of_a_stage_that_accumulates(schedule: str, unit: int, m: int) -> None:
    training = DelayedTraining(task(), 4, schedule, Settings(), CONSTANT, microbatches=m)
    for _ in range(10):
        training.step()
    for stage, ahead in enumerate(unit * s for s in (3, 2, 1, 0)):
        delays = [training.delay(stage, i) for i in range(m)]
        assert delays == [(10 * m + i) // m - (10 * m + i - ahead) // m for i in range(m)]
        assert sum(delays) / m == pytest.approx(training.delays[stage])


def test_microbatches_without_a_delay_are_their_minibatch() -> None:
    losses = []
    for m in (1, 3):
        training = DelayedTraining(task(), 4, "sequential", Settings(optimizer="sgd"), CONSTANT, microbatches=m)
        losses.append([training.step() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon", "soap"])
def test_without_a_delay_no_knob_that_depends_on_it_does_anything(optimizer: str) -> None:
    knobs = Settings(
        optimizer=optimizer, spike_compensation=1.0, weight_prediction=1.0, beta1_delay=14.0, lr_delay=0.5, damping=1.0
    )
    results = []
    for settings in (Settings(optimizer=optimizer), knobs):
        training = DelayedTraining(task(), 1, "1f1b", settings, CONSTANT)
        results.append([training.step() for _ in range(5)])
    assert results[0] == results[1]


def test_prediction_moves_what_the_forward_sees_and_not_the_weights() -> None:
    w, g = torch.zeros(2, 3), torch.ones(2, 3)
    settings = Settings(optimizer="sgd", lr=0.5, beta1=0.0, weight_prediction=1.0, max_norm=0.0)
    (seen,) = DelayedOptimizer([w], [True], settings).step([g], lr=0.5, n=4, then=[w])
    assert torch.equal(w, torch.full((2, 3), -0.5))
    assert torch.equal(seen, torch.full((2, 3), -2.5))


@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_a_correction_for_curvature_pulls_back_where_the_weights_have_moved(optimizer: str) -> None:
    w, g = torch.zeros(3, 3), torch.eye(3)
    settings = Settings(optimizer=optimizer, beta1=0.0, curvature=1.0, max_norm=0.0)
    stepped = DelayedOptimizer([w], [True], settings)
    stepped.step([g], lr=0.1, n=2, then=[w.clone()])
    assert torch.all(w.diagonal() < 0)
    before = w.clone()
    stepped.step(
        [torch.zeros(3, 3)], lr=0.1, n=2, then=[torch.zeros(3, 3)]
    )  # of a gradient that W has already followed
    assert torch.all(w.diagonal() > before.diagonal())


def test_worth_is_the_length_of_equal_quality() -> None:
    lengths = [(400, 3.0), (1600, 1.0)]
    assert staleness.worth(2.0, lengths) == pytest.approx(800)
    assert staleness.worth(3.0, lengths) == pytest.approx(400)
    assert math.isnan(staleness.worth(0.9, lengths))


def test_options_are_combined_and_unknown_ones_refused() -> None:
    runs = staleness.grid(["steps=5", "optimizer=adam,soap", "nesterov=true", "seed=0,1"])
    assert len(runs) == 4
    assert runs[0].settings.nesterov
    runs = staleness.grids(["steps=5", "/", "schedule=sequential", "/", "microbatches=1,4"])
    assert [(run.steps, run.schedule, run.microbatches) for run in runs] == [
        (5, "sequential", 1),
        (5, "1f1b", 1),
        (5, "1f1b", 4),
    ]
    assert staleness.grids([]) == [staleness.Run()]
    with pytest.raises(ValueError, match="momentum"):
        staleness.grid(["momentum=0.9"])
    with pytest.raises(ValueError, match="lr is a float"):
        staleness.grid(["lr=fast"])


def test_a_delayed_run_is_compared_with_the_best_undelayed_ones(tmp_path: Path) -> None:
    base = staleness.Run(schedule="sequential", steps=400)
    found = {
        base: {"quality": 3.0},
        dataclasses.replace(base, steps=1600): {"quality": 1.0},
        dataclasses.replace(base, steps=1600, warmup=50): {"quality": 1.5},
        staleness.Run(steps=1600): {"quality": 2.0},
    }
    columns = {c.header: list(c.cells) for c in staleness.table(found, list(found)).columns}
    assert columns["worth"] == ["–", "–", "–", "800"]
    assert columns["extra"][-1] == "2.00"
    file = tmp_path / "runs.json"
    staleness.save(file, runs=[{"options": run.flat(), **result} for run, result in found.items()])
    assert staleness.load(file) == found


def test_losses_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [staleness.Run(steps=120), staleness.Run(steps=120, microbatches=4)]
    staleness.plot(tmp_path / "losses.png", {run: {"curve": [3.0, 2.0, 1.9]} for run in runs}, runs)
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_a_run_that_diverges_ends() -> None:
    training = DelayedTraining(task(), 4, "1f1b", Settings(optimizer="sgd", lr=math.inf, max_norm=0.0), Horizon(200, 0))
    result = train(training, every=10)
    assert math.isnan(result["quality"])
    assert len(result["curve"]) < 20


@pytest.mark.parametrize(("n", "beta"), [(0, 0.5), (2, 0.9), (6, 0.99)])
def test_without_knobs_the_largest_stable_step_is_that_of_an_average(n: int, beta: float) -> None:
    expected = planning_stability.largest_stable_step(n, beta) / (1 - beta)
    assert stability.largest_stable_step(n, beta) == pytest.approx(expected, rel=1e-5)


def test_the_largest_stable_step_is_the_largest() -> None:
    """A quadratic of this curvature, trained by the optimizer itself."""
    n, settings = 3, Settings(optimizer="sgd", beta1=0.9, spike_compensation=1.0, weight_prediction=0.5, max_norm=0.0)
    limit = stability.largest_stable_step(n, 0.9, c=1.0, h=0.5)
    final = []
    for lr in (0.95 * limit, 1.05 * limit):
        w = torch.ones(1, dtype=torch.float64)
        seen, optimizer = [w.clone()] * (n + 1), DelayedOptimizer([w], [False], settings)
        for _ in range(400):
            seen.append(optimizer.step([seen[-1 - n]], lr, n, [w])[0].clone())
        final.append(abs(w.item()))
    assert final[0] < 0.1
    assert final[1] > 10
