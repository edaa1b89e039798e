"""SOAP as published, slowly and in float64, for one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64


class SimulatedMatrix:
    """One matrix, algorithm 3 of arXiv 2409.11321: the first moment is kept as it is and turned in every step."""

    def __init__(self, weight: Tensor, left: bool, right: bool) -> None:
        self.weight = weight.detach().to(F64).clone()
        self.rows, self.cols = weight.shape[0], weight.numel() // weight.shape[0]
        self.turned = left, right
        self.steps = 0  # that the matrix has made, the one that begins the preconditioner not counted
        self.grams = [torch.zeros(n, n, dtype=F64) for n in (self.rows, self.cols)]
        self.bases = [torch.eye(n, dtype=F64) for n in (self.rows, self.cols)]
        self.m, self.q = (torch.zeros(self.rows, self.cols, dtype=F64) for _ in range(2))

    def step(
        self, grad: Tensor, lr: float, beta1: float, beta2: float, b: float, eps: float, wd: float, share: float = 0.0
    ) -> None:
        g = grad.to(F64).reshape(self.rows, self.cols)
        self.grams[0] = b * self.grams[0] + (1 - b) * g @ g.T
        self.grams[1] = b * self.grams[1] + (1 - b) * g.T @ g
        direction = torch.zeros_like(g)
        if self.steps:
            left, right = self.bases
            self.m = beta1 * self.m + (1 - beta1) * g
            turned = left.T @ g @ right
            self.q = beta2 * self.q + (1 - beta2) * turned * turned
            mean = left.T @ ((1 - share) * self.m / (1 - beta1**self.steps) + share * g) @ right
            direction = left @ (mean / ((self.q / (1 - beta2**self.steps)).sqrt() + eps)) @ right.T
        self.steps += 1
        w = self.weight
        self.weight = w - lr * direction.reshape(w.shape) - lr * wd * w

    def begin(self, state: dict[str, Tensor]) -> None:
        """Take over the eigenvectors of the first gradient, any of which may be chosen where eigenvalues are equal."""
        for i, name in ((0, "basis_left"), (1, "basis_right")):
            assert (name in state) == self.turned[i]
            if name not in state:
                continue
            basis = self.bases[i] = state[name].clone()
            values = basis.T @ self.grams[i] @ basis
            scale = float(values.diagonal().max())
            torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=F64), rtol=0, atol=1e-12)
            torch.testing.assert_close(values, values.diagonal().diag(), rtol=0, atol=1e-12 * scale)
            assert (values.diagonal().diff() < 1e-12 * scale).all()

    def begin_alone(self) -> None:
        """Find the eigenvectors of the first gradient oneself."""
        self.bases = [
            torch.linalg.eigh(gram)[1].flip(-1) if side else basis
            for gram, basis, side in zip(self.grams, self.bases, self.turned, strict=True)
        ]

    def refresh(self) -> None:
        for i in (0, 1):
            if self.turned[i]:
                self.bases[i] = torch.linalg.qr(self.grams[i] @ self.bases[i]).Q
