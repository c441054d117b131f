"""How good freeze probabilities are, on examples whose target is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_BINS = 10


class Evaluation(NamedTuple):
    """Figures of one set of predictions.

    Attributes:
        n: Number of examples.
        positives: How many of them have the target *freeze*.
        balanced_accuracy: Mean of the shares of *freeze* and of *keep* examples that are decided rightly; the decision
            is *freeze* above a probability of 0.5. Nan if either class is missing.
        auc: Probability that an example to freeze gets a higher probability than one to keep, ties counted half (area
            under the ROC curve). Nan if either class is missing.
        calibration_error: Expected calibration error: mean distance between probability and share of *freeze*, over 10
            bins of equal width, weighted by the examples in them.
        brier: Mean squared distance between probability and target.
    """

    n: int
    positives: int
    balanced_accuracy: float
    auc: float
    calibration_error: float
    brier: float


def evaluate(probability: Float[np.ndarray, " n"], target: Bool[np.ndarray, " n"]) -> Evaluation:
    """Compares freeze probabilities with their targets.

    Args:
        probability: Probability of *freeze*, shape ``(n,)``.
        target: True where the layer should be frozen, bool of shape ``(n,)``.

    Returns:
        The figures.

    Raises:
        ValueError: If a shape does not fit, there are no examples, or a probability is not from 0 to 1.
        TypeError: If ``target`` is not boolean.

    Example:
        >>> evaluate(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])).auc
        0.75
    """
    p, target = np.asarray(probability, np.float64), np.asarray(target)
    if p.ndim != 1 or p.shape != target.shape or not p.size:
        raise ValueError(
            f"probability, target: got shapes {p.shape} and {target.shape}, expected both (n,) with n at least 1"
        )
    if target.dtype != bool:
        raise TypeError(f"target: got dtype {target.dtype}, expected bool; true where the layer should be frozen")
    outside = np.flatnonzero(~((p >= 0) & (p <= 1)))
    if outside.size:
        raise ValueError(
            f"probability: entry {outside[0]} is {p[outside[0]]}, expected numbers from 0 to 1; "
            "pass probabilities, not logits"
        )
    return Evaluation(
        n=p.size,
        positives=int(target.sum()),
        balanced_accuracy=_balanced_accuracy(p, target),
        auc=_auc(p, target),
        calibration_error=_calibration_error(p, target),
        brier=float(np.mean((p - target) ** 2)),
    )


def _balanced_accuracy(p: np.ndarray, target: np.ndarray) -> float:
    if target.all() or not target.any():
        return float("nan")
    freeze = p > 0.5  # as argmax over (keep, freeze) has it
    return float((freeze[target].mean() + (~freeze[~target]).mean()) / 2)


def _auc(p: np.ndarray, target: np.ndarray) -> float:
    positives = int(target.sum())
    negatives = target.size - positives
    if not positives or not negatives:
        return float("nan")
    _, value, counts = np.unique(p, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2  # of equal values: their mean
    wins = rank[value][target].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * negatives))


def _calibration_error(p: np.ndarray, target: np.ndarray) -> float:
    bins = np.minimum((p * _BINS).astype(int), _BINS - 1)
    # A bin's share of the examples times the distance of its means is the distance of its sums, divided by n.
    distance = np.bincount(bins, weights=p - target, minlength=_BINS)
    return float(np.abs(distance).sum() / p.size)
