"""An image set in device memory: batches are gathered there by index."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from train.data.augment.transform import ImageTransform, check_images
from train.data.batch import Batch, Data
from train.data.host import HostImages
from train.data.order import Order
from train.data.source import Split
from train.devices.mesh import by_example

if TYPE_CHECKING:
    from jaxtyping import Array, Int, Key

_CHUNK = 1024  # images that are decoded at a time


class DeviceImages(Data):
    """Images of one size, all of them on every device as uint8 (CIFAR: 154 MB).

    Where several processes train, each has them all in the memory of its host: batches are made beside the training,
    and what they all run on devices, they must run in the same order.

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
        mesh: The devices that share a batch; see ``Data``. Of several processes each reads the whole set, once.

    Raises:
        ValueError: If the split has no images of one size with one or three channels.

    Example:
        >>> data = DeviceImages(open_split("cifar10", data_dir=folder), 128, transform)  # doctest: +SKIP
        >>> data.batch(0).inputs[0].shape  # doctest: +SKIP
        (128, 32, 32, 3)
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        transform: ImageTransform,
        *,
        seed: int = 0,
        drop_last: bool = True,
        mesh: Mesh | None = None,
    ):
        check_images(split)
        height, width, channels = split.image_shape
        if height is None or width is None or channels is None:
            raise ValueError(
                f"split: the images of {split.name} are of shape {split.image_shape}, expected one size for all; "
                "take HostImages, which cuts them on the host"
            )
        super().__init__(Order(len(split), batch_size, seed, drop_last), split.num_classes, mesh, views=transform.views)
        self._transform = transform
        images = np.empty((len(split), height, width, channels), np.uint8)
        labels = np.empty(len(split), np.int32)
        for start in range(0, len(split), _CHUNK):
            stop = min(start + _CHUNK, len(split))
            records = split.fetch(range(start, stop))
            images[start:stop], labels[start:stop] = np.stack(records.inputs[0]), records.labels
        on_host = jax.process_count() > 1
        self.images, self.labels = (images, labels) if on_host else self._share.replicate((images, labels))
        self._sharding = None if mesh is None else by_example(mesh)

    def batch(self, step: int) -> Batch:
        """The training batch of a step, counted from 0 over all epochs: grey levels, uint8."""
        return self._gather(*self._order(step))

    def evaluation_batch(self, step: int) -> Batch:
        """A batch of the images in the order of the split; the last one is filled up with weight 0."""
        return self._gather(*self._in_order(step))

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
        rows = self._share.rows
        if isinstance(self.images, np.ndarray):
            chosen = indices[rows]
            images, labels, on_device = self._share.put((self.images[chosen], self.labels[chosen], weights[rows]))
            return Batch((images,), labels, on_device)
        chosen, on_device = self._share.put((indices[rows].astype(np.int32), weights[rows]))
        images, labels = _take(self.images, self.labels, chosen, self._sharding)
        return Batch((images,), labels, on_device)


@functools.partial(jax.jit, static_argnames="sharding")
def _take(
    images: jax.Array, labels: jax.Array, indices: jax.Array, sharding: NamedSharding | None
) -> tuple[jax.Array, jax.Array]:
    taken = jnp.take(images, indices, axis=0), jnp.take(labels, indices, axis=0)
    return taken if sharding is None else jax.lax.with_sharding_constraint(taken, sharding)


def open_images(
    split: Split,
    batch_size: int,
    transform: ImageTransform,
    *,
    seed: int = 0,
    drop_last: bool = True,
    workers: int = 0,
    memory: int | None = None,
    mesh: Mesh | None = None,
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
        mesh: The devices that share a batch; see ``Data``.

    Raises:
        ValueError: If the split does not hold images.
    """
    check_images(split)
    limit: int = _quarter_of_memory() if memory is None else memory
    sizes = [side for side in split.image_shape if side is not None]
    if len(sizes) == len(split.image_shape) and len(split) * math.prod(sizes) <= limit:
        return DeviceImages(split, batch_size, transform, seed=seed, drop_last=drop_last, mesh=mesh)
    return HostImages(split, batch_size, transform, seed=seed, drop_last=drop_last, workers=workers, mesh=mesh)


def _quarter_of_memory() -> int:
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 2**32) // 4
