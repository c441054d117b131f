"""Accuracy, F1 and Matthews correlation, exact over any batching: all come from the counts of a confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

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


def metrics_of(name: str) -> dict[str, Metric]:
    """What is reported on a set: accuracy; with F1 on the paraphrase sets, Matthews correlation on CoLA.

    Args:
        name: Name of the set, with or without version.
    """
    if name.startswith(("glue/mrpc", "glue/qqp")):
        return {"accuracy": accuracy, "f1": f1}
    if name.startswith("glue/cola"):
        return {"matthews": matthews, "accuracy": accuracy}
    return {"accuracy": accuracy}
