"""What a training script gets: batches of one static shape."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from train.data.order import Order, in_order, steps_in_order
from train.data.share import Share
from train.devices.mesh import by_example

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key


class Batch(NamedTuple):
    """A batch on the device.

    Attributes:
        inputs: What the model is called with, ``model(*inputs)``, once ``augment`` or ``prepare`` is applied.
        labels: Classes, int32 of shape ``(batch,)``.
        weights: float32 of shape ``(batch,)``: 1, or 0 for an example that only fills the batch up and counts nowhere.
    """

    inputs: tuple[Array, ...]
    labels: Int[Array, " batch"]
    weights: Float[Array, " batch"]


class Data(abc.ABC):
    """One split, in batches; what image and text sets have in common.

    The batch of a step is a pure function of the seed and the step, so a run that stops anywhere carries on with
    ``batches(start_step)`` and ``key(step)`` as if it had never stopped.

    Attributes:
        num_classes: Number of classes.
        views: Augmented views of each example that there are, of which an epoch has one; 0 where every epoch draws new
            ones.

    Args:
        order: Which examples are in the batch of a step.
        num_classes: Number of classes.
        mesh: The devices that share the examples of a batch, perhaps of several processes, of which each reads its
            own; the one that JAX takes by default without it.
        views: See above.
    """

    def __init__(self, order: Order, num_classes: int, mesh: Mesh | None = None, *, views: int = 0):
        self._order = order
        self._key = jax.random.key(order.seed)
        self._share = Share(mesh, order.batch_size)
        self.num_classes, self.views = num_classes, views

    @property
    def steps_per_epoch(self) -> int:
        """Training batches in an epoch."""
        return self._order.steps_per_epoch

    @property
    def examples(self) -> int:
        """Examples in the split."""
        return self._order.examples

    @property
    def evaluation_steps(self) -> int:
        """Batches of an evaluation."""
        return steps_in_order(self._order.examples, self._order.batch_size)

    @abc.abstractmethod
    def batch(self, step: int) -> Batch:
        """The training batch of a step, counted from 0 over all epochs; not yet augmented."""

    def indices(self, step: int) -> Int[np.ndarray, " batch"]:
        """Which examples of the split are in the training batch of a step."""
        return self._order(step)[0]

    @abc.abstractmethod
    def evaluation_batch(self, step: int) -> Batch:
        """A batch of the examples in the order of the split; the last one is filled up with weight 0."""

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Training batches from ``start_step`` on, up to ``stop_step`` or without end.

        Raises:
            ValueError: If ``start_step`` is negative or behind ``stop_step``.
        """
        if start_step < 0 or (stop_step is not None and stop_step < start_step):
            raise ValueError(
                f"start_step, stop_step: got {start_step} and {stop_step}, expected 0 <= start_step <= stop_step; "
                "steps count from 0 over all epochs"
            )
        return self._batches(start_step, stop_step)

    def evaluation_batches(self) -> Iterator[Batch]:
        """Every example once, in the order of the split."""
        return (self.evaluation_batch(step) for step in range(self.evaluation_steps))

    def key(self, step: int) -> Key[Array, ""]:
        """The key for all that is random in a step: augmentation, dropout."""
        key = jax.random.fold_in(self._key, jax.device_put(np.uint32(step)))
        return key if self._share.mesh is None else self._share.replicate(key)

    def augment(
        self, key: Key[Array, ""], inputs: tuple[Array, ...], labels: Int[Array, " batch"]
    ) -> tuple[tuple[Array, ...], Array]:
        """Inputs and labels to train on; pure, to be called inside the jitted train step.

        Args:
            key: Of this step.
            inputs: Of a training batch.
            labels: Of a training batch.

        Returns:
            Inputs of the model; and the labels as they are, or float32 probabilities of shape ``(batch, classes)``
            where the set mixes examples.
        """
        return inputs, labels

    def view(self, step: int) -> int:
        """Which view of its examples a step has: one epoch the first, the next epoch the next."""
        return self._order.view(step, self.views)

    def in_view(
        self, view: int, indices: Int[np.ndarray, " batch"], inputs: tuple[Array, ...], labels: Int[Array, " batch"]
    ) -> tuple[tuple[Array, ...], Array]:
        """As :meth:`augment`, but for examples in a view: of each the same, whenever it comes and with which others.

        Compiled, and called before the train step, in which nothing is random then.

        Args:
            view: The view.
            indices: Which examples of the split these are.
            inputs: Of a training batch.
            labels: Of a training batch.
        """
        return self._in_view(np.uint32(view), indices.astype(np.uint32), inputs, labels)

    @functools.cached_property
    def _in_view(self) -> Callable[..., Any]:
        def of_one(key: jax.Array, *example: Any) -> Any:
            alone = jax.tree.map(lambda array: array[None], example)
            return jax.tree.map(lambda array: array[0], self.augment(key, *alone))

        def of_batch(view: jax.Array, indices: jax.Array, *batch: Any) -> Any:
            of_view = jax.random.fold_in(jax.random.key(self._order.seed), view)
            return jax.vmap(of_one)(jax.vmap(jax.random.fold_in, (None, 0))(of_view, indices), *batch)

        mesh = self._share.mesh
        return jax.jit(of_batch, out_shardings=None if mesh is None else by_example(mesh))

    def prepare(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """Inputs to evaluate on; pure, to be called inside the jitted evaluation step."""
        return inputs

    def _in_order(self, step: int) -> tuple[Int[np.ndarray, " batch"], Float[np.ndarray, " batch"]]:
        """Indices and weights of a batch of an evaluation."""
        return in_order(self._order.examples, self._order.batch_size, step)

    def _batches(self, start: int, stop: int | None) -> Iterator[Batch]:
        step = start
        while stop is None or step < stop:
            yield self.batch(step)
            step += 1


def in_views(data: Data, start: int, batches: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Arguments of train steps as they are, or with their examples in the views of the data, if it has any.

    Args:
        data: The data.
        start: Step of the first of them.
        batches: Indices, inputs and labels of each step; what there is, of data without views.
    """
    if not data.views:
        yield from batches
        return
    for step, (indices, *batch) in enumerate(batches, start):
        yield indices, *data.in_view(data.view(step), indices, *batch)
