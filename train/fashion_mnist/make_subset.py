"""Makes ``fashion_mnist.npz`` from the four original files: the first images of each class, in the original order.

Usage: python train/fashion_mnist/make_subset.py DIRECTORY_OF_THE_IDX_GZ_FILES (for example that of Debian's package
dataset-fashion-mnist).
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np

TRAIN_PER_CLASS, TEST_PER_CLASS = 600, 200


def read(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 of shape (n, 28, 28), and labels, uint8 of shape (n,)."""
    images = gzip.decompress((directory / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((directory / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def first_of_each_class(images: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``count`` images of each class, in the original order."""
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)]))
    return images[chosen], labels[chosen]


if __name__ == "__main__":
    source = Path(sys.argv[1])
    train = first_of_each_class(*read(source, "train"), TRAIN_PER_CLASS)
    test = first_of_each_class(*read(source, "t10k"), TEST_PER_CLASS)
    np.savez_compressed(
        Path(__file__).with_name("fashion_mnist.npz"),
        train_images=train[0], train_labels=train[1], test_images=test[0], test_labels=test[1],
    )  # fmt: skip
