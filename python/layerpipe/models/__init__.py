"""What the examples train."""

from __future__ import annotations

from torch import nn

from layerpipe.models.gpt import GPT
from layerpipe.models.mlp import mlp
from layerpipe.models.resnet import check_channels_last, resnet18

__all__ = ["MODELS", "check_channels_last", "make", "mlp", "resnet18"]


def _gpt(*, width: int, channels: int, size: int, classes: int) -> nn.Module:
    """Eight blocks with heads of 32, for texts of ``size`` tokens of ``classes`` kinds."""
    if channels != 1:
        raise ValueError("a gpt learns texts; give it data=python")
    return GPT(layers=8, width=width, heads=max(1, width // 32), context=size, vocabulary=classes)


MODELS = {"resnet18": resnet18, "mlp": mlp, "gpt": _gpt}


def make(name: str, *, width: int, channels: int, size: int, classes: int) -> nn.Module:
    """A model for square images of ``channels`` x ``size`` x ``size``; ``gpt`` for texts of ``size`` tokens.

    Raises:
        ValueError: an unknown name.
        ImportError: ``resnet18`` without torchvision.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; there are: {', '.join(MODELS)}")
    return MODELS[name](width=width, channels=channels, size=size, classes=classes)
