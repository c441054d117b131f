"""An image set in device memory: batches are gathered there by index."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from train.data.augment.transform import ImageTransform, check_images
from train.data.batch import Batch, Data
from train.data.host import HostImages
from train.data.order import Order, in_order
from train.data.source import Split

if TYPE_CHECKING:
    from jaxtyping import Array, Int, Key

_CHUNK = 1024  # images that are decoded at a time


class DeviceImages(Data):
    """Images of one size, all of them on the device as uint8 (CIFAR: 154 MB).

    Attributes:
        images: uint8 of shape ``(examples, height, width, channels)``.
        labels: int32 of shape ``(examples,)``.
        num_classes: Number of classes.

    Args:
        split: An open split.
        batch_size: Examples in a batch.
        transform: Augmentation, size and normalisation.
        seed: Of order and augmentation.
        drop_last: Whether the last partial batch of a training epoch is left out; see ``Order``.

    Raises:
        ValueError: If the split has no images of one size with one or three channels.

    Example:
        >>> data = DeviceImages(open_split("cifar10", data_dir=folder), 128, transform)  # doctest: +SKIP
        >>> data.batch(0).inputs[0].shape  # doctest: +SKIP
        (128, 32, 32, 3)
    """

    def __init__(
        self, split: Split, batch_size: int, transform: ImageTransform, *, seed: int = 0, drop_last: bool = True
    ):
        check_images(split)
        height, width, channels = split.image_shape
        if height is None or width is None or channels is None:
            raise ValueError(
                f"split: the images of {split.name} are of shape {split.image_shape}, expected one size for all; "
                "take HostImages, which cuts them on the host"
            )
        super().__init__(Order(len(split), batch_size, seed, drop_last), split.num_classes)
        self._transform = transform
        images = np.empty((len(split), height, width, channels), np.uint8)
        labels = np.empty(len(split), np.int32)
        for start in range(0, len(split), _CHUNK):
            stop = min(start + _CHUNK, len(split))
            records = split.fetch(range(start, stop))
            images[start:stop], labels[start:stop] = np.stack(records.inputs[0]), records.labels
        self.images, self.labels = jax.device_put((images, labels))

    def batch(self, step: int) -> Batch:
        """The training batch of a step, counted from 0 over all epochs: grey levels, uint8."""
        return self._gather(*self._order(step))

    def evaluation_batch(self, step: int) -> Batch:
        """A batch of the images in the order of the split; the last one is filled up with weight 0."""
        return self._gather(*in_order(self._order.examples, self._order.batch_size, step))

    def augment(
        self, key: Key[Array, ""], inputs: tuple[Array, ...], labels: Int[Array, " batch"]
    ) -> tuple[tuple[Array, ...], Array]:
        """Images to train on, float32, and their labels, soft where examples are mixed."""
        images, labels = self._transform.train(key, inputs[0], labels, self.num_classes)
        return (images,), labels

    def prepare(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """Images to evaluate on, float32."""
        return (self._transform.evaluate(inputs[0]),)

    def _gather(self, indices: np.ndarray, weights: np.ndarray) -> Batch:
        chosen, on_device = jax.device_put((indices.astype(np.int32), weights))
        images, labels = _take(self.images, self.labels, chosen)
        return Batch((images,), labels, on_device)


@jax.jit
def _take(images: jax.Array, labels: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.take(images, indices, axis=0), jnp.take(labels, indices, axis=0)


def open_images(
    split: Split,
    batch_size: int,
    transform: ImageTransform,
    *,
    seed: int = 0,
    drop_last: bool = True,
    workers: int = 0,
    memory: int | None = None,
) -> DeviceImages | HostImages:
    """The set in device memory where it fits, else through threads or worker processes of the host.

    Args:
        split: An open split.
        batch_size: Examples in a batch.
        transform: Augmentation, size and normalisation.
        seed: Of order and augmentation.
        drop_last: Whether the last partial batch of a training epoch is left out.
        workers: Worker processes that decode, where the set is not held in memory.
        memory: Bytes that the set may take on the device; a quarter of its memory by default (1 GiB where unknown).

    Raises:
        ValueError: If the split does not hold images.
    """
    check_images(split)
    limit: int = _quarter_of_memory() if memory is None else memory
    sizes = [side for side in split.image_shape if side is not None]
    if len(sizes) == len(split.image_shape) and len(split) * math.prod(sizes) <= limit:
        return DeviceImages(split, batch_size, transform, seed=seed, drop_last=drop_last)
    return HostImages(split, batch_size, transform, seed=seed, drop_last=drop_last, workers=workers)


def _quarter_of_memory() -> int:
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 2**32) // 4
