"""How well the next token is predicted: the loss of a batch, and perplexity, exact over any batching."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from train.data.language.packing import IGNORED

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def next_token_loss(logits: Float[Array, "n tokens vocab"], labels: Int[Array, "n tokens"]) -> Float[Array, ""]:
    """Mean cross entropy of the tokens that come next, in nats, over those that are not ignored.

    Args:
        logits: Of each token.
        labels: The tokens that come next, or ``IGNORED``.

    Returns:
        The mean; 0 where all are ignored.

    Example:
        >>> round(float(next_token_loss(jnp.zeros((1, 2, 8)), jnp.array([[3, -1]]))), 4)
        2.0794
    """
    total, count = token_sums(logits, labels, jnp.ones(len(labels), logits.dtype))
    return total / jnp.maximum(count, 1)


def token_sums(
    logits: Float[Array, "n tokens vocab"], labels: Int[Array, "n tokens"], weights: Float[Array, " n"]
) -> Float[Array, "2"]:
    """Sum of the cross entropies of a batch, and number of the tokens; add them up over the batches of an evaluation.

    Args:
        logits: Of each token.
        labels: The tokens that come next, or ``IGNORED``.
        weights: Of the batch: sequences of weight 0 are not counted.
    """
    counted = (labels != IGNORED).astype(logits.dtype) * weights.astype(logits.dtype)[:, None]
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, :, None], axis=-1)[:, :, 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.stack([(losses * counted).sum(), counted.sum()])


def log_likelihood(sums: np.ndarray) -> float:
    """Mean log-likelihood of a token, in nats; NaN without tokens."""
    total, count = (float(value) for value in sums)
    return -total / count if count else math.nan


def perplexity(sums: np.ndarray) -> float:
    """Exponential of the mean cross entropy of a token; NaN without tokens, at most 1e300.

    Example:
        >>> round(perplexity(np.array([2 * math.log(8), 2.0])), 6)
        8.0
    """
    return math.exp(min(-log_likelihood(sums), math.log(1e300)))
