"""The loss of every case, and an evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from research.recordings.sets import Arrays

_EVALUATION_BATCH = 128


def loss_fn(model: nnx.Module, inputs: tuple[jax.Array, ...], labels: jax.Array) -> jax.Array:
    """Mean cross entropy."""
    logits = model(*inputs)  # pyright: ignore[reportCallIssue]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def _judge(model: nnx.Module, inputs: tuple[jax.Array, ...], labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = model(*inputs)  # pyright: ignore[reportCallIssue]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, logits.argmax(-1) == labels


def losses_on(model: nnx.Module, examples: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Losses on the examples, float32 (examples,), and whether they are classified right."""
    evaluated = nnx.merge(*nnx.split(model))  # shares the arrays, not the mode
    evaluated.eval()
    parts = []
    for start in range(0, len(examples), _EVALUATION_BATCH):
        part = examples[np.arange(start, min(start + _EVALUATION_BATCH, len(examples)))]
        inputs, labels = jax.tree.map(jnp.asarray, (part.inputs, part.labels))
        parts.append(jax.device_get(_judge(evaluated, inputs, labels)))
    losses, right = (np.concatenate(column) for column in zip(*parts, strict=True))
    return losses, right
