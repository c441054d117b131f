"""A pre-trained network, fine-tuned in full or with its front frozen: one line differs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.layers.select import Selectors
from train.loop import batches, make_step

BATCH_SIZE = 32
WEIGHT_DECAY = 1e-4


class Images(NamedTuple):
    """Images as the network reads them, and their classes.

    Attributes:
        images: float32 of shape ``(n, height, width, channels)``.
        labels: int32 of shape ``(n,)``.
    """

    images: np.ndarray
    labels: np.ndarray


class Costs(NamedTuple):
    """What a run has cost so far.

    Attributes:
        step: Train steps done.
        seconds: Of everything: finding layers, optimizer, compiling, activations, steps; but not of what the caller
            does between the steps.
        processor_seconds: Processor time of the same, of all cores.
        step_bytes: Most memory that a step takes.
        kept_bytes: Memory of the activations that are kept.
        layers: Number of layers.
        frozen: Number of those that are frozen.
    """

    step: int
    seconds: float
    processor_seconds: float
    step_bytes: int
    kept_bytes: int
    layers: int
    frozen: int


class _Clock:
    """Seconds of the wall and of the processor, which can be stopped."""

    def __init__(self) -> None:
        self.seconds = self.processor_seconds = 0.0
        self.go_on()

    def go_on(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._wall
        self.processor_seconds += time.process_time() - self._processor


def loss_fn(model: nnx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy of a batch."""
    logits = model(images)  # pyright: ignore[reportCallIssue]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def fine_tune(
    model: nnx.Module, data: Images, front: Selectors, *, epochs: int, learning_rate: float, seed: int
) -> Iterator[Costs]:
    """Trains the model in place, a step each time that the next item is asked for.

    Args:
        model: The network, pre-trained.
        data: What it is trained on.
        front: Layers that are frozen from the start, and whose activations are kept; ``()`` for none.
        epochs: Times that every image is seen.
        learning_rate: Peak of the cosine.
        seed: Of the order of images.

    Yields:
        The costs up to then, after every step.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    images, labels = data
    total_steps = epochs * (len(labels) // BATCH_SIZE)
    clock = _Clock()
    tx = optax.adamw(optax.cosine_decay_schedule(learning_rate, total_steps), weight_decay=WEIGHT_DECAY)
    layers = sfj.nnx.find_layers(model, images[:1])
    optimizer = sfj.nnx.Optimizer(model, tx, layers=layers)
    if front:
        optimizer.freeze(model, front)  # all that differs from full training
    train_step = sfj.nnx.CachedStep(make_step, loss_fn, examples=len(images), donate=True)
    for step, batch in enumerate(batches(len(labels), BATCH_SIZE, epochs, seed), start=1):
        loss = float(train_step(model, optimizer, batch, images[batch], labels[batch]))
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} after step {step}; lower --learning-rate")
        clock.stop()
        cache = train_step.cache
        yield Costs(
            step,
            clock.seconds,
            clock.processor_seconds,
            max(program.cost.peak_bytes for program in train_step.programs),
            0 if cache is None or cache.store is None else cache.store.nbytes,
            len(layers),
            len(optimizer.frozen.names),
        )
        clock.go_on()
