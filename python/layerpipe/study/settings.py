"""The options of the optimizers that a simulation steps with."""

from __future__ import annotations

import dataclasses

OPTIMIZERS = ("sgd", "adam", "muon", "soap")
PREDICTED = ("update", "momentum", "average")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one run's optimizers; a stage's own values follow from its delay ``n``.

    Attributes:
        beta1: decay of the gradients' average; with ``beta1_delay`` its time constant ``1/(1−β₁)`` is at least
            ``beta1_delay · n``.
        spike_compensation: ``c``.
        nesterov: ``b = 1−β₁`` whatever the delay, in place of ``c``.
        weight_prediction: ``h``.
        predict: the ``x`` that is multiplied: the last ``update``, ``momentum`` (``lr P(m̂)``) or the ``average`` of
            past updates (decay .9).
        lr_delay: the learning rate is divided by ``(1+n)^lr_delay``.
        lr_delay_steps: updates over which that power falls linearly to 0; 0: it stays.
        curvature: ``k``.
        damping: ``δ``: a preconditioner divides its direction of root mean square gradient ``r`` by
            ``r (1 + δ n r/r̄)``, ``r̄`` over its matrix.
        compensation: ``λ₀`` of :class:`~layerpipe.study.corrections.DelayCompensation`.
        gap_aware: divide gradients as :class:`~layerpipe.study.corrections.GapAware` does.
        error_feedback: ``θ`` of :class:`~layerpipe.study.corrections.ErrorFeedback`.
        sides: SOAP turns both sides of a matrix, or 1: the shorter one.
    """

    optimizer: str = "soap"
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    spike_compensation: float = 0.0
    nesterov: bool = False
    weight_prediction: float = 0.0
    predict: str = "update"
    beta1_delay: float = 0.0
    lr_delay: float = 0.0
    lr_delay_steps: int = 0
    curvature: float = 0.0
    damping: float = 0.0
    compensation: float = 0.0
    gap_aware: bool = False
    error_feedback: float = 0.0
    refresh: int = 10
    sides: int = 2
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        for name, values in (("optimizer", OPTIMIZERS), ("predict", PREDICTED), ("sides", (1, 2))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(map(str, values))}")

    def decay(self, n: float) -> float:
        """``β₁`` of a stage with delay ``n``."""
        return max(self.beta1, 1 - 1 / (self.beta1_delay * n)) if self.beta1_delay * n > 1 else self.beta1

    def rescaling(self, n: float, step: int) -> float:
        """Return what the learning rate of a stage with delay ``n`` is divided by in its ``step``-th update, from 0."""
        power = self.lr_delay
        if self.lr_delay_steps:
            power *= max(0.0, 1 - step / self.lr_delay_steps)
        return float((1 + n) ** power)
