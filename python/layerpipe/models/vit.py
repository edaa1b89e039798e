"""torchvision's vision transformer (Dosovitskiy et al., arXiv 2010.11929) for small images, and any width."""

from __future__ import annotations

from torch import nn


def vit(*, width: int = 64, channels: int = 3, size: int = 32, classes: int = 10, depth: int = 8) -> nn.Module:
    """A transformer of ``depth`` blocks with heads of 32 on patches of 4 x 4, or 2 x 2 below 16 pixels.

    Raises:
        ValueError: a size that is no multiple of the patches', or a width that is no multiple of the number of heads.
        ImportError: torchvision is not installed.
    """
    try:
        from torchvision.models import VisionTransformer
    except ImportError as error:
        raise ImportError("vit is torchvision's; pip install torchvision") from error
    patch, heads = 4 if size >= 16 else 2, max(1, width // 32)
    if size % patch or width % heads:
        raise ValueError(f"a vit takes multiples of {patch} as size and of {heads} as width, got {size} and {width}")
    model: nn.Module = VisionTransformer(
        image_size=size,
        patch_size=patch,
        num_layers=depth,
        num_heads=heads,
        hidden_dim=width,
        mlp_dim=4 * width,
        num_classes=classes,
    )
    if channels != 3:
        projection = nn.Conv2d(channels, width, patch, patch)
        nn.init.trunc_normal_(projection.weight, std=(channels * patch * patch) ** -0.5)
        nn.init.zeros_(projection.get_parameter("bias"))
        model.conv_proj = projection
    nn.init.trunc_normal_(
        model.get_parameter("heads.head.weight"), std=0.02
    )  # torchvision's zeros hide every other layer at first
    return model
