"""Layers frozen at random moments: what any judgement about layers must beat at the same budget."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.layers.select import Selectors, described
from smartfrz_jax.policies.base import (
    NEVER,
    Policy,
    freezable,
    kept,
    numbers_of,
    scheduled,
    shares_of_cost,
)
from smartfrz_jax.pytrees import checks

# Halvings after which the scale of the draws is exact to the last bit of a float64.
_HALVINGS = 200


def random(
    budget: float,
    *,
    total_steps: int,
    seed: int = 0,
    costs: Mapping[str, float] | None = None,
    keep: Selectors | None = None,
) -> Policy:
    """A policy that freezes layers at random moments, in any order, to a given budget.

    Layer l is frozen for the share min(1, s u_l) of the run, with u_l uniform in (0, 1] and s such that the mean of
    these shares, weighted by the layers' costs, is the budget, but for the rounding of each moment to a whole step.

    Args:
        budget: Share of the run's cost that is to be frozen, in [0, 1].
        total_steps: Train steps of the run.
        seed: Seed of the draw.
        costs: Cost of each layer in any unit, by layer name; ``None`` makes all equal.
        keep: Layers never to freeze: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` keeps the head, ``()`` nothing.

    Returns:
        The policy.

    Raises:
        ValueError: If an option is out of range; at ``init``, if ``keep`` or ``costs`` do not fit the network, or if
            the layers that may freeze cost less than the budget.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> random(0.2, total_steps=100).init(layers, params).freeze_at[0]
        np.int32(60)
    """
    checks.fraction(budget, "budget")
    checks.count(total_steps, "total_steps")
    checks.seed(seed)
    costs = numbers_of(costs)
    keep = kept(keep)

    def freeze_at(layers: Layers) -> np.ndarray:
        weights = np.where(freezable(layers, keep), shares_of_cost(layers, costs), 0.0)
        if budget > weights.sum() + 1e-9:
            raise ValueError(
                f"budget: got {budget}, but the layers that may freeze make up {weights.sum():.4g} of the cost; take "
                "at most that, or keep fewer layers"
            )
        draws = 1.0 - np.random.default_rng(seed).uniform(size=len(layers))
        shares = np.minimum(1.0, _scale(draws, weights, budget) * draws)
        moments = np.round(total_steps * (1.0 - shares))
        return np.where((weights > 0) & (moments < total_steps), moments, NEVER)

    options = {
        "name": "random",
        "budget": float(budget),
        "total_steps": int(total_steps),
        "seed": int(seed),
        "costs": costs,
        "keep": described(keep),
    }
    return scheduled(freeze_at, options)


def _scale(draws: np.ndarray, weights: np.ndarray, budget: float) -> float:
    """The s at which ``sum(weights * min(1, s * draws))``, which grows with s, is the budget."""
    low, high = 0.0, 1.0 / draws.min()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if np.sum(weights * np.minimum(1.0, middle * draws)) < budget:
            low = middle
        else:
            high = middle
    return high
