"""The past weights that a backward sees, simulated: the formulas of docs/past_weights.md in plain torch.

``W(t−n) = W(t) + u(t) + … + u(t−n+1)``, and an average ``E`` of the updates ``u`` stands for their sum, ``n E``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layerpipe_kernels import decay as decays

#: The part of an average that PipeMare forgets over a delay, the ``D`` of its ``γ = D^(1/n)`` (arXiv 1910.05124).
PIPEMARE = math.exp(-2)

KINDS = {
    "stash": "the stored weights of the forward: exact (PipeDream, arXiv 1806.03377)",
    "latest": "the newest weights",
    "ema": "one average of the updates; decay=matched, white, window or a number (LayerPipe2, arXiv 2512.08160)",
    "pipemare": "one average with the decay D^(1/n), D = e^-2 (PipeMare's T2, arXiv 1910.05124)",
    "blend": "order=1, 2 or 3 averages and the newest update, designed for n (ours, docs/past_weights.md)",
}
_OPTIONS = {"ema": {"decay": "matched"}, "blend": {"order": "2", "decay": "designed"}}


def parse(text: str) -> tuple[str, dict[str, str]]:
    """``blend:order=2:decay=coupled`` as its kind and options, the defaults filled in.

    Raises:
        ValueError: an unknown kind or option, or a value that it cannot have.
    """
    kind, *rest = text.split(":")
    if kind not in KINDS:
        raise ValueError(f"past {text!r} is unknown; there are: {', '.join(KINDS)}, such as ema:decay=0.9")
    options = dict(_OPTIONS.get(kind, {}))
    for part in rest:
        name, _, value = part.partition("=")
        if name not in options or not value:
            raise ValueError(f"past {text!r}: {kind} has these options: {', '.join(options) or 'none'}; not {part!r}")
        options[name] = value
    if options.get("order", "2") not in ("1", "2", "3"):
        raise ValueError(f"past {text!r}: order is 1, 2 or 3")
    if kind == "blend" and options["decay"] not in ("designed", decays.COUPLED):
        raise ValueError(f"past {text!r}: a blend's decay is designed or {decays.COUPLED}")
    if kind == "ema":
        decay_of(options["decay"], 1)
    return kind, options


def decay_of(text: str, n: int) -> float:
    if text in decays.RULES:
        return decays.resolve(text, n)
    try:
        return decays.resolve(float(text), n)
    except ValueError as error:
        raise ValueError(f"decay={text!r} is neither {', '.join(decays.RULES)} nor a number in [0, 1)") from error


class PastWeights:
    """Estimates a stage's weights of some updates ago from its newest ones and averages of its updates.

    Args:
        past: a kind with its options, see :func:`parse`.
        like: the stage's weights.
        delay: the largest number of updates between a forward and its backward, for which averages are designed.
        correlation: of successive updates: the ``β₁`` of the optimizer.
        horizon: ``p``: the forward sees ``F = W − p u``, weights predicted by so many of the last update.
    """

    def __init__(
        self, past: str, like: Sequence[Tensor], delay: int, *, correlation: float, horizon: float = 0.0
    ) -> None:
        self.kind, options = parse(past)
        self.exact = self.kind == "stash" or delay == 0
        self.delay, self.correlation, self.horizon, self.count = delay, correlation, horizon, 0
        self.design = decays.Blend((), (), 0.0, 0.0)
        if not self.exact and self.kind == "blend":
            order = decays.useful_order(delay, int(options["order"]), newest=True, predicted=horizon > 0)
            coupled = options["decay"] == decays.COUPLED
            self.design = decays.blend(delay, order, correlation, True, coupled=coupled, horizon=horizon)
        elif not self.exact and self.kind != "latest":
            beta = PIPEMARE ** (1 / delay) if self.kind == "pipemare" else decay_of(options["decay"], delay)
            self.design = decays.Blend((beta,), (1 - horizon / delay,), horizon / delay, 0.0)
        self.averages = [[torch.zeros_like(w) for w in like] for _ in self.design.decays]
        self.newest = [torch.zeros_like(w) for w in like]

    def see(self, updates: Sequence[Tensor]) -> None:
        """Takes an update of ``W`` into the averages; while the delay fills, all of them are the mean."""
        self.count += 1
        self.newest = list(updates)
        mean, turn = (self.count - 1) / self.count, self.design.turn
        if self.count <= self.delay:
            betas, turn = [mean] * len(self.averages), 0.0
        else:
            betas = [min(beta, mean) for beta in self.design.decays]
        for i, u in enumerate(self.newest):
            before = [average[i] for average in self.averages]
            after = [u + beta * (e - u) for beta, e in zip(betas, before, strict=True)]
            if turn:
                after[:2] = after[0] + turn * (u - before[1]), after[1] - turn * (u - before[0])
            for average, e in zip(self.averages, after, strict=True):
                average[i] = e

    def at(self, newest: Sequence[Tensor], n: int) -> list[Tensor]:
        """What the forward of ``n`` updates ago saw, estimated from what the newest one sees."""
        if not n or self.kind == "latest":
            return list(newest)
        taps, update_tap = self._taps(n)
        estimate = [w.view_as(u) + update_tap * u for w, u in zip(newest, self.newest, strict=True)]
        for tap, average in zip(taps, self.averages, strict=True):
            estimate = [w + tap * e for w, e in zip(estimate, average, strict=True)]
        return estimate

    def _taps(self, n: int) -> tuple[list[float], float]:
        design, count = self.design, len(self.averages)
        if self.count <= self.delay and count:
            return [float(n), *[0.0] * (count - 1)], self.horizon
        if self.kind != "blend":
            return [n - self.horizon], self.horizon
        if n != self.delay:
            design = decays.retapped(n, design.decays, self.correlation, True, design.turn, horizon=self.horizon)
        return [n * tap for tap in design.taps], n * design.update_tap
