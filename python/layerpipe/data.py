"""Small data sets, whole in memory: images, and one of text."""

from __future__ import annotations

import gzip
import hashlib
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from layerpipe.errors import DataError
from layerpipe.models import factory

#: Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
#: Tokens of an example of text, and examples that are tested with.
CONTEXT, TEXT_TESTS = 64, 256


class Images(NamedTuple):
    """Normalised images ``(N, C, H, W)`` float32 and labels ``(N,)`` int64, or what a function of the user's returns.

    Of text: tokens ``(N, T)`` int64 and the tokens after them, ``(N, T)``.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    def checksum(self) -> str:
        """Of all examples and labels: the SHA-256 of their CRC-32s."""
        parts = (self.train_x, self.train_y, self.test_x, self.test_y)
        sums = [zlib.crc32(part.contiguous().reshape(-1).view(torch.uint8).numpy().data) for part in parts]
        return hashlib.sha256(repr((sums, [tuple(part.shape) for part in parts])).encode()).hexdigest()

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled training minibatches from the ``start``-th on, without end; the order depends on the seed alone.

        Raises:
            DataError: a batch larger than the data.
        """
        count = len(self.train_x)
        if not 1 <= size <= count:
            raise DataError(f"a batch of {size} does not fit the {count} training images of {self.name}")
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(count, generator=generator)
            epoch = order[: count - count % size].view(-1, size)
            for chosen in epoch[start:]:
                yield self.train_x[chosen], self.train_y[chosen]
            start = max(0, start - len(epoch))


def load(name: str, root: Path) -> Images:
    """A data set by name; what torchvision downloads, or has downloaded, lies in ``root``.

    Args:
        name: one of :data:`LOADERS`; or ``package.module:function``, which returns training examples, their labels,
            test examples and theirs, four tensors that are taken as they are. It is given ``root`` if it has a
            parameter of that name, and draws the same random numbers in every run.

    Raises:
        DataError: an unknown name, a missing library, data that is not here and cannot be fetched, or a function that
            returns something else.
    """
    if factory.is_name(name):
        return _own(name, root)
    if name not in LOADERS:
        raise DataError(f"data set {name!r} is unknown; there are: {', '.join(LOADERS)}, or package.module:function")
    train_x, train_y, test_x, test_y = LOADERS[name](root)
    if not train_x.is_floating_point():
        return Images(name, train_x, train_y, test_x, test_y, 256)
    mean = train_x.mean((0, 2, 3), keepdim=True)
    std = train_x.std((0, 2, 3), keepdim=True)
    classes = int(train_y.max()) + 1
    return Images(name, (train_x - mean) / std, train_y, (test_x - mean) / std, test_y, classes)


def _own(name: str, root: Path) -> Images:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = factory.call(name, {"root": root})
    except (ImportError, ValueError) as error:
        raise DataError(str(error)) from error
    parts = tuple(made) if isinstance(made, tuple | list) else ()
    if len(parts) != 4 or not all(isinstance(part, Tensor) for part in parts):
        raise DataError(f"{name} must return four tensors: training examples, their labels, test examples and theirs")
    for kind, x, y in (("training", *parts[:2]), ("test", *parts[2:])):
        if not x.dim() or not y.dim() or not len(x) or len(x) != len(y):
            raise DataError(f"{name} returned {kind} examples {tuple(x.shape)} with labels {tuple(y.shape)}")
        if y.dtype.is_floating_point or y.dtype.is_complex or int(y.min()) < 0:
            raise DataError(f"{name} returned {kind} labels that are no numbers of classes: {y.dtype}")
    train_x, train_y, test_x, test_y = parts
    if train_x.shape[1:] != test_x.shape[1:] or train_x.dtype != test_x.dtype:
        raise DataError(f"{name} returned test examples unlike the training examples")
    classes = 1 + max(int(train_y.max()), int(test_y.max()))
    return Images(name, train_x, train_y.long(), test_x, test_y.long(), classes)


Splits = tuple[Tensor, Tensor, Tensor, Tensor]


def _digits(root: Path) -> Splits:
    """1,797 scans of 8 x 8, inside scikit-learn (UCI Optical Recognition of Handwritten Digits); a fifth to test."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("the digits are in scikit-learn; pip install scikit-learn") from error
    bunch = load_digits()
    parts = train_test_split(
        bunch.images.astype(np.float32)[:, None] / 16,
        bunch.target.astype(np.int64),
        test_size=0.2,
        random_state=0,
        stratify=bunch.target,
    )
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    return train_x, train_y, test_x, test_y


def _fashion_mnist(root: Path) -> Splits:
    if DEBIAN_FASHION_MNIST.is_dir():
        here = DEBIAN_FASHION_MNIST
        train_x, test_x = (_idx(here / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k"))
        train_y, test_y = (_idx(here / f"{part}-labels-idx1-ubyte.gz").long() for part in ("train", "t10k"))
        train_x, test_x = (x[:, None].float() / 255 for x in (train_x, test_x))
        return train_x, train_y, test_x, test_y
    return _torchvision("FashionMNIST", root, "Debian's package dataset-fashion-mnist is also found")


def _idx(path: Path) -> Tensor:
    """LeCun's idx format: two zeros, a type (8: bytes), the number of dimensions, each as big-endian int32."""
    with gzip.open(path, "rb") as file:
        raw = file.read()
    if raw[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an idx file of bytes")
    header = 4 + 4 * raw[3]
    shape = np.frombuffer(raw[4:header], ">i4")
    return torch.from_numpy(np.frombuffer(raw[header:], np.uint8).reshape(shape).copy())


def _torchvision(kind: str, root: Path, hint: str = "") -> Splits:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"{kind} is read by torchvision; pip install torchvision") from error
    parts = []
    for train in (True, False):
        try:
            part = getattr(datasets, kind)(str(root), train=train, download=True)
        except Exception as error:  # offline, torchvision raises URLError, RuntimeError, ...
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{kind} is not in {root} and cannot be downloaded ({reason}); fetch it with torchvision on a machine "
                f"with a network and copy it there{'; ' + hint if hint else ''}"
            ) from error
        x = torch.as_tensor(part.data)
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)
        parts += [x.float().div(255).contiguous(), torch.as_tensor(part.targets).long()]
    return parts[0], parts[1], parts[2], parts[3]


def python_sources() -> tuple[Tensor, Tensor]:
    """Bytes ``(N,)`` int64 of the modules of Python's own library, and those of every tenth of its files to test.

    Raises:
        DataError: this Python has no sources of its library.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if len(files) < 20:
        raise DataError(f"Python's library has no sources in {sysconfig.get_path('stdlib')}")
    parts: tuple[bytearray, bytearray] = (bytearray(), bytearray())
    for i, file in enumerate(files):
        parts[i % 10 == 9].extend(file.read_bytes())
    train, test = (torch.frombuffer(part, dtype=torch.uint8).long() for part in parts)
    return train, test


def _python(root: Path) -> Splits:
    """Texts of :func:`python_sources`, one after the other; of those to test, a few from everywhere."""
    parts = []
    for text in python_sources():
        count = (len(text) - 1) // CONTEXT
        parts += [text[i : i + count * CONTEXT].view(count, CONTEXT) for i in (0, 1)]
    train_x, train_y, test_x, test_y = parts
    chosen = torch.linspace(0, len(test_x) - 1, min(TEXT_TESTS, len(test_x))).long()
    return train_x, train_y, test_x[chosen], test_y[chosen]


LOADERS: dict[str, Callable[[Path], Splits]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": lambda root: _torchvision("CIFAR10", root),
    "cifar100": lambda root: _torchvision("CIFAR100", root),
    "python": _python,
}
