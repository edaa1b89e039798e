"""What others do to late gradients, on numbers that can be checked by hand."""

from __future__ import annotations

import pytest
import torch

from layerpipe.study.corrections import DelayCompensation, ErrorFeedback, GapAware
from layerpipe.study.optimizers import DelayedOptimizer
from layerpipe.study.settings import Settings


def test_a_gap_of_one_mean_step_halves_the_gradient() -> None:
    gap = GapAware(torch.zeros(3))
    gap.see(torch.tensor([0.1, 0.2, 0.0]))
    g = gap(torch.ones(3), torch.tensor([0.1, 0.6, 0.0]), torch.zeros(3))
    torch.testing.assert_close(g, torch.tensor([0.5, 0.25, 1.0]))


def test_compensation_adds_the_squared_gradient_times_what_the_weights_have_moved() -> None:
    g = torch.tensor([2.0])
    corrected = DelayCompensation(g, scale=3.0, decay=0.75)(g, now=torch.tensor([0.5]), then=torch.tensor([0.25]))
    torch.testing.assert_close(corrected, torch.tensor([2.0 + 3.0 * 4.0 * 0.25 / 1.0]))  # the root of 0.25 * 4


def test_error_feedback_repeats_what_the_step_of_a_delay_ago_lacked() -> None:
    feedback = ErrorFeedback(1.0)
    steps = [feedback(torch.tensor([float(x)]), 2).item() for x in (1, 2, 4, 8)]
    assert steps == [1, 2, 4 + (4 - 1), 8 + (8 - 2)]
    assert ErrorFeedback(1.0)(torch.tensor([3.0]), 0).item() == 3


def test_a_rescaled_learning_rate_comes_back_over_its_steps() -> None:
    settings = Settings(lr_delay=1.0, lr_delay_steps=10)
    assert settings.rescaling(3, 0) == 4
    assert settings.rescaling(3, 5) == pytest.approx(2)
    assert settings.rescaling(3, 10) == settings.rescaling(3, 100) == 1
    assert Settings(lr_delay=0.5).rescaling(3, 100) == 2


@pytest.mark.parametrize(
    "change", [{"gap_aware": True}, {"compensation": 1.0}, {"error_feedback": 1.0}, {"lr_delay": 1.0}]
)
def test_a_correction_changes_late_steps_and_no_others(change: dict[str, float]) -> None:
    def trained(n: float, **change: float) -> torch.Tensor:
        torch.manual_seed(0)
        w = torch.zeros(4)
        optimizer = DelayedOptimizer([w], [False], Settings(optimizer="adam", max_norm=0.0, **change))
        for _ in range(6):
            optimizer.step([torch.randn(4)], lr=0.1, n=n, then=[w + 0.1])
        return w

    assert torch.equal(trained(0, **change), trained(0))
    assert not torch.equal(trained(2, **change), trained(2))
