"""Boxes that are cut out of images of any size, on the host."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

_ATTEMPTS = 10


class Box(NamedTuple):
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    area: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A random box in an image of ``height`` x ``width`` pixels, drawn as in ``augment.random_box``.

    Args:
        rng: Where the draws come from.
        height: Of the image.
        width: Of the image.
        area: Smallest and largest share of the image's area.
        ratio: Smallest and largest width / height.
    """
    for _ in range(_ATTEMPTS):
        pixels = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def middle(height: int, width: int, fraction: float) -> Box:
    """The square in the middle whose side is ``fraction`` of the shorter side.

    Example:
        >>> middle(100, 200, 0.5)
        Box(top=25, left=75, height=50, width=50)
    """
    side = max(1, round(min(height, width) * fraction))
    return Box((height - side) // 2, (width - side) // 2, side, side)


def cut(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    """The box, resized to ``size`` x ``size``: bilinear, averaging when it shrinks.

    Args:
        image: uint8 of shape ``(height, width, channels)``, with 1 or 3 channels.
        box: What to keep of it.
        size: Height and width of the result.

    Returns:
        uint8 of shape ``(size, size, channels)``.
    """
    part = np.ascontiguousarray(image[box.top : box.top + box.height, box.left : box.left + box.width])
    picture = Image.fromarray(part[..., 0] if part.shape[-1] == 1 else part)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, -1)
