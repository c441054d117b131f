"""Freezing by how far training has come and how deep a layer lies, and nothing else: what a predictor must beat."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.layers.select import Selectors, described
from smartfrz_jax.policies.base import NEVER, Policy, freezable, kept, scheduled
from smartfrz_jax.pytrees import checks

# Intercept and weights of progress and depth, fitted to what freezing would have cost in recorded runs: python -m
# ``research.predictors.fit --target branch_harm`` prints them; parts of the recordings give 0.8 to 1.0, 5.0 to 5.1,
# -4.6 to -5.
COEFFICIENTS = (0.8, 5.1, -4.6)

# Moments are computed in float64; one that falls on a step exactly must not move to the next by the last bit.
_ROUNDING = 1e-9


def progress(
    *,
    total_steps: int,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    caution: float = 0.95,
    keep: Selectors | None = None,
) -> Policy:
    r"""A policy that freezes by a logistic regression on the progress of training and the depth of a layer.

    Layer l (from 0 to L) is frozen from the first step t of T at which

    .. math:: \sigma(w_0 + w_1\, t/T + w_2\, l/L) > \text{caution}

    Nothing of this depends on what happens in the run, so the moments are known beforehand. Such a rule cannot see
    whether the network was well trained when the run began.

    Args:
        total_steps: Train steps of the run, T.
        coefficients: :math:`w_0, w_1, w_2`: intercept, weight of progress (above 0: what is frozen stays so), weight of
            depth (below 0 for front to back).
        caution: Probability above which a layer freezes, as in :func:`smartfrz_jax.smartfrz`: from 0, everything at
            once, to 1, nothing ever. The default cost 0.3 points of accuracy in four fine-tunings.
        keep: Layers never to freeze: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` keeps the head, ``()`` nothing.

    Returns:
        The policy.

    Raises:
        ValueError: If an option is out of range; at ``init``, if ``keep`` names no layer of the network.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> policy = progress(total_steps=100)
        >>> policy.update(policy.init(layers, params), layers, step=51, params=lambda: params)[0]
        frozenset({'a'})
    """
    checks.count(total_steps, "total_steps")
    intercept, of_progress, of_depth = _checked(coefficients)
    checks.fraction(caution, "caution")
    keep = kept(keep)

    def freeze_at(layers: Layers) -> np.ndarray:
        depth = np.linspace(0, 1, len(layers))
        moments = (_logit(caution) - intercept - of_depth * depth) / of_progress * total_steps
        # Beyond the run is never, and so is the infinity of caution 1.
        first = np.floor(np.clip(moments, -1, total_steps) + _ROUNDING) + 1
        return np.where(freezable(layers, keep) & (first <= total_steps), first, NEVER)

    options = {
        "name": "progress",
        "total_steps": int(total_steps),
        "coefficients": (intercept, of_progress, of_depth),
        "caution": float(caution),
        "keep": described(keep),
    }
    return scheduled(freeze_at, options)


def _checked(coefficients: tuple[float, float, float]) -> tuple[float, float, float]:
    expected = "three finite numbers: intercept, weight of progress, weight of depth"
    checks.instance(coefficients, Iterable, "coefficients", expected)
    values = tuple(checks.number(value, "coefficients", expected) for value in coefficients)
    if len(values) != 3 or not np.isfinite(values).all():
        raise ValueError(f"coefficients: got {coefficients}, expected {expected}")
    if not values[1] > 0:
        raise ValueError(
            f"coefficients: got {coefficients}, expected a weight of progress (the second) above 0; with this one a "
            "layer would train again later"
        )
    return values


def _logit(probability: float) -> float:
    with np.errstate(divide="ignore"):
        return float(np.log(probability) - np.log1p(-probability))
