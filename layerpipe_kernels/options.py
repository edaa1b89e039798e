"""Arguments of a step: the optimizer's hyperparameters, what to keep of the past, and the values of this one step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MAX_EMAS = 3
MAX_TERMS = 4


class SgdOptions(NamedTuple):
    """SGD's hyperparameters, named and defined as in :class:`torch.optim.SGD`.

    ``newest_share`` is spike compensation's ``b``: the direction is ``(1 - b) v`` plus ``b (1 - dampening) /
    (1 - momentum) g``.
    """

    lr: float | Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    newest_share: float = 0.0


class AdamOptions(NamedTuple):
    """Adam's hyperparameters, named and defined as in :class:`torch.optim.AdamW`; AMSGrad is a state, not an option.

    ``decoupled`` weight decay is AdamW's; without it the decay is added to the gradient, as in Adam. ``newest_share``
    is spike compensation's ``b``: the direction is ``((1 - b) mhat + b g) / (sqrt(qhat) + eps)``.
    """

    lr: float | Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    maximize: bool = False
    newest_share: float = 0.0


class DirectionOptions(NamedTuple):
    """Hyperparameters of an update whose direction ``d`` is given: ``u = lr d + lr weight_decay W``."""

    lr: float | Tensor
    weight_decay: float = 0.0


Options = SgdOptions | AdamOptions | DirectionOptions


class PastDesign(NamedTuple):
    """The averages that a step keeps of updates: constant over a training run, see :mod:`layerpipe_kernels.history`.

    ``What = W + update_tap u + sum_k taps[k] E_k`` after ``E_k = decays[k] E_k + (1 - decays[k]) u``. With a ``turn``
    the first two are coupled: their distances from ``u`` are turned about each other as well as shrunk.
    """

    delay: int = 0  # n, in updates
    decays: tuple[float, ...] = ()  # per EMA
    taps: tuple[float, ...] = ()  # per EMA
    update_tap: float = 0.0
    fill_ratio: float = 1.0  # without EMAs, how an update was to the one after it while the delay fills
    ema_of_gradient: bool = False
    seed: int = 0  # of bfloat16 averages' stochastic rounding
    turn: float = 0.0  # E_0 += turn (u - E_1) and E_1 -= turn (u - E_0), of the averages before the update
    fill_tap: float = 0.0  # with EMAs, `update_tap` while the delay fills: the horizon, where weights are predicted

    def at(self, t: int) -> tuple[tuple[float, ...], tuple[float, ...], float]:
        """Returns decays, taps and ``update_tap`` of update ``t``, counted from 1; 0: long after the delay has filled.

        While ``t <= n`` every EMA is the mean of all updates, so that ``t`` times it is exactly their sum. After that
        no update may weigh more than it would in that mean.
        """
        decays = self.decays
        if t and decays:
            mean = (t - 1) / t
            decays = (mean,) * len(decays) if t <= self.delay else tuple(min(decay, mean) for decay in decays)
        return decays, *self.taps_at(t)

    def taps_at(self, t: int) -> tuple[tuple[float, ...], float]:
        """Returns, of :meth:`at`, the taps and ``update_tap``."""
        if t == 0 or t > self.delay:
            return self.taps, self.update_tap
        if self.decays:
            return (float(t), *[0.0] * (len(self.taps) - 1)), self.fill_tap
        return (), sum(self.fill_ratio**i for i in range(t)) if self.update_tap else 0.0

    def turn_at(self, t: int) -> float:
        """Returns ``turn`` in update ``t``, counted as in :meth:`at`; 0 while the delay fills."""
        return self.turn if t == 0 or t > self.delay else 0.0


class StepArguments(NamedTuple):
    """Arguments that change from step to step. Tensors are read by the step on its own device, without a wait."""

    t: int = 0  # updates of the group, this one included; 0 is long after its delay has filled
    clock: Tensor | None = None  # int64 scalar: updates before this one, instead of ``t``; counted up by the step
    grad_scale: Tensor | None = None  # float32 scalar that the gradients are divided by
    found_inf: Tensor | None = None  # float32 scalar; nonzero: change nothing
    horizon: float = 0.0  # p of weight prediction, in updates: the weights in memory become F = W - p u
    horizon_before: float = 0.0  # p that they were predicted with
    horizon_at: Tensor | None = None  # float32 scalar, instead of `horizon_before`; set to `horizon` by the step


NO_PAST = PastDesign()
STEADY = StepArguments()
