from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from layerpipe import data
from layerpipe.errors import DataError


def test_digits_are_normalised_and_split_the_same_every_time() -> None:
    pytest.importorskip("sklearn")
    images = data.load("digits", Path())
    assert images.train_x.shape == (1437, 1, 8, 8)
    assert images.test_x.shape == (360, 1, 8, 8)
    assert images.train_x.mean().abs() < 1e-5
    assert images.train_x.std() == pytest.approx(1, abs=1e-4)
    assert images.classes == 10
    assert torch.equal(images.train_y, data.load("digits", Path()).train_y)


def test_batches_are_shuffled_by_the_seed_alone_and_never_short() -> None:
    x = torch.arange(10.0).view(10, 1, 1, 1)
    images = data.Images("ten", x, torch.arange(10), x, torch.arange(10), 10)
    first, again, other = images.batches(3, 0), images.batches(3, 0), images.batches(3, 1)
    epochs = [torch.cat([next(first)[1] for _ in range(3)]) for _ in range(2)]
    assert all(len(set(epoch.tolist())) == 9 for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(torch.cat([next(again)[1] for _ in range(3)]), epochs[0])
    assert not torch.equal(torch.cat([next(other)[1] for _ in range(3)]), epochs[0])


@pytest.mark.parametrize("size", [0, 11])
def test_a_batch_that_does_not_fit_is_refused(size: int) -> None:
    x = torch.zeros(10, 1, 1, 1)
    images = data.Images("ten", x, torch.zeros(10), x, torch.zeros(10), 10)
    with pytest.raises(DataError, match=f"a batch of {size} does not fit the 10 training images of ten"):
        next(images.batches(size, 0))


def test_debians_fashion_mnist_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path)
    for part, count in (("train", 4), ("t10k", 2)):
        pixels = bytes([0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(range(6 * count))
        labels = bytes([0, 0, 8, 1, 0, 0, 0, count]) + bytes(range(count))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pixels))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    images = data.load("fashion-mnist", tmp_path)
    assert images.train_x.shape == (4, 1, 2, 3)
    assert images.test_y.tolist() == [0, 1]
    raw = images.train_x.flatten()
    assert torch.equal(raw.argsort(), torch.arange(24))  # pixels in their order


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"\x89PNG"))
    with pytest.raises(DataError, match=r"x\.gz is not an idx file"):
        data._idx(tmp_path / "x.gz")


def test_unknown_data() -> None:
    with pytest.raises(DataError, match="digits, fashion-mnist, cifar10, cifar100"):
        data.load("imagenet", Path())
