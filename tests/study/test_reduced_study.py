"""What must hold of delayed training, on a network that is small enough to be trained here."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

from layerpipe.study import runner, spec
from layerpipe.study.results import Result, results
from layerpipe.study.trial import Outcome, Trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

FILE = Path(__file__).parents[2] / "bench" / "studies" / "reduced.toml"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Result]:
    asked = spec.make(spec.read(FILE))
    records = runner.Records(tmp_path_factory.mktemp("study"), asked, ["study", str(FILE)])

    def on_end(trial: Trial, outcome: Outcome, left: int) -> None:
        assert not outcome.diverged, trial

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        outcomes = runner.execute(asked, records, Path("data"), 1, on_end)
    finally:
        torch.set_num_threads(threads)
    return {(r.row.optimizer, r.row.method if r.row.delay else "undelayed"): r for r in results(asked, outcomes)}


def mean(result: Result) -> float:
    assert result.mean is not None
    return result.mean.value


def test_delays_cost_adamw_much_and_soap_with_its_delays_known_nothing(found: dict[tuple[str, str], Result]) -> None:
    undelayed, stashed = found["adamw", "undelayed"], found["adamw", "stash"]
    assert mean(stashed) < mean(undelayed) - 20
    assert mean(found["soap", "basis-rotation"]) > mean(stashed) + 20
    ours = found["soap", "ours"]
    assert min(ours.qualities) > max(stashed.qualities) + 20
    assert statistics.fmean(ours.beside_adamw) > 0
    assert mean(ours) > mean(found["soap", "basis-rotation"]) - 10


def test_the_kind_of_past_weights_makes_less_of_a_difference_than_the_optimizer(
    found: dict[tuple[str, str], Result],
) -> None:
    pasts = [mean(found["adamw", method]) for method in ("stash", "ema", "blend")]
    assert max(pasts) - min(pasts) < 0.5 * (mean(found["soap", "basis-rotation"]) - max(pasts))


def test_a_blend_is_nearer_to_the_true_weights_than_one_average(found: dict[tuple[str, str], Result]) -> None:
    def worst(method: str) -> float:
        outcomes = found["adamw", method].outcomes.values()
        return max(error for outcome in outcomes for error in outcome.errors if error is not None)

    assert worst("blend") < 0.5 * worst("ema")
    assert worst("ema") < 0.3
