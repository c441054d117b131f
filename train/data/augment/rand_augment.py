"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) as DeiT trains with it: timm's ``rand-m9-mstd0.5-inc1``.

Fifteen operations on one image of float32 grey levels 0 to 255 (integers) and shape ``(height, width, 3)``, each a
function of its level in [0, 1] and a sign, +1 or -1; higher levels always change the image more. They do what PIL's
ImageOps, ImageEnhance and bilinear transforms do. Under ``vmap`` every image is put through all colour operations and
one warp: static shapes have this price, and on small images it is small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key

Operation = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies random operations, one after the other, to each image of a batch.

    Attributes:
        operations: Operations that are drawn for an image, with replacement.
        magnitude: Mean of their magnitude, 0 to 10.
        std: Standard deviation of the magnitude; it is clipped to 0 to 10.
        probability: Probability that a drawn operation is applied.
        fill: Grey levels that come in at the edges; ImageNet's mean.
    """

    operations: int = 2
    magnitude: float = 9.0
    std: float = 0.5
    probability: float = 0.5
    fill: tuple[float, float, float] = (124.0, 116.0, 104.0)

    def __post_init__(self):
        if not (self.operations >= 1 and 0 <= self.magnitude <= 10 and self.std >= 0 and 0 <= self.probability <= 1):
            raise ValueError(
                f"got {self}, expected operations >= 1, magnitude in [0, 10], std >= 0 and probability in [0, 1]"
            )

    def __call__(self, key: Key[Array, ""], images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """Augments a batch of float32 grey levels 0 to 255; every image draws its own operations."""
        fill = jnp.asarray(self.fill, jnp.float32)

        def draw_and_operate(image, key):
            level_key, key = jax.random.split(key)
            which, sign, use = jax.random.uniform(key, (3,))
            level = jnp.clip(self.magnitude + self.std * jax.random.normal(level_key), 0.0, 10.0) / 10
            which = jnp.floor(which * len(NAMES)).astype(jnp.int32)
            sign = jnp.where(sign < 0.5, -1.0, 1.0)
            changed = operate(which, image, level, sign, fill)
            return jnp.where(use < self.probability, changed, image), None

        def one(key, image):
            return jax.lax.scan(draw_and_operate, image, jax.random.split(key, self.operations))[0]

        return jax.vmap(one)(jax.random.split(key, images.shape[0]), images)


def operate(
    which: Int[Array, ""], image: Float[Array, "h w 3"], level: Float[Array, ""], sign: Float[Array, ""],
    fill: Float[Array, " 3"],
) -> Float[Array, "h w 3"]:  # fmt: skip
    """Applies operation number ``which`` of ``NAMES``."""
    height, width = image.shape[:2]
    matrices = jnp.stack([matrix(level, sign, height, width) for matrix in WARPS.values()])
    warped = _warp(image, matrices[jnp.minimum(which, len(WARPS) - 1)], fill)
    coloured = jax.lax.switch(jnp.maximum(which - len(WARPS), 0), list(COLOURS.values()), image, level, sign)
    return jnp.where(which < len(WARPS), warped, coloured)


def _warp(image: jax.Array, matrix: jax.Array, fill: jax.Array) -> jax.Array:
    """Bilinear affine transform; ``matrix``, (2, 3), maps places (x, y) of the result to places of ``image``."""
    height, width = image.shape[:2]
    y, x = jnp.mgrid[:height, :width].astype(jnp.float32) + 0.5
    source_x = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]
    source_y = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    left, top = jnp.floor(source_x - 0.5), jnp.floor(source_y - 0.5)
    right_share, low_share = (source_x - 0.5 - left)[..., None], (source_y - 0.5 - top)[..., None]

    def pixels(down: int, right: int) -> jax.Array:
        row = jnp.clip(top.astype(jnp.int32) + down, 0, height - 1)
        return image[row, jnp.clip(left.astype(jnp.int32) + right, 0, width - 1)]

    above = pixels(0, 0) * (1 - right_share) + pixels(0, 1) * right_share
    below = pixels(1, 0) * (1 - right_share) + pixels(1, 1) * right_share
    value = jnp.round(above * (1 - low_share) + below * low_share)
    return jnp.where(inside[..., None], value, fill[None, None])


def _affine(a, b, c, d, e, f) -> jax.Array:
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in (a, b, c, d, e, f)]).reshape(2, 3)


def _rotate(level, sign, height, width):
    angle = -jnp.deg2rad(sign * level * 30.0)
    cos, sin, x, y = jnp.cos(angle), jnp.sin(angle), width / 2, height / 2
    return _affine(cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


WARPS = {
    "rotate": _rotate,
    "shear_x": lambda level, sign, height, width: _affine(1, sign * level * 0.3, 0, 0, 1, 0),
    "shear_y": lambda level, sign, height, width: _affine(1, 0, 0, sign * level * 0.3, 1, 0),
    "translate_x": lambda level, sign, height, width: _affine(1, 0, sign * level * (0.45 * width), 0, 1, 0),
    "translate_y": lambda level, sign, height, width: _affine(1, 0, 0, 0, 1, sign * level * (0.45 * height)),
}


def _blend(degenerate: jax.Array, image: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """Away from (sign +1) or towards (sign -1) the degenerate image, by a factor of 1 +- 0.9 level."""
    factor = jnp.maximum(1 + sign * level * 0.9, 0.1)
    return jnp.floor(jnp.clip(degenerate + factor * (image - degenerate), 0, 255))


def _grey(image: jax.Array) -> jax.Array:
    """ITU-R 601 luma in PIL's fixed point arithmetic, (h, w, 1)."""
    red, green, blue = jnp.moveaxis(image.astype(jnp.int32), -1, 0)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(jnp.float32)[..., None]


def _autocontrast(image, level, sign):
    low, high = image.min((0, 1), keepdims=True), image.max((0, 1), keepdims=True)
    scale = 255 / jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.floor(jnp.clip(image * scale - low * scale, 0, 255)), image)


def _equalize(image, level, sign):
    def channel(values):
        counts = jnp.bincount(values.ravel(), length=256)
        step = (counts.sum() - counts[values.max()]) // 255
        table = (step // 2 + jnp.cumsum(counts) - counts) // jnp.maximum(step, 1)
        return jnp.where(step > 0, jnp.clip(table, 0, 255)[values], values)

    return jax.vmap(channel, -1, -1)(image.astype(jnp.int32)).astype(jnp.float32)


def _posterize(image, level, sign):
    size = jnp.exp2(4 + jnp.minimum(jnp.floor(level * 4), 3))  # grey levels that become one; 4 to 1 bits are left
    return jnp.floor(image / size) * size


def _solarize(image, level, sign):
    return jnp.where(image < 256 - jnp.floor(level * 256), image, 255 - image)


def _solarize_add(image, level, sign):
    return jnp.where(image < 128, jnp.minimum(image + jnp.floor(level * 110), 255), image)


def _contrast(image, level, sign):
    return _blend(jnp.floor(_grey(image).mean() + 0.5), image, level, sign)


def _sharpness(image, level, sign):
    height, width = image.shape[:2]
    around = [image[y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3)]
    smooth = jnp.floor((sum(around[1:], around[0]) + 4 * around[4]) / 13 + 0.5)  # PIL leaves the border as it is
    return _blend(image.at[1:-1, 1:-1].set(smooth), image, level, sign)


COLOURS: dict[str, Operation] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": lambda image, level, sign: 255 - image,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": lambda image, level, sign: _blend(_grey(image), image, level, sign),
    "contrast": _contrast,
    "brightness": lambda image, level, sign: _blend(jnp.zeros_like(image), image, level, sign),
    "sharpness": _sharpness,
}
NAMES = (*WARPS, *COLOURS)
