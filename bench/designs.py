"""What a filter of few states can come near to, by the model that blends are designed with.

    python -m bench.designs

Relative mean-square error of the last ``n`` updates' sum, for updates of autocorrelation ``rho**|i-j|``: of averages
that do not see each other (``blend``), of averages of which two turn about each other (``coupled``), and of a Legendre
delay line (the states of a Legendre Memory Unit, Voelker et al. 2019, held over a step), whose first state is the
window's mean. Blends with and without the newest update as one more term, the delay line without.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from layerpipe_kernels import decay

DELAYS, CORRELATIONS = (2, 6, 14, 30), (0.9, 0.0)


def legendre(n: int, order: int) -> np.ndarray:
    """The delay line's answer to one update of 1, ``(30 n + 60,)``, scaled to be exact for constant updates."""
    rows = torch.arange(order, dtype=torch.float64)
    i, j = rows[:, None], rows[None, :]
    sign = torch.where(i < j, -1.0, (-1.0) ** (i - j + 1))
    system = torch.zeros(order + 1, order + 1, dtype=torch.float64)
    system[:order, :order] = (2 * i + 1) * sign / n
    system[:order, order] = (2 * rows + 1) * (-1.0) ** rows / n
    step = torch.linalg.matrix_exp(system)
    state, answer = step[:order, order].clone(), []
    for _ in range(30 * n + 60):
        answer.append(float(state[0]))
        state = step[:order, :order] @ state
    return np.array(answer) * n / sum(answer)


def error(n: int, answer: np.ndarray, rho: float) -> float:
    """Of a filter, summed term by term."""
    i = np.arange(len(answer))
    correlation = rho ** np.abs(i[:, None] - i[None, :])
    wanted = (i < n).astype(float)
    missed = wanted - answer
    return float(missed @ correlation @ missed / (wanted @ correlation @ wanted))


def row(n: int, rho: float, newest: bool) -> Sequence[float | None]:
    designed = [
        decay.blend(n, decay.useful_order(n, order, newest), rho, newest, coupled=coupled).error
        for coupled, order in itertools.product((False, True), (2, 3))
    ]
    return [*designed, *(None if newest else error(n, legendre(n, order), rho) for order in (2, 3))]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| rho | n | newest update | blend 2 | blend 3 | coupled 2 | coupled 3 | Legendre 2 | Legendre 3 |")
    print("| --- " * 9 + "|")
    for rho, newest, n in itertools.product(CORRELATIONS, (True, False), DELAYS):
        cells = " | ".join("–" if e is None else f"{e:.2g}" for e in row(n, rho, newest))
        print(f"| {rho} | {n} | {'yes' if newest else 'no'} | {cells} |")


if __name__ == "__main__":
    main()
