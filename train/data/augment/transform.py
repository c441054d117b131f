"""From the grey levels of a data set to what a network is trained and evaluated on, on the device."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from train.data.augment.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    normalise,
    random_crop,
    random_flip,
    random_resized_crop,
    resize,
)
from train.data.augment.mix import Mix
from train.data.augment.rand_augment import RandAugment
from train.data.source import Split

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key, UInt8


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Augmentation, resizing and normalisation, in this order; what is random comes before the resizing.

    Small images are augmented as small images, so that it costs little: crop, flip and RandAugment on 32 x 32 pixels,
    then up to the network's size.

    Attributes:
        size: Height and width that the network gets.
        mean: Mean of each channel, of grey levels scaled to [0, 1].
        std: Standard deviation of each channel.
        padding: Random crop: the image moves by up to so many pixels.
        area: Random resized crop: smallest and largest share of the image's area; None for none.
        flip: Whether every other image is mirrored.
        rand_augment: RandAugment, or None.
        mix: Mixup and CutMix, or None; makes soft labels.
        views: Augmented views of each image, drawn once; 0 where every epoch draws new ones. See ``train.data.Data``.
        crop_fraction: Part of the shorter side that the evaluation sees, where images of varying size are cut on the
            host. Images of one size are evaluated whole.

    Example:
        >>> transform = ImageTransform(size=8, padding=1, flip=True)
        >>> transform.evaluate(jnp.zeros((2, 4, 4, 3), jnp.uint8)).shape
        (2, 8, 8, 3)
    """

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    padding: int = 0
    area: tuple[float, float] | None = None
    flip: bool = False
    rand_augment: RandAugment | None = None
    mix: Mix | None = None
    crop_fraction: float = 0.875
    views: int = 0

    def __post_init__(self):
        if self.size < 1 or self.padding < 0:
            raise ValueError(f"size, padding: got {self.size} and {self.padding}, expected at least 1 and 0 pixels")
        if self.area is not None and not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area: got {self.area}, expected 0 < smallest <= largest <= 1, such as (0.08, 1.0)")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean, std: got {self.mean} and {self.std}, expected three numbers each, std above 0")
        if self.views < 0 or (self.views and self.mix is not None):
            raise ValueError(
                f"views: got {self.views} with mix={self.mix}, expected at least 0, and 0 where the images of a batch "
                "are mixed: such an image depends on others"
            )
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction: got {self.crop_fraction}, expected above 0 and at most 1")

    @classmethod
    def deit(cls, size: int = 224, **changes) -> ImageTransform:
        """The training of DeiT: random resized crop, flip, RandAugment, Mixup and CutMix with smoothed labels."""
        settings = {"area": (0.08, 1.0), "flip": True, "rand_augment": RandAugment(), "mix": Mix()}
        return cls(size, **{**settings, **changes})

    def train(
        self, key: Key[Array, ""], images: UInt8[Array, "b h w c"], labels: Int[Array, " b"], num_classes: int
    ) -> tuple[Float[Array, "b size size 3"], Array]:
        """Images to train on, float32, and their labels.

        Args:
            key: Of this step.
            images: Grey levels; one channel is repeated to three.
            labels: Classes.
            num_classes: Number of classes, for soft labels.

        Returns:
            Images and labels: the classes, or with ``mix`` probabilities of shape ``(b, classes)``.
        """
        crop_key, flip_key, rand_augment_key, area_key, mix_key = jax.random.split(key, 5)
        images = _three_channels(images)
        if self.padding:
            images = random_crop(crop_key, images, self.padding)
        if self.flip:
            images = random_flip(flip_key, images)
        images = images.astype(jnp.float32)
        if self.rand_augment is not None:
            images = self.rand_augment(rand_augment_key, images)
        if self.area is not None:
            images = random_resized_crop(area_key, images, self.size, self.area)
        else:
            images = resize(images, self.size)
        images = normalise(images, self.mean, self.std)
        if self.mix is None:
            return images, labels
        return self.mix(mix_key, images, labels, num_classes)

    def evaluate(self, images: UInt8[Array, "b h w c"]) -> Float[Array, "b size size 3"]:
        """Images to evaluate on, float32: resized and normalised."""
        return normalise(resize(_three_channels(images), self.size), self.mean, self.std)


def _three_channels(images: jax.Array) -> jax.Array:
    return jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def check_images(split: Split) -> None:
    """Checks that a split holds images that can be given three channels.

    Raises:
        ValueError: If not.
    """
    if split.kind != "image":
        raise ValueError(f"split: {split.name} holds texts, expected images; take Sentences")
    if len(split.image_shape) != 3 or split.image_shape[-1] not in (1, 3):
        raise ValueError(
            f"split: the images of {split.name} are of shape {split.image_shape}, expected height, width and "
            "1 or 3 channels"
        )
