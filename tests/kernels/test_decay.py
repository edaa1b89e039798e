from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerpipe_kernels import decay


def test_matched_has_the_mean_age_of_the_window() -> None:
    for n in range(1, 50):
        b = decay.matched(n)
        assert b / (1 - b) == pytest.approx((n - 1) / 2)


def test_window_has_mean_age_n() -> None:
    assert decay.window(6) / (1 - decay.window(6)) == pytest.approx(6)


@pytest.mark.parametrize("n", [2, 3, 6, 14, 30, 100])
def test_white_minimises_the_error_for_uncorrelated_updates(n: int) -> None:
    grid = np.linspace(0, 0.9999, 20001)
    error = n * (2 * grid**n - 1) + n**2 * (1 - grid) / (1 + grid)
    assert decay.white(n) == pytest.approx(grid[error.argmin()], abs=2e-4)
    assert n < 30 or decay.white(n) == pytest.approx(4 ** (-1 / n), abs=1e-3)


def test_resolve_takes_names_numbers_and_functions() -> None:
    assert decay.resolve("matched", 6) == pytest.approx(5 / 7)
    assert decay.resolve(0.9, 6) == 0.9
    assert decay.resolve(lambda n: 1 / n, 4) == 0.25


@pytest.mark.parametrize("rule", ["fast", 1.0, -0.1, float("nan"), lambda n: 2.0])
def test_resolve_refuses_what_is_no_decay(rule: decay.DecayRule) -> None:
    with pytest.raises(ValueError, match="decay"):
        decay.resolve(rule, 6)


def simulated_error(n: int, design: decay.Blend, rho: float, length: int = 2000) -> float:
    """The design's error by summing autocorrelations term by term, without the module's closed forms."""
    i = np.arange(length)
    filtered = np.zeros(length)
    if design.turn:  # the states themselves, driven by a single update of 1
        state = np.zeros(len(design.decays))
        matrix = np.diag(design.decays)
        matrix[0, 1], matrix[1, 0] = -design.turn, design.turn
        for at, u in enumerate((i == 0).astype(float)):
            state = u + matrix @ (state - u)
            filtered[at] = n * (np.array(design.taps) @ state)
    else:
        for b, c in zip(design.decays, design.taps, strict=True):
            filtered += n * c * (1 - b) * b**i
    filtered[0] += n * design.update_tap
    wanted = (i < n).astype(float)
    correlation = rho ** np.abs(i[:, None] - i[None, :])
    difference = wanted - filtered
    return float(difference @ correlation @ difference / (wanted @ correlation @ wanted))


@pytest.mark.parametrize(
    ("n", "order", "rho"), [(2, 1, 0.9), (6, 1, 0.9), (6, 2, 0.9), (14, 2, 0.9), (6, 3, 0.5), (4, 2, 0.0)]
)
@pytest.mark.parametrize("newest", [True, False])
def test_predicted_error_is_that_of_the_filter(n: int, order: int, rho: float, newest: bool) -> None:
    design = decay.blend(n, order, rho, newest)
    rounding = 1e-6 * n * n * sum(c * c for c in (*design.taps,)) / (n if rho == 0 else 1)
    assert design.error == pytest.approx(simulated_error(n, design, rho), abs=1e-6 + rounding)


@pytest.mark.parametrize(("n", "order", "rho"), [(3, 2, 0.9), (6, 2, 0.9), (14, 3, 0.9), (6, 3, 0.5), (4, 2, 0.0)])
@pytest.mark.parametrize("newest", [True, False])
def test_coupled_averages_come_much_nearer(n: int, order: int, rho: float, newest: bool) -> None:
    coupled, separate = decay.blend(n, order, rho, newest, coupled=True), decay.blend(n, order, rho, newest)
    assert sum(coupled.taps) + coupled.update_tap == pytest.approx(1)
    assert all(0 <= b < 1 for b in coupled.decays)
    rounding = 1e-6 * n * n * sum(c * c for c in coupled.taps) / (n if rho == 0 else 1)
    assert coupled.error == pytest.approx(simulated_error(n, coupled, rho), abs=1e-6 + rounding)
    assert coupled.error < separate.error * (0.8 if rho == 0 else 0.6)


def test_coupled_averages_have_small_taps() -> None:
    """So that bfloat16 averages are nearly as good as float32 ones."""
    for n, order in ((6, 2), (14, 2), (30, 2), (14, 3), (30, 3)):
        assert max(map(abs, decay.blend(n, order, 0.9, coupled=True).taps)) < 2


def test_one_average_has_nothing_to_couple_with() -> None:
    assert decay.blend(6, 1, 0.9, coupled=True) == decay.blend(6, 1, 0.9)


@given(
    n=st.integers(2, 40),
    order=st.integers(1, 3),
    rho=st.sampled_from([0.0, 0.5, 0.9]),
    newest=st.booleans(),
)
def test_blend_is_exact_for_constant_updates_and_never_worse_than_one_average(
    n: int, order: int, rho: float, newest: bool
) -> None:
    design = decay.blend(n, order, rho, newest)
    assert sum(design.taps) + design.update_tap == pytest.approx(1)
    assert newest or design.update_tap == 0
    one_average = simulated_error(n, decay.Blend((decay.matched(n),), (1.0,), 0.0, 0.0), rho, 600)
    assert design.error <= one_average + 1e-3


def test_more_averages_help() -> None:
    errors = [decay.blend(14, order, 0.9).error for order in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0] / 2


def test_fixed_decays_are_kept() -> None:
    assert decay.blend(6, 1, 0.9, True, (decay.matched(6),)).decays == (decay.matched(6),)


def test_one_update_late_needs_only_the_newest_update() -> None:
    assert decay.useful_order(1, 2, newest=True) == 0
    assert decay.blend(1, 0).update_tap == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "delay"),
        ({"n": 4, "order": 4}, "order"),
        ({"n": 4, "order": 0, "newest": False}, "order"),
        ({"n": 4, "correlation": 1.0}, "correlation"),
        ({"n": 4, "decays": (0.5,)}, "decays"),
        ({"n": 4, "decays": (0.5, 0.5)}, "distinct"),
        ({"n": 4, "decays": (0.5, 0.6), "coupled": True}, "cannot be fixed"),
    ],
)
def test_blend_refuses_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decay.blend(**arguments)  # type: ignore[arg-type]


def test_gradients_are_averaged_the_longer_the_later_they_are() -> None:
    decays = [decay.of_gradients(n) for n in (0, 0.5, 1, 7, 18)]
    assert decays[:3] == [0.9, 0.9, 1 - 1 / 14]
    assert decays == sorted(decays)
    assert decay.of_gradients(18) == pytest.approx(1 - 1 / 252)
    assert decay.of_gradients(7, least=0.999) == 0.999
    for wrong in ((-1,), (2, 1.0)):
        with pytest.raises(ValueError, match="at least 0"):
            decay.of_gradients(*wrong)
