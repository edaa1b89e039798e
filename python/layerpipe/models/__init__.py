"""Models of the examples and the command line."""

from __future__ import annotations

from torch import Tensor, nn

from layerpipe.models import factory
from layerpipe.models.gpt import GPT
from layerpipe.models.mlp import mlp
from layerpipe.models.resnet import check_channels_last, resnet18
from layerpipe.models.sizes import IMPOSSIBLE, reason
from layerpipe.models.spiking import spiking
from layerpipe.models.vgg import vgg11
from layerpipe.models.vit import vit

__all__ = ["MODELS", "check_channels_last", "make", "make_for", "mlp", "resnet18", "spiking", "vgg11", "vit"]


def _gpt(*, width: int, channels: int, size: int, classes: int) -> nn.Module:
    """Eight blocks with heads of 32, for texts of ``size`` tokens of ``classes`` kinds."""
    if channels != 1:
        raise ValueError("a gpt learns texts; give it data=python")
    return GPT(layers=8, width=width, heads=max(1, width // 32), context=size, vocabulary=classes)


MODELS = {"resnet18": resnet18, "vgg11": vgg11, "mlp": mlp, "spiking": spiking, "vit": vit, "gpt": _gpt}


def make(name: str, *, width: int, channels: int, size: int, classes: int) -> nn.Module:
    """A model for square images of ``channels`` x ``size`` x ``size``; ``gpt`` for texts of ``size`` tokens.

    Raises:
        ValueError: an unknown name, or sizes with which it cannot be made.
        ImportError: ``resnet18`` and ``vit`` without torchvision.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; there are: {', '.join(MODELS)}, or package.module:function")
    try:
        return MODELS[name](width=width, channels=channels, size=size, classes=classes)
    except IMPOSSIBLE as error:
        raise ValueError(f"{name} of width {width} cannot be made: {reason(error)}") from error


def make_for(example: Tensor, name: str, *, width: int, classes: int) -> nn.Module:
    """A model for examples like this one.

    Args:
        example: without the minibatch; :data:`MODELS` take square images ``(channels, size, size)``, ``gpt`` a text
            ``(tokens,)``.
        name: one of :data:`MODELS`; or ``package.module:function``, which is given those of ``width``, ``classes``,
            ``shape`` (the example's) and, where that is a square image, ``channels`` and ``size`` that it has
            parameters for.

    Raises:
        ValueError: an unknown name, an example that is no square image, or sizes with which it cannot be made.
        ImportError: a package is missing.
    """
    shape = tuple(example.shape)
    text = not example.is_floating_point() and len(shape) == 1
    image = {"channels": shape[0], "size": shape[1]} if len(shape) == 3 and shape[1] == shape[2] else {}
    if factory.is_name(name):
        model = factory.call(name, {"width": width, "classes": classes, "shape": shape, **image})
        if not isinstance(model, nn.Module):
            raise ValueError(f"{name} returned a {type(model).__name__}, not an nn.Module")
        return model
    if (name == "gpt") != text or not (text or image):
        takes = "texts" if name == "gpt" else "square images"
        raise ValueError(f"{name} takes {takes}; the data's examples are {example.dtype} of the shape {shape}")
    sizes = {"channels": 1, "size": shape[0]} if text else image
    return make(name, width=width, classes=classes, **sizes)
