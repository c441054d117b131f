"""The loss of ``train.finetune``, and its step: in parts, with blocks computed again, or with activations kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import smartfrz_jax as sfj
from train.data import Data
from train.data.language.packing import IGNORED
from train.data.language.perplexity import next_token_loss
from train.devices.accumulate import accumulating_step
from train.devices.config import DeviceConfig
from train.devices.mesh import pinned
from train.devices.recompute import recomputed
from train.loop import make_step
from train.options import KeepActivations
from train.recovery.not_finite import skip_not_finite


def loss_fn(model: nnx.Module, inputs: tuple[jax.Array, ...], labels: jax.Array) -> jax.Array:
    """Mean cross entropy; labels are classes, or probabilities where examples are mixed, or the tokens that follow."""
    logits = model(*inputs)  # pyright: ignore[reportCallIssue]
    if logits.ndim == 3:
        return next_token_loss(logits, labels)
    if labels.ndim == 2:
        return optax.softmax_cross_entropy(logits, labels).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _counted(inputs: tuple[jax.Array, ...], labels: jax.Array) -> jax.Array | int:
    """What the loss of some examples is the mean over: examples, or tokens that are not ignored."""
    of_tokens = labels.ndim == 2 and jnp.issubdtype(labels.dtype, jnp.integer)
    return (labels != IGNORED).sum() if of_tokens else len(labels)


def make_train_step(
    data: Data,
    account: sfj.Account,
    total_steps: int,
    keep_activations: KeepActivations,
    *,
    devices: DeviceConfig,
    mesh: Mesh | None,
    skips: bool = False,
) -> sfj.TrainStep | sfj.nnx.CachedStep:
    """The step; augmentation is part of it.

    Args:
        data: The training set.
        account: The account of the step.
        total_steps: Length of the run.
        keep_activations: Where those of frozen layers are kept; ``no`` to compute them in every step.
        devices: How a step uses the devices' memory.
        mesh: The devices; None for one.
        skips: Whether it leaves out what is not finite.

    Returns:
        A step of ``(model, optimizer, key, inputs, labels)``; before the key, numbers of examples if it keeps anything.
        Of data in views the key is left out.
    """
    keeps = keep_activations != "no"  # of a loss that is one call of jax.checkpoint, nothing can be kept
    of_examples = loss_fn if keeps else recomputed(loss_fn, remat=devices.remat, mesh=mesh)

    def loss_of_batch(model: nnx.Module, key: jax.Array, inputs: tuple[Any, ...], labels: jax.Array) -> jax.Array:
        return of_examples(model, *data.augment(key, inputs, labels))

    def complete(step: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return pinned(skip_not_finite(step) if skips else step, mesh)

    if not keeps:
        one, parts = make_step(loss_of_batch), devices.accumulate
        step = one if parts == 1 else accumulating_step(of_examples, data.augment, parts, mesh, weigh=_counted)
        return sfj.TrainStep(complete(step), account=account)
    return sfj.nnx.CachedStep(
        lambda loss: complete(make_step(loss)),
        loss_fn if data.views else loss_of_batch,
        examples=data.examples,
        storage=sfj.caching.Storage(keep_activations),
        views=data.views or 1,
        account=account,
        total_steps=total_steps,
    )
