"""Mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899), as DeiT trains with them.

Each example is mixed with the one at its mirrored place in the batch, all by the same share, as in timm.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Mix:
    """Mixes the examples of a batch, by Mixup or by CutMix.

    Attributes:
        mixup: Parameter of Mixup's beta distribution; 0 for no Mixup.
        cutmix: That of CutMix.
        switch: Probability of CutMix where both are on.
        smoothing: Label smoothing: the share of a label's weight that goes evenly to all classes.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1

    def __post_init__(self):
        if min(self.mixup, self.cutmix) < 0 or not (0 <= self.switch <= 1 and 0 <= self.smoothing < 1):
            raise ValueError(
                f"Mix: got {self}, expected mixup and cutmix >= 0, switch in [0, 1] and smoothing in [0, 1)"
            )

    def __call__(
        self, key: Key[Array, ""], images: Float[Array, "b h w c"], labels: Int[Array, " b"], num_classes: int
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
        """Mixed images, and the probability of each class, float32."""
        targets = smooth(labels, num_classes, self.smoothing)
        if not self.mixup and not self.cutmix:
            return images, targets
        switch_key, share_key, box_key = jax.random.split(key, 3)
        switch = self.switch if self.mixup and self.cutmix else float(self.cutmix > 0)
        cut = jax.random.bernoulli(switch_key, switch)
        alpha = jnp.where(cut, self.cutmix, self.mixup)
        share = jax.random.beta(share_key, alpha, alpha)
        return jax.lax.cond(
            cut,
            lambda: cutmix(box_key, images, targets, share),
            lambda: mixup(images, targets, share),
        )


def smooth(labels: Int[Array, " b"], num_classes: int, smoothing: float) -> Float[Array, "b classes"]:
    """One-hot labels, of whose weight a share is spread evenly over all classes."""
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def mixup(
    images: Float[Array, "b h w c"], targets: Float[Array, "b classes"], share: Float[Array, ""]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """Weighted mean of two examples: ``share`` of the one, the rest of the other."""
    return share * images + (1 - share) * images[::-1], share * targets + (1 - share) * targets[::-1]


def cutmix(
    key: Key[Array, ""], images: Float[Array, "b h w c"], targets: Float[Array, "b classes"], share: Float[Array, ""]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """One example with a box of another, at a random place; targets by the areas.

    Args:
        key: Of this batch.
        images: Any numbers.
        targets: Probabilities of the classes.
        share: Part of the area that stays, where the box is not cut off at an edge.
    """
    row_key, column_key = jax.random.split(key)
    height, width = images.shape[1:3]
    side = jnp.sqrt(1 - share)

    def inside(key: jax.Array, length: int) -> jax.Array:
        half = (jnp.floor(length * side) // 2).astype(jnp.int32)
        centre = jax.random.randint(key, (), 0, length)
        places = jnp.arange(length)
        return (places >= centre - half) & (places < centre + half)

    box = inside(row_key, height)[:, None] & inside(column_key, width)[None]
    stays = 1 - box.mean(dtype=jnp.float32)
    return jnp.where(box[None, :, :, None], images[::-1], images), stays * targets + (1 - stays) * targets[::-1]
