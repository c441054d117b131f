"""Similarity-guided freezing: the oracle of the paper's Table 1, which knows the network as it will be once trained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.layers.select import Selectors, described
from smartfrz_jax.policies.base import Policy, check_finite, check_update, freezable, kept, names_of
from smartfrz_jax.policies.similarity import outputs
from smartfrz_jax.policies.two_phase import Readings, TwoPhase
from smartfrz_jax.predictor.cka import stabilised
from smartfrz_jax.pytrees import checks, hosts
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


_NAME = "similarity_guided"


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
    checks.count(evaluate_every, "evaluate_every")
    checks.count(window, "window", least=2)
    checks.by_name(reference, "reference", "a dict from layer names to the outputs of the well-trained network")
    checks.between(tolerance, "tolerance", "a difference in CKA of 0 or more", 0, np.inf)
    keep = kept(keep)

    def init(layers: Layers, params: PyTree) -> SimilarityGuidedState:
        known = outputs.of_layers(reference, names_of(layers, freezable(layers, keep)), "reference")
        checks.finite(hosts.fetch(known), "reference", "take the outputs of a network that has not diverged")
        cka = np.zeros((window, len(layers)), np.float32)
        return SimilarityGuidedState(cka, np.zeros((), np.int32), np.zeros(len(layers), bool))

    def dispatch(
        state: SimilarityGuidedState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], SimilarityGuidedState, Readings | None]:
        check_update(state, SimilarityGuidedState, layers, step)
        features = outputs.features_of(signals, _NAME)
        may_freeze = freezable(layers, keep)
        judged = may_freeze & ~state.frozen
        is_due = step % evaluate_every == 0 and judged.any()
        readings = {"cka": outputs.cka_of(layers, features(), reference, may_freeze)} if is_due else None
        return names_of(layers, state.frozen), state, readings

    options = {
        "name": _NAME,
        "evaluate_every": int(evaluate_every),
        "window": int(window),
        "tolerance": float(tolerance),
        "keep": described(keep),
    }
    phases = TwoPhase(dispatch, functools.partial(_conclude, tolerance=tolerance, keep=keep))
    return Policy(init, phases.update, frozenset({"features"}), options, phases)


def _conclude(
    state: SimilarityGuidedState,
    layers: Layers,
    readings: Mapping[str, np.ndarray],
    *,
    step: int,
    tolerance: float,
    keep: Selectors | None,
) -> tuple[frozenset[str], SimilarityGuidedState]:
    may_freeze = freezable(layers, keep)
    judged = may_freeze & ~state.frozen
    cka = np.zeros(len(layers), np.float32)
    cka[may_freeze] = readings["cka"]
    check_finite(layers, judged & ~np.isfinite(cka), what="features", policy=_NAME, step=step)
    state = _with_cka(state, np.where(judged, cka, 0.0))
    window = len(state.cka)
    if state.evaluations >= window:
        flat = stabilised(state.cka, window=window, tolerance=tolerance)[-1]
        state = state._replace(frozen=state.frozen | (judged & flat))
    return names_of(layers, state.frozen), state


def _with_cka(state: SimilarityGuidedState, cka: np.ndarray) -> SimilarityGuidedState:
    recent = np.concatenate([state.cka[1:], cka[None]])
    return SimilarityGuidedState(recent, np.asarray(state.evaluations + 1, np.int32), state.frozen)
