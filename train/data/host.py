"""An image set that is read, decoded and cut on the host while the device trains: ImageNet."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import grain
import numpy as np
from absl import flags
from jax.sharding import Mesh

from train.data.augment import boxes
from train.data.augment.transform import ImageTransform, check_images
from train.data.batch import Batch, Data
from train.data.order import Order, in_order
from train.data.source import Split

if TYPE_CHECKING:
    from jaxtyping import Array, Int, Key

_FOREVER = 2**62  # steps


class HostImages(Data):
    """Images of any size; grain's threads or worker processes cut them to the network's size, as uint8.

    The host does the random resized crop (in training) or the crop of the middle (in evaluation, and in training
    without random resized crop), bilinear as on the device; the rest of the transform is the device's. Images of one
    size are not cropped to the middle: whether another split of them is held in device memory, where they are taken
    whole, may not matter. The box of an image depends on the seed, the step and its place in the batch alone, or on the
    seed, the view and the image, so batches are the same for any number of workers, and of processes that each read
    their part.

    Attributes:
        num_classes: Number of classes.

    Args:
        split: An open split.
        batch_size: Examples in a batch.
        transform: Augmentation, size and normalisation.
        seed: Of order and augmentation.
        drop_last: Whether the last partial batch of a training epoch is left out; see ``Order``.
        workers: Worker processes; 0 for threads of this one. They import the main module, so a script that uses them
            needs ``if __name__ == "__main__":``.
        mesh: The devices that share a batch; see ``Data``.

    Raises:
        ValueError: If the split does not hold images with one or three channels, or ``workers`` is negative.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        transform: ImageTransform,
        *,
        seed: int = 0,
        drop_last: bool = True,
        workers: int = 0,
        mesh: Mesh | None = None,
    ):
        check_images(split)
        if workers < 0:
            raise ValueError(f"workers: got {workers}, expected 0 (threads) or a number of processes")
        super().__init__(Order(len(split), batch_size, seed, drop_last), split.num_classes, mesh, views=transform.views)
        fraction = transform.crop_fraction if None in split.image_shape else None
        self._reader = _Reader(
            split, self._order, self._share.rows, transform.size, transform.area, fraction, transform.views
        )
        self._transform = dataclasses.replace(transform, area=None)
        self._workers = workers

    def batch(self, step: int) -> Batch:
        """The training batch of a step, counted from 0 over all epochs: grey levels, uint8."""
        return self._on_device(self._reader.train(step))

    def evaluation_batch(self, step: int) -> Batch:
        """A batch of the images in the order of the split; the last one is filled up with weight 0."""
        return self._on_device(self._reader.evaluate(step))

    def evaluation_batches(self) -> Iterator[Batch]:
        """Every example once, in the order of the split, read ahead."""
        return self._read_ahead(self._reader.evaluate, 0, self.evaluation_steps)

    def augment(
        self, key: Key[Array, ""], inputs: tuple[Array, ...], labels: Int[Array, " batch"]
    ) -> tuple[tuple[Array, ...], Array]:
        """Images to train on, float32, and their labels, soft where examples are mixed."""
        images, labels = self._transform.train(key, inputs[0], labels, self.num_classes)
        return (images,), labels

    def prepare(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """Images to evaluate on, float32."""
        return (self._transform.evaluate(inputs[0]),)

    def _batches(self, start: int, stop: int | None) -> Iterator[Batch]:
        return self._read_ahead(self._reader.train, start, _FOREVER if stop is None else stop)

    def _read_ahead(self, read: Callable[[int], _Arrays], start: int, stop: int) -> Iterator[Batch]:
        if start == stop:
            return
        # Few batches ahead: grain's default of 500 is 19 GB at batch 256 and 224 x 224.
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
        dataset = grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain reads flags, which only absl's own main function parses
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(processes)
        with contextlib.closing(iter(dataset)) as batches:
            for arrays in batches:
                yield self._on_device(arrays)

    def _on_device(self, arrays: _Arrays) -> Batch:
        images, labels, weights = self._share.put(tuple(arrays))
        return Batch((images,), labels, weights)


class _Arrays(NamedTuple):
    images: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the batch of a step; pickled to the workers."""

    split: Split
    order: Order
    rows: np.ndarray
    size: int
    area: tuple[float, float] | None
    crop_fraction: float | None
    views: int = 0

    def train(self, step: int) -> _Arrays:
        area, (indices, weights) = self.area, self.order(step)
        if area is None:
            return self._read(indices, weights, self._middle)
        view = self.order.view(step, self.views)

        def box(image: np.ndarray, row: int) -> boxes.Box:
            # Of its own: how many numbers a box takes depends on the image, and others may read those before it.
            rng = np.random.default_rng((self.order.seed, *((view, int(indices[row])) if self.views else (step, row))))
            return boxes.random_box(rng, image.shape[0], image.shape[1], area)

        return self._read(indices, weights, box)

    def evaluate(self, step: int) -> _Arrays:
        return self._read(*in_order(self.order.examples, self.order.batch_size, step), self._middle)

    def _middle(self, image: np.ndarray, row: int) -> boxes.Box:
        if self.crop_fraction is None:
            return boxes.Box(0, 0, image.shape[0], image.shape[1])
        return boxes.middle(image.shape[0], image.shape[1], self.crop_fraction)

    def _read(self, indices: np.ndarray, weights: np.ndarray, box: Callable[[np.ndarray, int], boxes.Box]) -> _Arrays:
        records = self.split.fetch(indices[self.rows])
        of_rows = zip(records.inputs[0], self.rows, strict=True)
        images = np.stack([boxes.cut(image, box(image, int(row)), self.size) for image, row in of_rows])
        return _Arrays(images, records.labels, weights[self.rows])
