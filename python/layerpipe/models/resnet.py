"""torchvision's ResNet-18 for small images: the CIFAR stem, and any width."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def resnet18(*, width: int = 64, channels: int = 3, size: int = 32, classes: int = 10) -> nn.Module:
    """ResNet-18 with a 3x3 stem of stride 1 and no max-pooling; ``width`` channels in its first layer, 64 as published.

    The blocks, their names and their initialisation are torchvision's. ``size`` does not matter: it pools globally.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        from torchvision.models.resnet import BasicBlock, ResNet
    except ImportError as error:
        raise ImportError("resnet18 is torchvision's; pip install torchvision") from error

    class SmallResNet(ResNet):  # type: ignore[misc]
        def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
            if planes == 64:
                self.inplanes = width
            return super()._make_layer(block, planes * width // 64, *args, **kwargs)  # type: ignore[no-any-return]

    model = SmallResNet(BasicBlock, [2, 2, 2, 2], num_classes=classes)
    model.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.bn1 = nn.BatchNorm2d(width)
    model.maxpool = nn.Identity()
    model.fc = nn.Linear(8 * width, classes)
    return model


def check_channels_last(width: int, device: torch.device) -> None:
    """Refuse a :func:`resnet18` that torch's convolutions on the CPU would train wrongly with its channels last.

    The gradient of a 1 x 1 convolution of stride 2 with fewer channels than fit into a register is written past its
    memory (https://github.com/uxlfoundation/oneDNN/issues/6035, seen with torch 2.15).

    Raises:
        ValueError: names the least width.
    """
    least = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    if device.type == "cpu" and width < least:
        raise ValueError(
            f"a ResNet of width {width} with its channels last writes past its memory in torch's convolutions on this "
            f"CPU (oneDNN issue 6035); give it a width of at least {least}, or leave out channels last"
        )
