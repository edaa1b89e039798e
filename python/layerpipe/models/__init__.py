"""What the examples train."""

from __future__ import annotations

from torch import nn

from layerpipe.models.mlp import mlp
from layerpipe.models.resnet import check_channels_last, resnet18

__all__ = ["MODELS", "check_channels_last", "make", "mlp", "resnet18"]

MODELS = {"resnet18": resnet18, "mlp": mlp}


def make(name: str, *, width: int, channels: int, size: int, classes: int) -> nn.Module:
    """A model for square images of ``channels`` x ``size`` x ``size``.

    Raises:
        ValueError: an unknown name.
        ImportError: ``resnet18`` without torchvision.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; there are: {', '.join(MODELS)}")
    return MODELS[name](width=width, channels=channels, size=size, classes=classes)
