"""VGG-11 with batch normalisation for small images (Simonyan and Zisserman, arXiv 1409.1556, configuration A)."""

from __future__ import annotations

from torch import nn

#: Output channels of the convolutions, as multiples of the width; 0 is a max-pooling.
CONFIGURATION = (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0)


def vgg11(*, width: int = 64, channels: int = 3, size: int = 32, classes: int = 10) -> nn.Sequential:
    """Eight convolutions of 3 x 3 and one fully connected layer, as usual for images of 32 x 32 and fewer pixels.

    Args:
        width: channels of the first convolution; 64 as published.
        size: does not matter: images of fewer than 32 pixels are pooled down to one before the last pooling.
    """
    blocks: list[nn.Module] = []
    for factor in CONFIGURATION:
        if not factor:
            blocks.append(nn.MaxPool2d(2, ceil_mode=True))
            continue
        out = factor * width
        convolution = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True)))
        channels = out
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
