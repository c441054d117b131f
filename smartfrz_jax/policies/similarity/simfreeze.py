"""SimFreeze of EdgeOL (Li et al., 2024, arXiv 2401.16694): a network compared with itself before the run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from smartfrz_jax.layers.select import Selectors
from smartfrz_jax.policies.base import Policy, kept
from smartfrz_jax.policies.similarity.comparison import Comparison
from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from smartfrz_jax.policies.similarity.comparison import Outputs


class SimFreezeState(NamedTuple):
    """State of :func:`simfreeze`.

    Attributes:
        cka: CKA of every layer with itself before the run, at the last evaluations, oldest first, float32 of shape
            ``(window, layers)``.
        evaluations: Evaluations since a layer began to train, up to the window, int32 of shape ``(layers,)``.
        at_freeze: CKA of a frozen layer when it froze, float32 of shape ``(layers,)``; zero of the others.
        frozen: Which layers are frozen, shape ``(layers,)``.
    """

    cka: Float[np.ndarray, "window layers"]
    evaluations: Int[np.ndarray, " layers"]
    at_freeze: Float[np.ndarray, " layers"]
    frozen: Bool[np.ndarray, " layers"]


def simfreeze(
    reference: Outputs | Callable[[], Outputs],
    evaluate_every: int,
    *,
    window: int = 3,
    tolerance: float = 0.01,
    keep: Selectors | None = None,
) -> Policy:
    r"""A policy that freezes a layer once its output has stopped moving away from what it was before the run.

    The measure is linear CKA of a layer's output with that of the same layer before the first step, on a probe batch:
    it needs no trained network, as that of :func:`similarity_guided` does. A layer freezes, whatever the others do,
    when over the last ``window`` evaluations

    .. math:: |\text{CKA}_t - \text{CKA}_{t-1}| \le \text{tolerance} \cdot \text{CKA}_{t-1}

    and trains again once its CKA is further than that from what it was when it froze: layers before it go on learning,
    or the data have changed. For the latter give a function, and compute both outputs on examples of the new data.

    The paper has the reference, the measure, freezing what is stable, and layers that return at a change of the data.
    Window, tolerance and interval are this project's, and so is comparing frozen layers at every evaluation.

    Args:
        reference: Output of each layer before the first step on the probe batch, shape ``(examples, ...)``, by layer
            name, such as ``features(model)`` gives them; or a function without arguments that gives them, called at
            evaluations, where the probe batch changes. A run that goes on from a checkpoint needs the same one.
        evaluate_every: Train steps between evaluations. More than the ``lead`` of the freezer.
        window: Evaluations over which CKA must be flat.
        tolerance: Largest relative change from one to the next.
        keep: Layers never to freeze: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` keeps the head, ``()`` nothing.

    Returns:
        The policy.

    Raises:
        ValueError: If an option is out of range; at ``init``, if ``keep`` names no layer of the network or
            ``reference`` lacks one; in ``update``, if ``features`` lacks one or has another number of examples.
        FloatingPointError: In ``update``, if a CKA is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> before = {"a": jnp.eye(2), "b": jnp.eye(2)}
        >>> policy = simfreeze(before, evaluate_every=1, window=2)
        >>> state = policy.init(layers, params)
        >>> for step in (1, 2):
        ...     frozen, state = policy.update(state, layers, step=step, params=params, features=lambda: before)
        >>> frozen
        frozenset({'a'})
    """
    checks.between(tolerance, "tolerance", "a relative change of 0 or more", 0, np.inf)
    checks.instance(reference, Mapping | Callable, "reference", "a dict from layer names to outputs, or a function")
    comparison = Comparison(
        "simfreeze", SimFreezeState, reference, evaluate_every, window, tolerance, kept(keep), judges_frozen=True
    )
    return comparison.policy(_start, functools.partial(_decide, tolerance=tolerance))


def _start(cka: Float[np.ndarray, "window layers"], frozen: Bool[np.ndarray, " layers"]) -> SimFreezeState:
    return SimFreezeState(cka, np.zeros(len(frozen), np.int32), cka[0], frozen)


def _decide(
    state: SimFreezeState,
    now: Float[np.ndarray, " layers"],
    judged: Bool[np.ndarray, " layers"],
    *,
    tolerance: float,
) -> SimFreezeState:
    cka = np.concatenate([state.cka[1:], now[None]])
    returned = state.frozen & ~_near(now, state.at_freeze, tolerance)
    window = len(cka)
    count = np.where(state.frozen & ~returned, 0, np.minimum(np.where(returned, 0, state.evaluations) + 1, window))
    freezes = judged & (count == window) & _near(cka[1:], cka[:-1], tolerance).all(axis=0)
    frozen = (state.frozen & ~returned) | freezes
    at_freeze = np.where(frozen, np.where(freezes, now, state.at_freeze), 0).astype(np.float32)
    return SimFreezeState(cka, count.astype(np.int32), at_freeze, frozen)


def _near(values: np.ndarray, others: np.ndarray, tolerance: float) -> np.ndarray:
    return np.abs(values.astype(np.float64) - others) <= tolerance * others.astype(np.float64)
