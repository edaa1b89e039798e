"""Optimizers that know of their delay, in a few lines of plain torch each.

With a gradient ``g`` that is ``n`` updates old, ``m = β₁ m + (1−β₁) g``, bias-corrected ``m̂``, a preconditioner ``P``::

    d = P(a m̂ + b g)        a = β₁^(c n), b = 1 − a     c: spike compensation (arXiv 2003.11666)
    u = lr d + lr wd W       W ← W − u
    F = W − h n x            what the next forward sees   h: weight prediction (arXiv 1809.02839); x: ``predict``

A gradient that is corrected for the curvature comes in as ``g + k q (W − F(t−n))``, ``q`` the average of the squared
gradients and the product in the preconditioner's basis. What others do about delays is in
:mod:`layerpipe.study.corrections`.

Nothing is shared with the optimizers of :mod:`layerpipe_kernels`, so that either checks the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerpipe.study.corrections import DelayCompensation, ErrorFeedback, GapAware
from layerpipe.study.preconditioners import Adam, Identity, Muon, Soap
from layerpipe.study.settings import Settings


class DelayedOptimizer:
    """Steps the weights of one stage.

    Args:
        weights: ``W``, updated in place; matrices are preconditioned as ``(len(w), -1)``.
        matrices: which of them are. The others step with Adam, or as matrices do where those have no matrix products.
    """

    def __init__(self, weights: Sequence[Tensor], matrices: Sequence[bool], settings: Settings) -> None:
        self.settings = settings
        self.weights = [w.flatten(1) if matrix else w for w, matrix in zip(weights, matrices, strict=True)]
        kinds = {"sgd": (Identity, Identity), "adam": (Adam, Adam), "muon": (Adam, Muon), "soap": (Adam, Soap)}
        kind = kinds[settings.optimizer]
        self.preconditioners = [kind[m](w, settings) for w, m in zip(self.weights, matrices, strict=True)]
        self.m = [torch.zeros_like(w) for w in self.weights]
        self.average = [torch.zeros_like(w) for w in self.weights]
        self.gaps = [GapAware(w) for w in self.weights] if settings.gap_aware else []
        scale = settings.compensation
        self.compensations = [DelayCompensation(w, scale) for w in self.weights] if scale else []
        self.feedback = [ErrorFeedback(settings.error_feedback) for _ in weights] if settings.error_feedback else []
        self.count, self.weight = 0, 0.0

    def step(self, grads: Sequence[Tensor], lr: float, n: float, then: Sequence[Tensor]) -> list[Tensor]:
        """Updates ``W`` with gradients that are ``n`` updates old, taken at ``then``.

        Returns ``F``: ``W`` itself without a prediction.
        """
        s = self.settings
        beta1 = s.decay(n)
        a = beta1 if s.nesterov else beta1 ** (s.spike_compensation * n)
        ahead = s.weight_prediction * n
        lr /= s.rescaling(n, self.count)
        self.count += 1
        self.weight += (1 - beta1) * (1 - self.weight)  # of all gradients in m
        norm = torch.stack([g.norm() for g in grads]).norm()
        scale = min(1.0, s.max_norm / (norm.item() + 1e-6)) if s.max_norm else 1.0
        seen = []
        lists = (self.weights, grads, then, self.m, self.average, self.preconditioners)
        for i, (w, g, old, m, average, p) in enumerate(zip(*lists, strict=True)):
            raw = self._corrected(i, g.reshape(w.shape) * scale, w, old.view_as(w), n)
            g = raw + s.curvature * p.change(w - old.view_as(w)) if s.curvature * n else raw
            m.lerp_(g, 1 - beta1)
            m_hat = m / self.weight
            p.see(raw, n)
            u = lr * p(a * m_hat + (1 - a) * g) + lr * s.weight_decay * w
            if self.feedback:
                u = self.feedback[i](u, round(n))
            if self.gaps:
                self.gaps[i].see(u)
            w -= u
            average.lerp_(u, 1 - min(0.9, (self.count - 1) / self.count))
            if ahead:
                x = {"update": lambda: u, "average": lambda: average, "momentum": lambda: lr * p(m_hat)}[s.predict]()  # noqa: B023
                seen.append(w - ahead * x)
            else:
                seen.append(w)
        return seen

    def _corrected(self, i: int, g: Tensor, now: Tensor, then: Tensor, n: float) -> Tensor:
        if n and self.gaps:
            g = self.gaps[i](g, now, then)
        if n and self.compensations:
            g = self.compensations[i](g, now, then)
        return g
