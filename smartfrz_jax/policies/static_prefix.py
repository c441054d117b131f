"""Fine-tuning as many do it: the first layers frozen at one moment, the rest trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from smartfrz_jax.layers import Layers
from smartfrz_jax.policies.base import (
    NEVER,
    Policy,
    check_count,
    check_fraction,
    freezable,
    kept,
    scheduled,
    shares_of_cost,
)

# Costs are added up in float64; a budget that is met exactly must not be missed by the last bit.
_ROUNDING = 1e-9


def static_prefix(
    budget: float,
    *,
    total_steps: int,
    at: float = 0.0,
    costs: Mapping[str, float] | None = None,
    keep: Iterable[str] | None = None,
) -> Policy:
    """A policy that freezes the first layers at one moment: what a careful choice must beat at the same budget.

    It freezes the longest prefix whose share of the network's cost, times the share of the run for which it is frozen,
    ``1 - at``, is at most the budget. Kept layers inside the prefix are passed over.

    Args:
        budget: Share of the run's cost that may be frozen, in [0, 1].
        total_steps: Train steps of the run.
        at: Moment of freezing, as a share of the run. Policies are asked after a step, so 0 is after the first one.
        costs: Cost of each layer in any unit, by layer name; ``None`` makes all equal.
        keep: Names of layers never to freeze; ``None`` keeps the head, ``()`` nothing.

    Returns:
        The policy.

    Raises:
        ValueError: If an option is out of range; at ``init``, if ``keep`` or ``costs`` do not fit the network.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> policy = static_prefix(0.5, total_steps=100)
        >>> policy.update(policy.init(layers, params), layers, step=1, params=lambda: params)[0]
        frozenset({'a'})
    """
    check_fraction(budget, "budget")
    check_count(total_steps, "total_steps")
    check_fraction(at, "at")
    keep = kept(keep)

    def freeze_at(layers: Layers) -> np.ndarray:
        may_freeze = freezable(layers, keep)
        frozen_share = np.cumsum(np.where(may_freeze, shares_of_cost(layers, costs), 0.0)) * (1 - at)
        fits = may_freeze & (frozen_share <= budget + _ROUNDING)
        return np.where(fits, np.ceil(at * total_steps - _ROUNDING), NEVER)

    return scheduled(freeze_at)
