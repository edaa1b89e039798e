"""Preconditioners of :mod:`layerpipe.study.optimizers`: what divides or turns a direction before it becomes an update.

Each takes every gradient into its state (``see``), and is then called with a direction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerpipe.study.settings import Settings


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
            self.bases = [_eigenvectors(each) for each in products]
        else:
            decay = min(self.settings.beta2, self.count / (self.count + 1))
            for covariance, product in zip(self.covariances, products, strict=True):
                covariance.lerp_(product, 1 - decay)
            if (self.count + 1) % self.settings.refresh == 0:
                pairs = zip(self.covariances, self.bases, strict=True)
                self.bases = [torch.linalg.qr(covariance @ basis)[0] for covariance, basis in pairs]
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


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix, as power iterations sort them."""
    vectors: Tensor
    try:
        _, vectors = torch.linalg.eigh(matrix)
        failed = not vectors.isfinite().all()
    except RuntimeError:
        failed = True
    if failed:  # too many equal eigenvalues for float32: it raises, or gives NaN
        _, vectors = torch.linalg.eigh(matrix.double())
    return vectors.flip(-1).to(matrix.dtype)


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
        self.scale = 0.2 * math.sqrt(max(like.shape))

    def __call__(self, d: Tensor) -> Tensor:
        x = d / (d.norm() + 1e-7)
        x = x.T if len(x) > x.size(1) else x
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        orthogonal: Tensor = x.T if x.shape != d.shape else x
        return self.scale * orthogonal
