"""The optimizers of the command line, and what they take where nothing is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import layerpipe_kernels as lk
from layerpipe.errors import UsageError

if TYPE_CHECKING:
    from layerpipe.cli.config import TrainConfig


class Defaults(NamedTuple):
    """Of an optimizer."""

    lr_images: float
    lr_text: float
    weight_decay: float
    momentum: float = 0.9  # of those that have one
    spike_compensation: float = 0.0
    weight_prediction: float = 0.0

    def lr(self, model: str) -> float:
        return self.lr_text if model == "gpt" else self.lr_images


DEFAULTS = {
    "sgd": Defaults(0.02, 0.1, 5e-4),
    "adamw": Defaults(1e-3, 1e-3, 0.01),
    "nadam": Defaults(1e-3, 6e-4, 0.01),
    "muon": Defaults(0.02, 0.01, 0.01, 0.95, 1.0, 1.0),
    "soap": Defaults(3e-3, 1e-3, 0.01, spike_compensation=1.0, weight_prediction=0.5),
}

#: Options whose defaults are the optimizer's.
OPTIONS = ("lr", "momentum", "weight_decay", "spike_compensation", "weight_prediction")

#: Muon's steps are larger than those of the AdamW that it takes for embeddings, output layers and vectors.
_MUON_ADAMW = 0.1


def described(value: Callable[[Defaults], object]) -> str:
    """A default of each optimizer, for ``--help``."""
    return ", ".join(f"{name} {value(defaults)}" for name, defaults in DEFAULTS.items())


def with_defaults(config: TrainConfig, **options: float | None) -> TrainConfig:
    """The config with these options, and the optimizer's own where there is ``None``.

    Raises:
        UsageError: a momentum for an optimizer without one.
    """
    if options["momentum"] is not None and config.optimizer not in ("sgd", "muon"):
        raise UsageError(f"--momentum is sgd's and muon's; --optimizer {config.optimizer} has betas")
    own = DEFAULTS[config.optimizer]
    defaults = {**own._asdict(), "lr": own.lr(config.model)}
    given = {name: defaults[name] if value is None else value for name, value in options.items()}
    return dataclasses.replace(config, **given)  # type: ignore[arg-type]


def check(config: TrainConfig) -> None:
    """Refuse options that this optimizer has no use for.

    Raises:
        UsageError: there is one.
    """
    if lk.past.parse(config.past).kind == "momentum" and config.optimizer != "sgd":
        raise UsageError(f"--past momentum extrapolates sgd's momentum; --optimizer {config.optimizer} has none")
    if config.executor == "graphs" and config.optimizer in ("nadam", "muon", "soap"):
        raise UsageError(f"--executor graphs captures the optimizer's steps, and cannot those of {config.optimizer}")


def factory(config: TrainConfig) -> Callable[..., torch.optim.Optimizer]:
    """Return the factory of a :class:`layerpipe.Pipeline`'s optimizers.

    With spike compensation, SOAP averages gradients the longer the later they are.
    """
    knobs: dict[str, Any] = {
        "spike_compensation": config.spike_compensation,
        "weight_prediction": config.weight_prediction,
    }

    def make(params: list[torch.Tensor], **past: Any) -> torch.optim.Optimizer:
        lr, decay, captured = config.lr, config.weight_decay, config.executor == "graphs"
        if config.optimizer == "sgd":
            return lk.SGD(params, lr, config.momentum, weight_decay=decay, capturable=captured, **knobs, **past)
        if config.optimizer == "adamw":
            return lk.AdamW(params, lr, (0.9, 0.95), weight_decay=decay, capturable=captured, **knobs, **past)
        if config.optimizer == "nadam":
            inner = torch.optim.NAdam(params, lr, (0.99, 0.95), weight_decay=decay, decoupled_weight_decay=True)
            return lk.PastWeights(inner, **knobs, **past)
        if config.optimizer == "muon":
            return lk.Muon(params, lr, decay, config.momentum, adamw_lr_ratio=_MUON_ADAMW, **knobs, **past)
        longer = 14.0 if config.spike_compensation else 0.0
        return lk.SOAP(params, lr, (0.9, 0.95), weight_decay=decay, beta1_delay=longer, **knobs, **past)

    return make
