"""How good freeze probabilities are, on examples whose target is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

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
        moment_auc: ``auc`` within groups of examples, such as the layers of a run at one moment, weighted by each
            group's pairs of one to freeze and one to keep. Nan without groups, or if none has both.
    """

    n: int
    positives: int
    balanced_accuracy: float
    auc: float
    calibration_error: float
    brier: float
    moment_auc: float


def evaluate(
    probability: Float[np.ndarray, " n"],
    target: Bool[np.ndarray, " n"],
    *,
    groups: Int[np.ndarray, " n"] | None = None,
) -> Evaluation:
    """Compares freeze probabilities with their targets.

    Args:
        probability: Probability of *freeze*, shape ``(n,)``.
        target: True where the layer should be frozen, bool of shape ``(n,)``.
        groups: Number of the group of each example, shape ``(n,)``, for ``moment_auc``; see
            :func:`~smartfrz_jax.learning.moments`.

    Returns:
        The figures.

    Raises:
        ValueError: If a shape does not fit, there are no examples, or a probability is not from 0 to 1.
        TypeError: If ``target`` is not boolean, or ``groups`` are not integers.

    Example:
        >>> evaluate(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])).auc
        0.75
    """
    p = checks.array(probability, "probability", "an array of probabilities of shape (n,)").astype(np.float64)
    target = np.asarray(target)
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
        moment_auc=float("nan") if groups is None else _auc_within(p, target, _checked_groups(groups, p.shape)),
    )


def _checked_groups(groups: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    groups = np.asarray(groups)
    if groups.dtype.kind not in "iu":
        raise TypeError(f"groups: got dtype {groups.dtype}, expected integers, such as moments(examples)")
    if groups.shape != shape:
        raise ValueError(f"groups: got shape {groups.shape}, expected {shape}, one number for each probability")
    return groups


def _balanced_accuracy(p: np.ndarray, target: np.ndarray) -> float:
    if target.all() or not target.any():
        return float("nan")
    freeze = p > 0.5  # as argmax over (keep, freeze) has it
    return float((freeze[target].mean() + (~freeze[~target]).mean()) / 2)


def _auc(p: np.ndarray, target: np.ndarray) -> float:
    return _auc_within(p, target, np.zeros(p.size, int))


def _auc_within(p: np.ndarray, target: np.ndarray, groups: np.ndarray) -> float:
    """Share of the pairs within groups that are ordered rightly: the mean of the groups' AUC, weighted by pairs."""
    wins = pairs = 0.0
    order = np.argsort(groups, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        chosen = target[members]
        positives, negatives = int(chosen.sum()), int((~chosen).sum())
        _, value, counts = np.unique(p[members], return_inverse=True, return_counts=True)
        rank = np.cumsum(counts) - (counts - 1) / 2  # of equal values: their mean
        wins += rank[value][chosen].sum() - positives * (positives + 1) / 2
        pairs += positives * negatives
    return float(wins / pairs) if pairs else float("nan")


def _calibration_error(p: np.ndarray, target: np.ndarray) -> float:
    bins = np.minimum((p * _BINS).astype(int), _BINS - 1)
    # A bin's share of the examples times the distance of its means is the distance of its sums, divided by n.
    distance = np.bincount(bins, weights=p - target, minlength=_BINS)
    return float(np.abs(distance).sum() / p.size)
