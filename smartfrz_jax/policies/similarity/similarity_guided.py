"""Similarity-guided freezing: the oracle of the paper's Table 1, which knows the network as it will be once trained."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from smartfrz_jax.layers.select import Selectors
from smartfrz_jax.policies.base import Policy, kept
from smartfrz_jax.policies.similarity.comparison import Comparison
from smartfrz_jax.predictor.cka import stabilised
from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


class SimilarityGuidedState(NamedTuple):
    """State of :func:`similarity_guided`.

    Attributes:
        cka: CKA of every layer at the last evaluations, oldest first, float32 of shape ``(window, layers)``.
        evaluations: Evaluations so far, int32.
        frozen: Which layers are frozen, shape ``(layers,)``.
    """

    cka: Float[np.ndarray, "window layers"]
    evaluations: Int[np.ndarray, ""]
    frozen: Bool[np.ndarray, " layers"]


def similarity_guided(
    reference: Mapping[str, Array],
    evaluate_every: int,
    *,
    window: int = 5,
    tolerance: float = 0.02,
    keep: Selectors | None = None,
) -> Policy:
    """A policy that freezes a layer once its output has stopped changing relative to that of the well-trained network.

    The measure is linear CKA on a fixed probe batch (paper, Eq. 5). A layer freezes when its last ``window`` values
    differ by at most ``tolerance`` (:func:`smartfrz_jax.predictor.stabilised`), whatever the other layers do. It needs
    a function that computes the layers' outputs; that is called at evaluations only.

    Args:
        reference: Output of each layer of the well-trained network on the probe batch, shape ``(examples, ...)``, by
            layer name.
        evaluate_every: Train steps between evaluations.
        window: Evaluations over which CKA must be flat.
        tolerance: Largest difference between two of them.
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
        >>> outputs = {"a": jnp.eye(2), "b": jnp.eye(2)}
        >>> policy = similarity_guided(outputs, evaluate_every=1, window=2)
        >>> state = policy.init(layers, params)
        >>> for step in (1, 2):
        ...     frozen, state = policy.update(state, layers, step=step, params=params, features=lambda: outputs)
        >>> frozen
        frozenset({'a'})
    """
    checks.by_name(reference, "reference", "a dict from layer names to the outputs of the well-trained network")
    checks.between(tolerance, "tolerance", "a difference in CKA of 0 or more", 0, np.inf)
    comparison = Comparison(
        "similarity_guided",
        SimilarityGuidedState,
        reference,
        evaluate_every,
        window,
        tolerance,
        kept(keep),
        judges_frozen=False,
    )
    return comparison.policy(_start, functools.partial(_decide, tolerance=tolerance))


def _start(cka: Float[np.ndarray, "window layers"], frozen: Bool[np.ndarray, " layers"]) -> SimilarityGuidedState:
    return SimilarityGuidedState(cka, np.zeros((), np.int32), frozen)


def _decide(
    state: SimilarityGuidedState,
    now: Float[np.ndarray, " layers"],
    judged: Bool[np.ndarray, " layers"],
    *,
    tolerance: float,
) -> SimilarityGuidedState:
    cka, evaluations = np.concatenate([state.cka[1:], now[None]]), np.asarray(state.evaluations + 1, np.int32)
    frozen, window = state.frozen, len(cka)
    if evaluations >= window:
        frozen = frozen | (judged & stabilised(cka, window=window, tolerance=tolerance)[-1])
    return SimilarityGuidedState(cka, evaluations, frozen)
