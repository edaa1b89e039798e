"""Models by name, to look at and not to train: on the meta device, with an input that fits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from layerpipe.models.factory import find, is_name
from layerpipe.models.gpt import GPT
from layerpipe.models.mlp import mlp
from layerpipe.models.resnet import resnet18
from layerpipe.models.sizes import IMPOSSIBLE, MOST_LAYERS, reason
from layerpipe.models.spiking import spiking
from layerpipe.models.vgg import vgg11
from layerpipe.models.vit import vit
from layerpipe.partition.examples import Examples


class InputShape(NamedTuple):
    """One example without the minibatch: its sizes and dtype; its parameter's name where it goes by that."""

    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    name: str = ""


class Entry(NamedTuple):
    factory: Callable[..., nn.Module]
    inputs: Callable[[Mapping[str, Any]], list[InputShape]]  # from the factory's options


def _torchvision(name: str) -> Callable[..., nn.Module]:
    def build(**options: Any) -> nn.Module:
        try:
            from torchvision import models
        except ImportError as error:
            raise ImportError(f"{name} is torchvision's; pip install torchvision") from error
        return getattr(models, name)(**options)  # type: ignore[no-any-return]

    return build


def _images(size: int, channels: int = 3) -> Callable[[Mapping[str, Any]], list[InputShape]]:
    return lambda o: [InputShape((o.get("channels", channels), o.get("size", size), o.get("size", size)))]


CATALOG = {
    "resnet18": Entry(resnet18, _images(32)),  # the one that `layerpipe train` trains
    "resnet50": Entry(_torchvision("resnet50"), _images(224)),
    "vgg16": Entry(_torchvision("vgg16"), _images(224)),
    "gpt2": Entry(GPT, lambda o: [InputShape((o.get("context", 1024),), torch.int64)]),
    "mlp": Entry(mlp, _images(28, channels=1)),
    "vgg11": Entry(vgg11, _images(32)),
    "vit": Entry(vit, _images(32)),
    "spiking": Entry(spiking, _images(28, channels=1)),
}


def load(
    name: str,
    *,
    batch: int,
    options: Mapping[str, Any] | None = None,
    inputs: Sequence[InputShape] = (),
    device: str = "meta",
) -> tuple[nn.Module, Examples]:
    """A model and the arguments of an example forward.

    Args:
        name: one of :data:`CATALOG`, or ``package.module:factory``.
        batch: examples in a minibatch.
        options: keyword arguments of the factory.
        inputs: shapes of one example, by position or name; a factory of your own needs them.
        device: ``"meta"`` allocates nothing.

    Raises:
        ValueError: no such model or factory, options it does not take, or no input shape.
        ImportError: a package is missing.
    """
    options = dict(options or {})
    if name in CATALOG:
        entry = CATALOG[name]
        factory, shapes = entry.factory, list(inputs) or entry.inputs(options)
    elif is_name(name):
        factory, shapes = find(name), list(inputs)
        if not shapes:
            raise ValueError(f"{name} needs the shape of its input, e.g. --input 3,224,224 or --input 1024:int64")
    else:
        raise ValueError(f"model {name!r} is unknown; there are: {', '.join(CATALOG)}, or package.module:factory")
    if options:
        try:
            inspect.signature(factory).bind_partial(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} does not take these options: {error}") from error
    if name in CATALOG:
        for option, value in options.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{name} cannot be made with {option}={value!r}, which is not more than 0")
            if option in ("layers", "depth") and isinstance(value, int | float) and value > MOST_LAYERS:
                raise ValueError(f"{name} cannot be made with {option}={value!r}, which is more than {MOST_LAYERS}")
    with torch.device(device):
        try:
            model = factory(**options)
        except IMPOSSIBLE as error:
            if name not in CATALOG:
                raise  # a factory of the caller's, who needs to see where
            asked = ", ".join(f"{option}={value!r}" for option, value in options.items())
            raise ValueError(f"{name} cannot be made with {asked}: {reason(error)}") from error
        try:
            made = [(shape.name, torch.zeros(batch, *shape.sizes, dtype=shape.dtype)) for shape in shapes]
        except IMPOSSIBLE as error:
            sizes = "; ".join(",".join(map(str, shape.sizes)) for shape in shapes)
            raise ValueError(f"no minibatch of {batch} examples of {sizes} can be made: {reason(error)}") from error
    examples = Examples(tuple(x for name, x in made if not name), {name: x for name, x in made if name})
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned a {type(model).__name__}, not an nn.Module")
    return model, examples
