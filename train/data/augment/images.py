"""Random crops, flips, resizing and normalisation of image batches: pure functions of a key, with static shapes.

Images are channels-last, ``(batch, height, width, channels)``, with grey levels 0 to 255. Every image draws its own
parameters. Resizing is bilinear as in PIL and torchvision: half-pixel centres; averaging ("antialias") when it shrinks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key, Num

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # EfficientNet-Lite: (x - 127) / 128

_ATTEMPTS = 10  # of a random resized crop, as in torchvision


def random_flip(key: Key[Array, ""], images: Num[Array, "b h w c"]) -> Num[Array, "b h w c"]:
    """Mirrors every other image, on average, left to right."""
    flip = jax.random.bernoulli(key, 0.5, images.shape[:1])
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def random_crop(key: Key[Array, ""], images: Num[Array, "b h w c"], padding: int) -> Num[Array, "b h w c"]:
    """Moves each image by up to ``padding`` pixels each way; zeros come in at the edges.

    Raises:
        ValueError: If ``padding`` is negative.
    """
    if padding < 0:
        raise ValueError(f"padding: got {padding}, expected at least 0 pixels")
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), images.shape[1:]))(
        padded, offsets
    )


def resize(images: Num[Array, "b h w c"], size: int, *, antialias: bool = True) -> Float[Array, "b size size c"]:
    """Resizes to ``size`` x ``size`` pixels, float32.

    Args:
        images: Grey levels.
        size: New height and width.
        antialias: Whether shrinking averages over all pixels (PIL, torchvision) or interpolates between two (OpenCV).
    """
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images.astype(jnp.float32)
    rows = _bilinear(height, size, jnp.float32(0), jnp.float32(height), antialias)
    columns = _bilinear(width, size, jnp.float32(0), jnp.float32(width), antialias)
    return _apply(images.astype(jnp.float32), rows, columns)


def random_resized_crop(
    key: Key[Array, ""],
    images: Num[Array, "b h w c"],
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Float[Array, "b size size c"]:
    """Cuts a random box out of each image and resizes it to ``size`` x ``size`` pixels, float32.

    Args:
        key: Of this batch.
        images: Grey levels.
        size: New height and width.
        area: Smallest and largest share of the image's area.
        ratio: Smallest and largest width / height.
    """
    height, width = images.shape[1:3]

    def one(key, image):
        top, left, h, w = random_box(key, height, width, area, ratio).astype(jnp.float32)
        return _apply(image[None], _bilinear(height, size, top, h, True), _bilinear(width, size, left, w, True))[0]

    return jax.vmap(one)(jax.random.split(key, images.shape[0]), images.astype(jnp.float32))


def random_box(
    key: Key[Array, ""], height: int, width: int, area: tuple[float, float], ratio: tuple[float, float]
) -> Int[Array, " 4"]:
    """Top, left, height and width of a random box, as torchvision draws it: int32.

    The first of ten boxes that lies in the image; if none does, the largest one in the middle whose ratio is allowed.
    """
    draws = jax.random.uniform(key, (2 * _ATTEMPTS + 2,))
    areas = (area[0] + (area[1] - area[0]) * draws[:_ATTEMPTS]) * (height * width)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = jnp.exp(low + (high - low) * draws[_ATTEMPTS:-2])
    widths = jnp.round(jnp.sqrt(areas * ratios)).astype(jnp.int32)
    heights = jnp.round(jnp.sqrt(areas / ratios)).astype(jnp.int32)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = jnp.argmax(fits)
    w = jnp.where(fits[first], widths[first], min(width, round(height * ratio[1])))
    h = jnp.where(fits[first], heights[first], min(height, round(width / ratio[0])))
    space = jnp.stack([height - h, width - w])
    place = jnp.where(fits[first], (draws[-2:] * (space + 1).astype(jnp.float32)).astype(jnp.int32), space // 2)
    return jnp.concatenate([place, jnp.stack([h, w])])


def normalise(
    images: Num[Array, "b h w c"], mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Float[Array, "b h w c"]:
    """``(x / 255 - mean) / std`` for every channel, float32."""
    shape = (1, 1, 1, len(mean))
    mean_, std_ = (255 * jnp.asarray(values, jnp.float32).reshape(shape) for values in (mean, std))
    return (images.astype(jnp.float32) - mean_) / std_


def _bilinear(source: int, target: int, start: jax.Array, extent: jax.Array, antialias: bool) -> jax.Array:
    """Matrix (target, source) that resizes the pixels from ``start`` to ``start + extent`` and sees no others."""
    scale = extent / target
    width = jnp.maximum(scale, 1.0) if antialias else jnp.float32(1.0)
    centres = start + (jnp.arange(target, dtype=jnp.float32) + 0.5) * scale
    pixels = jnp.arange(source, dtype=jnp.float32) + 0.5
    weights = jnp.maximum(1.0 - jnp.abs(pixels[None] - centres[:, None]) / width, 0.0)
    weights = jnp.where(((pixels > start) & (pixels < start + extent))[None], weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _apply(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    # Default precision rounds grey levels to 8 bits of mantissa on a TPU.
    images = jnp.einsum("th,bhwc->btwc", rows, images, precision="highest")
    return jnp.einsum("sw,btwc->btsc", columns, images, precision="highest")
