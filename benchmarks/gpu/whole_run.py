"""A whole fine-tuning on real images: nothing frozen against the recommended policy, with all waiting counted."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from benchmarks.gpu.cases import FULL, TINY, Case, Sizes
from benchmarks.networks import CLASSES, loss_fn, train_step
from train import efficientnet_lite0, fashion_mnist

_AT_ONCE = 250  # images, in evaluation
_MIN_SAVING = 0.1


class Images(NamedTuple):
    """Grey levels of 28 x 28, which are made larger on the device, and classes."""

    grey: jax.Array
    labels: jax.Array


@partial(jax.jit, static_argnums=2)
def as_read(images: Images, rows: jax.Array, pixels: int) -> tuple[jax.Array, jax.Array]:
    """Some of the images as the network reads them."""
    resized = jax.image.resize(images.grey[rows], (len(rows), pixels, pixels, 1), "bilinear")
    scaled = (resized - efficientnet_lite0.MEAN) / efficientnet_lite0.SCALE
    return jnp.repeat(scaled, 3, axis=-1), images.labels[rows]


class FineTuning:
    """EfficientNet-Lite0 from its ImageNet weights on Fashion-MNIST; a tiny network in its place on a processor.

    Args:
        tiny: Whether it is tiny.
    """

    def __init__(self, *, tiny: bool):
        self.sizes: Sizes = TINY if tiny else FULL
        self.lead = 1 if tiny else 60
        train, test = fashion_mnist.load()
        self.train, self.test = (_images(split, self.sizes.images) for split in (train, test))
        self.make: Callable[[], nnx.Module] = (
            partial(lambda case: case.make(case.frozen(0))[0], Case("mobilenetv2", tiny=True))
            if tiny
            else partial(efficientnet_lite0.load, CLASSES, seed=0, dtype=jnp.bfloat16)
        )
        self.tx = optax.adamw(optax.cosine_decay_schedule(3e-3, self.sizes.run), weight_decay=1e-4)
        model, (inputs, labels) = self.make(), self.batch(0)
        self.layers = sfj.nnx.find_layers(model, inputs)
        self.account = sfj.nnx.account(model, self.layers, loss_fn, (inputs,), labels, tx=self.tx)

    def batch(self, step: int) -> tuple[jax.Array, jax.Array]:
        """The batch of a step, on the device: each epoch a new order."""
        each = len(self.train.labels) // self.sizes.batch
        order = np.random.default_rng(step // each).permutation(len(self.train.labels))
        return as_read(self.train, order[step % each * self.sizes.batch :][: self.sizes.batch], self.sizes.pixels)

    def run(self, policy: sfj.Policy) -> dict[str, Any]:
        """Trains, and says what it took; the program that every run needs is there before the clock starts."""
        model = self.make()
        optimizer = sfj.nnx.Optimizer(model, self.tx, layers=self.layers)
        step = sfj.TrainStep(train_step, account=self.account, donate=True)
        freezer = sfj.nnx.Freezer(model, optimizer, policy, train_step=step, lead=self.lead, min_saving=_MIN_SAVING)
        inputs, labels = self.batch(0)
        step.program(model, optimizer, (inputs,), labels)
        waited = step.wait_seconds
        flops = deciding = 0.0
        loss = jnp.zeros(())
        begin = time.perf_counter()
        for number in range(self.sizes.run):
            inputs, labels = self.batch(number)
            flops += self.account.flops(optimizer.frozen).total
            loss = step(model, optimizer, (inputs,), labels)
            before, still = time.perf_counter(), step.wait_seconds
            freezer.step(loss=loss)
            deciding += time.perf_counter() - before - (step.wait_seconds - still)
        if not np.isfinite(float(loss)):
            raise FloatingPointError(f"the loss is {loss} after {self.sizes.run} steps")
        return {
            "seconds": time.perf_counter() - begin,
            "waiting_seconds": step.wait_seconds - waited,
            "deciding_seconds": deciding,
            "flops": flops,
            "programs": len(step.programs),
            "compile_seconds": sum(one.cost.trace_seconds + one.cost.compile_seconds for one in step.programs[1:]),
            "ahead": sum(one.ahead for one in step.programs[1:]),
            "frozen": len(optimizer.frozen.names),
            "accuracy": self.accuracy(model),
        }

    def accuracy(self, model: nnx.Module) -> float:
        """Share of the test images that is classified right."""
        evaluated = nnx.view(model, use_running_average=True)
        right, n = 0, len(self.test.labels)
        for start in range(0, n, _AT_ONCE):
            inputs, labels = as_read(self.test, np.arange(start, min(n, start + _AT_ONCE)), self.sizes.pixels)
            right += int(_right(evaluated, inputs, labels))
        return right / n


def whole_run(*, tiny: bool) -> dict[str, Any]:
    """Nothing frozen; the recommended policy; and that again, with its programs on disk.

    In a run of half a minute compiling takes a large share. That of the third run is what is left of it in a long one.
    """
    tuning = FineTuning(tiny=tiny)
    policy = partial(sfj.progress, total_steps=tuning.sizes.run)
    with warnings.catch_warnings(record=True) as caught:  # SavingWarnings, if the programs save less than predicted
        warnings.simplefilter("always")
        runs = {
            "never": tuning.run(sfj.policies.never()),
            "progress": tuning.run(policy()),
            "progress, programs on disk": tuning.run(policy()),
        }
    said = [str(one.message) for one in caught]
    return {"steps": tuning.sizes.run, "lead": tuning.lead, "runs": runs, "warnings": said}


def _images(split: fashion_mnist.Split, most: int) -> Images:
    grey = 255 * (split.images * fashion_mnist.STD + fashion_mnist.MEAN)
    return Images(jnp.asarray(grey[:most]), jnp.asarray(split.labels[:most]))


@nnx.jit
def _right(model: nnx.Module, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    return (model(inputs).argmax(-1) == labels).sum()  # pyright: ignore[reportCallIssue]
