"""Optimizers that know of their delay, in a few lines of plain torch each: what :mod:`bench.staleness` compares.

With a gradient ``g`` that is ``n`` updates old, ``m = β₁ m + (1−β₁) g``, bias-corrected ``m̂``, a preconditioner ``P``::

    d = P(a m̂ + b g)        a = β₁^(c n), b = 1 − a     c: spike compensation (arXiv 2003.11666)
    u = lr d + lr wd W       W ← W − u
    F = W − h n x            what the next forward sees   h: weight prediction (arXiv 1809.02839); x: ``predict``

A gradient that is corrected for the curvature comes in as ``g + k q (W − F(t−n))``, ``q`` the average of the squared
gradients and the product in the preconditioner's basis. In the plain basis it is DC-ASGD's (arXiv 1609.08326).

Nothing is shared with the optimizers of :mod:`layerpipe_kernels`, so that either checks the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

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
        curvature: ``k``.
        damping: ``δ``: a preconditioner divides its direction of root mean square gradient ``r`` by
            ``r (1 + δ n r/r̄)``, ``r̄`` over its matrix.
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
    curvature: float = 0.0
    damping: float = 0.0
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


class Adam:
    """Divides by the root of the squared gradients' bias-corrected average."""

    def __init__(self, like: Tensor, settings: Settings) -> None:
        self.settings, self.v, self.count = settings, torch.zeros_like(like), 0
        self.divisor = torch.ones_like(like)

    def see(self, g: Tensor, n: float) -> None:
        """Takes a gradient into the second moments."""
        beta2, damping = self.settings.beta2, self.settings.damping
        self.count += 1
        self.v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        r = (self.v / (1 - beta2**self.count)).sqrt()
        self.divisor = r + self.settings.eps
        if damping * n and r.dim() > 1:
            self.divisor *= 1 + damping * n * r / r.square().mean().sqrt().clamp(min=1e-30)

    def __call__(self, d: Tensor) -> Tensor:
        return d / self.divisor

    def change(self, moved: Tensor) -> Tensor:
        """Of the gradient where the weights have moved, up to a factor; of the moments before this gradient."""
        return self.v / (1 - self.settings.beta2**self.count) * moved if self.count else torch.zeros_like(moved)


class Soap(Adam):
    """Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., arXiv 2409.11321), of a matrix ``r x c``."""

    def __init__(self, like: Tensor, settings: Settings) -> None:
        super().__init__(like, settings)
        r, c = like.shape
        self.left = settings.sides == 2 or r <= c
        self.right = settings.sides == 2 or c < r
        self.covariances: list[Tensor] = []
        self.bases: list[Tensor] = []

    def see(self, g: Tensor, n: float) -> None:
        products = [g @ g.T] * self.left + [g.T @ g] * self.right
        if not self.bases:
            self.covariances = products
            self.bases = [torch.linalg.eigh(each)[1].flip(-1) for each in products]  # as power iterations sort them
        else:
            decay = min(self.settings.beta2, self.count / (self.count + 1))
            for covariance, product in zip(self.covariances, products, strict=True):
                covariance.lerp_(product, 1 - decay)
            if (self.count + 1) % self.settings.refresh == 0:
                self.bases = [torch.linalg.qr(l @ q)[0] for l, q in zip(self.covariances, self.bases, strict=True)]
        super().see(self._turn(g, back=False), n)

    def __call__(self, d: Tensor) -> Tensor:
        return self._turn(super().__call__(self._turn(d, back=False)), back=True)

    def change(self, moved: Tensor) -> Tensor:
        return self._turn(super().change(self._turn(moved, back=False)), back=True) if self.bases else moved * 0

    def _turn(self, x: Tensor, back: bool) -> Tensor:
        if self.left:
            x = (self.bases[0] if back else self.bases[0].T) @ x
        if self.right:
            x = x @ (self.bases[-1].T if back else self.bases[-1])
        return x


class Identity:
    def __init__(self, like: Tensor, settings: Settings) -> None:
        """Has no state."""

    def see(self, g: Tensor, n: float) -> None:
        """Has no state."""

    def __call__(self, d: Tensor) -> Tensor:
        return d

    def change(self, moved: Tensor) -> Tensor:
        raise ValueError("curvature is that of squared gradients, which only adam and soap average")


class Muon(Identity):
    """The nearest orthogonal matrix by five Newton-Schulz steps, of Adam's norm (Liu et al., arXiv 2502.16982)."""

    def __init__(self, like: Tensor, settings: Settings) -> None:
        self.scale = 0.2 * max(like.shape) ** 0.5

    def __call__(self, d: Tensor) -> Tensor:
        x = d / (d.norm() + 1e-7)
        x = x.T if len(x) > x.size(1) else x
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return self.scale * (x.T if x.shape != d.shape else x)


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
        self.count, self.weight = 0, 0.0

    def step(self, grads: Sequence[Tensor], lr: float, n: float, then: Sequence[Tensor]) -> list[Tensor]:
        """Updates ``W`` with gradients that are ``n`` updates old, taken at ``then``.

        Returns ``F``: ``W`` itself without a prediction.
        """
        s = self.settings
        beta1 = s.decay(n)
        a = beta1 if s.nesterov else beta1 ** (s.spike_compensation * n)
        ahead = s.weight_prediction * n
        lr /= (1 + n) ** s.lr_delay
        self.count += 1
        self.weight += (1 - beta1) * (1 - self.weight)  # of all gradients in m
        norm = torch.stack([g.norm() for g in grads]).norm()
        scale = min(1.0, s.max_norm / (norm.item() + 1e-6)) if s.max_norm else 1.0
        seen = []
        lists = (self.weights, grads, then, self.m, self.average, self.preconditioners)
        for w, g, old, m, average, p in zip(*lists, strict=True):
            raw = g.reshape(w.shape) * scale
            g = raw + s.curvature * p.change(w - old.view_as(w)) if s.curvature * n else raw
            m.lerp_(g, 1 - beta1)
            m_hat = m / self.weight
            p.see(raw, n)
            u = lr * p(a * m_hat + (1 - a) * g) + lr * s.weight_decay * w
            w -= u
            average.lerp_(u, 1 - min(0.9, (self.count - 1) / self.count))
            if ahead:
                x = {"update": lambda: u, "average": lambda: average, "momentum": lambda: lr * p(m_hat)}[s.predict]()  # noqa: B023
                seen.append(w - ahead * x)
            else:
                seen.append(w)
        return seen
