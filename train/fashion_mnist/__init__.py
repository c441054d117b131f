"""A subset of Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747; MIT licence beside this file)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

MEAN, STD = 0.2860, 0.3530  # of the whole training set


class Split(NamedTuple):
    """Images and labels.

    Attributes:
        images: Normalised, float32 of shape ``(n, 28, 28, 1)``.
        labels: Classes 0 to 9, int32 of shape ``(n,)``.
    """

    images: np.ndarray
    labels: np.ndarray


def load() -> tuple[Split, Split]:
    """The 6,000 training and 2,000 test images of the subset, 600 and 200 of each class.

    Raises:
        FileNotFoundError: If the file is not in the repository.
    """
    path = Path(__file__).with_name("fashion_mnist.npz")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; check the repository out again, or make the file with make_subset.py beside it"
        )
    with np.load(path, allow_pickle=False) as arrays:
        return tuple(
            Split(
                ((arrays[f"{split}_images"][..., None] / np.float32(255) - MEAN) / STD).astype(np.float32),
                arrays[f"{split}_labels"].astype(np.int32),
            )
            for split in ("train", "test")
        )  # pyright: ignore[reportReturnType]
