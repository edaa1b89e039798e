"""Past weights of another number of updates ago than the delay: what a stage that accumulates gradients asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import layerpipe_kernels as lk
from layerpipe_kernels import decay
from tests.backends import BACKENDS
from tests.kernels.runs import Run

KINDS: list[dict[str, Any]] = [
    {"past": "ema"},
    {"past": lk.Blend(order=2)},
    {"past": lk.Blend(order=3)},
    {"past": lk.Blend(decay="coupled")},
    {"past": "blend", "nesterov": True},
]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_stash_is_exact_for_every_age_up_to_the_delay(backend: str, n: int, capturable: bool) -> None:
    run = Run(delay=n, past="stash", backend=backend, capturable=capturable)
    for t in range(1, 3 * n + 2):
        run.step()
        for age in range(min(t, n) + 1):
            assert torch.equal(run.optimizer.past_weight(run.param, age), run.versions[t - age])
            assert torch.equal(run.optimizer.past_view(run.param, age), run.versions[t - age])


@pytest.mark.parametrize("past", [*KINDS, {"past": "momentum"}], ids=str)
def test_the_delay_is_the_default(past: dict[str, Any]) -> None:
    run = Run(delay=4, **past)
    for t in range(1, 12):
        run.step()
        assert torch.equal(run.optimizer.past_weight(run.param, min(t, 4)), run.optimizer.past_weight(run.param))


@pytest.mark.parametrize("past", KINDS, ids=str)
def test_constant_updates_are_exact_for_every_age(past: dict[str, Any]) -> None:
    run = Run(delay=5, noise=0.0, **past)
    run.step(400)
    for age in range(6):
        torch.testing.assert_close(run.optimizer.past_weight(run.param, age), run.versions[-1 - age], rtol=0, atol=1e-9)


@pytest.mark.parametrize("past", KINDS, ids=str)
def test_an_age_below_the_delay_is_nearly_as_good_as_a_design_of_its_own(past: dict[str, Any]) -> None:
    run = Run(size=4000, delay=7, noise=10.0, **past)
    own = Run(size=4000, delay=6, noise=10.0, **past)
    errors = []
    for each in (run, own):
        each.drift.zero_()
        each.step(30)
        total = 0.0
        for _ in range(15):
            each.step(10)
            true, latest = each.versions[-7], each.versions[-1]
            found = each.optimizer.past_weight(each.param, 6)
            total += float((found - true).square().sum() / (latest - true).square().sum()) / 15
        errors.append(total)
    assert errors[0] < (2.5 if past["past"] == "ema" else 1.6) * errors[1] < 0.2


@pytest.mark.parametrize("n", [2, 3, 6])
def test_the_newest_update_alone_gives_the_weights_before_it(n: int) -> None:
    run = Run(delay=n, past="blend")
    for _ in range(3 * n):
        run.step()
        torch.testing.assert_close(run.optimizer.past_weight(run.param, 1), run.versions[-2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("past", KINDS, ids=str)
def test_taps_for_the_delay_itself_are_those_of_the_design(past: dict[str, Any]) -> None:
    if past["past"] == "ema":
        return
    history = lk.SGD([torch.zeros(1, requires_grad=True)], momentum=0.9, delay=6, **past)
    made = history.history(history.param_groups[0])
    assert made is not None
    taps, update_tap = made.retapped(6)
    assert (*taps, update_tap) == pytest.approx((*made.design.taps, made.design.update_tap), rel=1e-6)


@pytest.mark.parametrize("past", [*KINDS, {"past": "momentum"}, {"past": lk.Blend(norm="match")}], ids=str)
def test_a_clock_on_the_device_gives_the_same(past: dict[str, Any]) -> None:
    torch.manual_seed(0)
    host = Run(delay=4, **past)
    torch.manual_seed(0)
    device = Run(delay=4, capturable=True, **past)
    for t in range(1, 12):
        for run in (host, device):
            torch.manual_seed(t)
            run.step()
        for age in range(min(t, 4) + 1):
            torch.testing.assert_close(
                device.optimizer.past_weight(device.param, age), host.optimizer.past_weight(host.param, age),
                rtol=1e-4, atol=1e-5,
            )  # fmt: skip


def test_norms_are_those_of_that_age() -> None:
    run = Run(delay=4, past=lk.EMA(norm="match"))
    run.step(12)
    for age in range(1, 5):
        norm = run.optimizer.past_weight(run.param, age).norm()
        torch.testing.assert_close(norm, run.versions[-1 - age].norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("past", ["ema", "blend"])
def test_materialized_past_weights_are_those_of_the_delay(past: str) -> None:
    runs = []
    for materialize in ("", ":materialize=true"):
        torch.manual_seed(0)
        runs.append(Run(delay=4, past=past + materialize))
        torch.manual_seed(1)
        runs[-1].step(12)
    for age in range(4):
        torch.testing.assert_close(
            runs[1].optimizer.past_weight(runs[1].param, age), runs[0].optimizer.past_weight(runs[0].param, age)
        )


def test_an_age_that_is_not_kept_is_refused() -> None:
    run = Run(delay=3, past="stash")
    run.step(2)
    with pytest.raises(ValueError, match="after 2 updates with a delay of 3 there is no past of 3 updates ago"):
        run.optimizer.past_weight(run.param, 3)
    run.step(5)
    with pytest.raises(ValueError, match="after 7 updates with a delay of 3 there is no past of 4 updates ago"):
        run.optimizer.past_weight(run.param, 4)


def test_coupled_taps_for_another_delay_sum_to_one() -> None:
    made = decay.blend(6, 2, 0.9, newest=True, coupled=True)
    for n in range(2, 7):
        other = decay.retapped(n, made.decays, 0.9, True, made.turn)
        assert sum(other.taps) + other.update_tap == pytest.approx(1.0)
        assert other.error < 0.05
