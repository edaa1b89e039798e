"""Parameter lists to step through: shapes of networks that everybody knows."""

from __future__ import annotations

import math

Shape = tuple[int, ...]


def resnet18() -> list[Shape]:
    """62 tensors, 11.7 million parameters (He et al., arXiv 1512.03385, for ImageNet)."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for stage, out in enumerate((64, 128, 256, 512)):
        for block in range(2):
            shapes += [(out, width, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if stage and not block:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [*shapes, (1000, 512), (1000,)]


def gpt(layers: int, width: int, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """A GPT-2's tensors (Radford et al. 2019); without embeddings if ``vocabulary`` is 0."""
    block: list[Shape] = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    embeddings: list[Shape] = [(vocabulary, width), (context, width)] if vocabulary else []
    return [*embeddings, *block * layers, *([(width,), (width,)] if vocabulary else [])]


NETWORKS: dict[str, list[Shape]] = {
    "resnet18": resnet18(),
    "gpt2": gpt(12, 768),
    "layer450m": gpt(1, 6144, vocabulary=0),  # one layer of 453 million parameters: fits 80 GB
    "layer1b": gpt(1, 9216, vocabulary=0),  # one layer of a billion parameters
}


def parameters(shapes: list[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)
