"""Methods against delays: one name for each method, with its formula and its source.

``W`` are a stage's weights, ``n`` its delay in updates, ``u`` an update, ``m̂`` the average of gradients ``g`` and ``P``
the optimizer's preconditioner, as in :mod:`layerpipe.study.optimizers`. A method fixes what it names and leaves the
rest to the study: most can be combined with any optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple


class Method(NamedTuple):
    """A method by its parts; ``None``, 0 and nothing are what the study says otherwise.

    Attributes:
        settings: of :class:`layerpipe.study.settings.Settings`.
        past: the weights that a backward sees, see :mod:`layerpipe.study.past`.
        optimizer: the only one that it is defined for.
        accumulate: ``"one"``: as many microbatches per update as make the largest delay one update; ``"half"``: half as
            many as there are stages, rounded down; both to a power of two.
        rescaled: share of the training over which PipeMare's learning rates come back.
        synchronous: share of the training, at its beginning, without a delay.
    """

    title: str
    formula: str
    source: str
    settings: Mapping[str, Any] = MappingProxyType({})
    past: str | None = None
    optimizer: str | None = None
    accumulate: Literal["one", "half"] | None = None
    rescaled: float = 0.0
    synchronous: float = 0.0


_PIPEMARE = "PipeMare (Yang et al., arXiv 1910.05124)"
_OURS = {"spike_compensation": 1.0, "weight_prediction": 0.5, "beta1_delay": 14.0}

METHODS = {
    "none": Method("nothing", "W ← W − lr P(m̂)", "–"),
    "stash": Method(
        "weight stashing", "backward at the stored W(t−n)", "PipeDream (Narayanan et al., arXiv 1806.03377)",
        past="stash",
    ),
    "latest": Method("latest weights", "backward at W(t)", "LayerPipe2's comparison, arXiv 2512.08160", past="latest"),
    "fixed-ema": Method(
        "fixed EMA", "backward at W(t) + n E(t), E ← .9 E + .1 u", "LayerPipe2's comparison, arXiv 2512.08160",
        past="ema:decay=0.9",
    ),
    "ema": Method(
        "delay-aware EMA", "backward at W(t) + n E(t), E ← β E + (1−β) u, β = (n−1)/(n+1)",
        "LayerPipe2 (Unnikrishnan and Parhi, arXiv 2512.08160); the decay is ours", past="ema",
    ),
    "blend": Method(
        "blend of averages", "backward at W(t) + n (c₀ u + Σ cₖ Eₖ)", "ours, docs/past_weights.md", past="blend"
    ),
    "pipemare-t1": Method(
        "PipeMare's T1", "lr / (1+n)^p, p from 1 to 0 over a quarter of the training", _PIPEMARE, {"lr_delay": 1.0},
        past="latest", rescaled=0.25,
    ),
    "pipemare-t2": Method(
        "PipeMare's T2", "backward at W(t) + n δ, δ ← γ δ + (1−γ) u, γ = D^(1/n), D = e⁻²", _PIPEMARE, past="pipemare"
    ),
    "pipemare": Method(
        "PipeMare's T1, T2 and T3", "T1 and T2, and a tenth of the training without a delay", _PIPEMARE,
        {"lr_delay": 1.0}, past="pipemare", rescaled=0.25, synchronous=0.1,
    ),
    "prediction": Method(
        "weight prediction", "forward at W − n lr P(m̂)",
        "SpecTrain (Chen et al., arXiv 1809.02839) with sgd, XPipe (Guan et al., arXiv 1911.04610) with adamw",
        {"weight_prediction": 1.0, "predict": "momentum"},
    ),
    "spike-lwp": Method(
        "spike compensation and linear weight prediction", "W ← W − lr P(βⁿ m̂ + (1−βⁿ) g), forward at W − n lr P(m̂)",
        "Kosson et al., arXiv 2003.11666", {"spike_compensation": 1.0, "weight_prediction": 1.0, "predict": "momentum"},
    ),
    "nesterov": Method(
        "Nesterov with a discount", "W ← W − lr P(γ m̂ + (1−γ) g), γ = .99", "Ajanthan et al., arXiv 2505.01099",
        {"nesterov": True, "beta1": 0.99},
    ),
    "dc-asgd": Method(
        "delay compensation", "g ← g + λ g² (W(t) − W(t−n)) / √q, q ← .95 q + .05 g², λ = 2",
        "DC-ASGD-a (Zheng et al., arXiv 1609.08326)", {"compensation": 2.0},
    ),
    "gap-aware": Method(
        "gap-aware", "g ← g / (1 + |W(t) − W(t−n)| / C), C the root mean square of a step",
        "Barkai, Hakimi and Schuster, arXiv 1909.10802", {"gap_aware": True},
    ),
    "accumulation": Method(
        "accumulation", "one update in as many microbatches as make n ≤ 1",
        "PipeDream-2BW (Narayanan et al., arXiv 2006.09503)", accumulate="one",
    ),
    "error-feedback": Method(
        "error feedback", "u(t) ← u(t) + (u(t) − u(t−n))",
        "after Zmushko et al., arXiv 2606.30634, as their abstract reads", {"error_feedback": 1.0},
    ),
    "basis-rotation": Method(
        "basis rotation", "P is SOAP's", "Jung, Shin and Lee, arXiv 2602.03515; SOAP: Vyas et al., arXiv 2409.11321",
        optimizer="soap",
    ),
    "ours": Method(
        "SOAP with β₁ by the delay",
        "W ← W − lr P(βⁿ m̂ + (1−βⁿ) g), forward at W − n u / 2, β = max(.9, 1 − 1/(14 n)), backward at the blend",
        "docs/delay.md", _OURS, past="blend", optimizer="soap",
    ),
    "ours-accumulated": Method(
        "the same with microbatches", "ours, and one update in half as many microbatches as there are stages",
        "docs/delay.md", _OURS, past="blend", optimizer="soap", accumulate="half",
    ),
}  # fmt: skip


def microbatches(method: Method, stages: int, ahead: int, accumulate: int) -> int:
    """Per update.

    Args:
        ahead: microbatches between the first stage's forward and backward.
        accumulate: where the method does not say.
    """
    if method.accumulate == "one":
        return 1 << max(0, ahead - 1).bit_length()
    if method.accumulate == "half":
        return 1 << max(1, stages // 2).bit_length() - 1
    return accumulate
