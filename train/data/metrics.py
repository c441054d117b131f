"""Accuracy, F1 and Matthews correlation, exact over any batching: all come from the counts of a confusion matrix.

The loss, and of decoders perplexity, come from the sums of the losses and of the examples, or the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from smartfrz_jax.pytrees.types import PyTree
from train.data.language.perplexity import log_likelihood, perplexity, token_sums

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Metric = Callable[[np.ndarray], float]


@jax.jit
def confusion(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], weights: Float[Array, " batch"]
) -> Int[Array, "classes classes"]:
    """Counts of (label, prediction) in a batch; sum them over the batches of an evaluation.

    Args:
        logits: Or anything else whose largest entry is the prediction.
        labels: Classes.
        weights: Of the batch: examples of weight 0 are not counted.

    Returns:
        int32: row = label, column = prediction.

    Example:
        >>> counts = confusion(jnp.eye(3), jnp.array([0, 1, 1]), jnp.array([1.0, 1.0, 1.0]))
        >>> counts.tolist(), round(accuracy(counts), 3)
        ([[1, 0, 0], [0, 1, 1], [0, 0, 0]], 0.667)
    """
    classes = logits.shape[-1]
    counts = jnp.zeros((classes, classes), jnp.int32)
    return counts.at[labels, jnp.argmax(logits, axis=-1)].add((weights > 0).astype(jnp.int32))


def accuracy(counts: np.ndarray | Array) -> float:
    """Share of the examples that are classified right; NaN without examples."""
    counts = np.asarray(counts, np.int64)
    return float(np.trace(counts) / counts.sum()) if counts.any() else math.nan


def f1(counts: np.ndarray | Array, positive: int = 1) -> float:
    """F1 of the class ``positive``: 2 TP / (2 TP + FP + FN); 0 where it neither occurs nor is predicted."""
    counts = np.asarray(counts, np.int64)
    if not 0 <= positive < len(counts):
        raise ValueError(f"positive: got {positive}, expected a class, 0 to {len(counts) - 1}")
    both = int(counts[positive].sum() + counts[:, positive].sum())
    return 2 * int(counts[positive, positive]) / both if both else 0.0


def matthews(counts: np.ndarray | Array) -> float:
    """Matthews correlation, for any number of classes; 0 where all labels or all predictions are the same."""
    counts = np.asarray(counts, np.int64)
    total, right = int(counts.sum()), int(np.trace(counts))
    labels, predictions = [[int(n) for n in counts.sum(axis)] for axis in (1, 0)]
    covariance = right * total - sum(t * p for t, p in zip(labels, predictions, strict=True))
    variances = (total**2 - sum(t * t for t in labels)) * (total**2 - sum(p * p for p in predictions))
    return covariance / math.sqrt(variances) if variances else 0.0


def counts(logits: Array, labels: Array, weights: Array) -> Array:
    """What a batch adds to all figures: the confusion matrix, or, of the logits of every token, the sums of losses."""
    return (token_sums if logits.ndim == 3 else confusion)(logits, labels, weights)


def loss_sums(
    logits: Float[Array, "batch *tokens classes"], labels: Int[Array, "batch *tokens"], weights: Float[Array, " batch"]
) -> Float[Array, "2"]:
    """Sum of the cross entropies of a batch, and number of its examples; of decoders, of its tokens.

    Args:
        logits: Computed in float32 from here on.
        labels: Classes, or the tokens that come next.
        weights: Of the batch: examples of weight 0 are not counted.

    Example:
        >>> sums = loss_sums(jnp.zeros((3, 8)), jnp.array([0, 1, 1]), jnp.array([1.0, 1.0, 0.0]))
        >>> round(mean_loss(np.asarray(sums)), 4)
        2.0794
    """
    if logits.ndim == 3:
        return token_sums(logits, labels, weights)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return jnp.stack([(losses * weights).sum(), weights.sum()])


def mean_loss(sums: np.ndarray) -> float:
    """Mean cross entropy, in nats; NaN without examples."""
    return -log_likelihood(sums)


def total(parts: Iterable[PyTree]) -> PyTree:
    """The sum of what :func:`counts`, :func:`loss_sums` or both give for each batch, in 64 bits, added up as they come.

    Args:
        parts: Pytrees of NumPy arrays; at least one.
    """
    wide = {"i": np.int64, "f": np.float64}
    rest = iter(parts)
    sums = jax.tree.map(lambda array: array.astype(wide[array.dtype.kind]), next(rest))
    for part in rest:
        sums = jax.tree.map(lambda whole, array: np.add(whole, array, out=whole), sums, part)
    return sums


def metrics_of(name: str, task: Literal["classify", "lm"] = "classify") -> dict[str, Metric]:
    """What is reported on a set, the figure first that tells which state of a network is best, the higher the better.

    That is accuracy; with F1 on the paraphrase sets, Matthews correlation on CoLA. Of decoders, the mean log-likelihood
    of a token, and perplexity.

    Args:
        name: Name of the set, with or without version.
        task: What is learned of it.
    """
    if task == "lm":
        return {"log-likelihood": log_likelihood, "perplexity": perplexity}
    if name.startswith(("glue/mrpc", "glue/qqp")):
        return {"accuracy": accuracy, "f1": f1}
    if name.startswith("glue/cola"):
        return {"matthews": matthews, "accuracy": accuracy}
    return {"accuracy": accuracy}
