"""Fine-tuning as many do it: the first layers frozen at moments chosen by hand, the rest trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from smartfrz_jax.layers.layers import Layers, check_layers
from smartfrz_jax.layers.select import Selectors, described
from smartfrz_jax.policies.base import (
    Policy,
    check_update,
    freezable,
    kept,
    names_of,
    numbers_of,
    shares_of_cost,
)
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

# Costs are added up in float64; a share that is met exactly must not be missed by the last bit.
_ROUNDING = 1e-9


class StagesState(NamedTuple):
    """State of :func:`static_prefix`.

    Attributes:
        begins: Steps after which each stage begins, in order, int32 of shape ``(stages,)``.
        frozen: Which layers are frozen in each, shape ``(stages, layers)``.
    """

    begins: Int[np.ndarray, " stages"]
    frozen: Bool[np.ndarray, "stages layers"]

    def at(self, step: int) -> Bool[np.ndarray, " layers"]:
        """Which layers are frozen after a step; of stages that begin together, those of the last."""
        stage = int(np.searchsorted(self.begins, step, side="right")) - 1
        return self.frozen[stage] if stage >= 0 else np.zeros_like(self.frozen[0])


def static_prefix(
    stages: Sequence[tuple[float, float]],
    *,
    total_steps: int,
    costs: Mapping[str, float] | None = None,
    keep: Selectors | None = None,
) -> Policy:
    """A policy that freezes the first layers at given moments: what a careful choice must beat at the same cost.

    In a stage ``(at, share)``, from the share ``at`` of training on, the longest prefix is frozen whose part in the
    network's cost is at most ``share``. Kept layers inside the prefix are passed over. ``[(0.0, 0.5)]`` is the front
    half from the start; ``[(0.0, 0.5), (0.5, 1.0)]`` from half time on also the rest, but for the head. Where the share
    falls, layers train again: ``[(0.0, 0.5), (0.4, 0.0)]`` lets the front half wait until what is behind it has come
    close, as gradual unfreezing (Howard and Ruder 2018, arXiv 1801.06146) and linear probing before fine-tuning (Kumar
    et al. 2022, arXiv 2202.10054) do.

    Args:
        stages: Moments, as shares of the run, with the share of the network's cost that is frozen from each on; moments
            may not fall. A moment of 0 is before the first step with :meth:`smartfrz_jax.Freezer.start`, else after it.
        total_steps: Train steps of the run.
        costs: Cost of each layer in any unit, by layer name; ``None`` makes all equal.
        keep: Layers never to freeze: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` keeps the head, ``()`` nothing.

    Returns:
        The policy.

    Raises:
        ValueError: If an option is out of range; at ``init``, if ``keep`` or ``costs`` do not fit the network.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> policy = static_prefix([(0.0, 0.5)], total_steps=100)
        >>> policy.update(policy.init(layers, params), layers, step=1, params=lambda: params)[0]
        frozenset({'a'})
    """
    checks.count(total_steps, "total_steps")
    stages = _checked(stages)
    costs = numbers_of(costs)
    keep = kept(keep)

    begins = np.array([np.ceil(at * total_steps - _ROUNDING) for at, _ in stages], np.int32)

    def init(layers: Layers, params: PyTree) -> StagesState:
        check_layers(layers)
        may_freeze = freezable(layers, keep)
        prefix_share = np.cumsum(np.where(may_freeze, shares_of_cost(layers, costs), 0.0))
        # At a share of 0 layers train that cost nothing, too, such as an embedding in which tokens are looked up.
        stopped = [may_freeze & (share > 0) & (prefix_share <= share + _ROUNDING) for _, share in stages]
        return StagesState(begins, np.stack(stopped))

    def update(
        state: StagesState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], StagesState]:
        check_update(state, StagesState, layers, step)
        return names_of(layers, state.at(step)), state

    def start(state: StagesState, layers: Layers) -> frozenset[str]:
        return names_of(layers, state.at(0))

    options = {
        "name": "static_prefix",
        "total_steps": int(total_steps),
        "stages": stages,
        "costs": costs,
        "keep": described(keep),
    }
    return Policy(init, update, options=options, start=start)


def _checked(stages: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    try:
        pairs = tuple((float(at), float(share)) for at, share in stages)
    except (TypeError, ValueError):  # something else in place of a pair, or of the sequence
        pairs = ()
    if not pairs:
        raise ValueError(
            f"stages: got {stages}, expected at least one pair (share of training, share of the cost), such as "
            "[(0.0, 0.5)]"
        )
    for at, share in pairs:
        checks.fraction(at, "stages: moment")
        checks.fraction(share, "stages: share of the cost")
    if any(later < earlier for (earlier, _), (later, _) in itertools.pairwise(pairs)):
        raise ValueError(f"stages: got {stages}, expected moments that do not fall; put the stages in order")
    return pairs
