"""GradES (Wen et al., 2025, arXiv 2509.01842): a matrix whose gradients have stopped changing is frozen."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.layers.select import Selectors, described
from smartfrz_jax.policies import snapshot
from smartfrz_jax.policies.base import Policy, check_update, freezable, kept, names_of
from smartfrz_jax.policies.gradients import signal
from smartfrz_jax.policies.two_phase import Readings, TwoPhase
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.precision import single
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Bool

_NAME = "grades"


class GradESState(NamedTuple):
    """State of :func:`grades`.

    Attributes:
        before: Gradients of the active kernels one step before the next decision.
        frozen: Which layers are frozen, bool of shape ``(layers,)``.
    """

    before: snapshot.Snapshot
    frozen: Bool[np.ndarray, " layers"]


def grades(
    threshold: float, *, total_steps: int, grace: float = 0.5, evaluate_every: int = 10, keep: Selectors | None = None
) -> Policy:
    r"""A policy that freezes each layer, in any order, once its gradient hardly changes from one step to the next.

    After the first share ``grace`` of the run, a layer freezes for good when

    .. math:: \|g_t - g_{t-1}\|_1 < \tau

    where g is the gradient of its kernels and the norm the sum of absolute values. It grows with the size of a layer
    and the noise of a batch: the authors tune the threshold for each network. (Their code compares weights.) The copy
    of the active gradients takes memory from the step before a decision to it. A change that is not finite freezes
    nothing, nor does that of a step whose loss is not: it was skipped, and its gradients may be those of the step
    before.

    Args:
        threshold: The paper's tau, positive.
        total_steps: Train steps of the run.
        grace: Share of the run in which nothing freezes: the paper's alpha.
        evaluate_every: Train steps between decisions; 1 in the paper. Each is compared with the step before it.
        keep: Layers never to freeze: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` keeps the head, ``()`` nothing.

    Returns:
        The policy.

    Raises:
        ValueError: If an option is out of range; at ``init``, if ``keep`` names no layer of the network; in ``update``,
            if there are gradients, but none is of a kernel of the network.

    Example:
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> policy = grades(0.1, total_steps=4, evaluate_every=1, keep=())
        >>> state = policy.init(layers, params)
        >>> for step in (1, 2):
        ...     grads = {"a/kernel": jnp.ones((2, 2)), "b/kernel": jnp.full((2, 2), float(step))}
        ...     frozen, state = policy.update(state, layers, step=step, params=params, grads=grads)
        >>> frozen
        frozenset({'a'})
    """
    checks.positive(threshold, "threshold")
    checks.count(total_steps, "total_steps")
    checks.fraction(grace, "grace")
    checks.count(evaluate_every, "evaluate_every")
    keep = kept(keep)
    first = math.ceil(grace * total_steps - 1e-9)

    def init(layers: Layers, params: PyTree) -> GradESState:
        freezable(layers, keep)
        return GradESState(snapshot.blank(layers, params), np.zeros(len(layers), bool))

    def dispatch(
        state: GradESState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], GradESState, Readings | None]:
        check_update(state, GradESState, layers, step)
        names_of(layers, state.frozen)  # raises, if it is of another network
        grads = signal.gradients(signals, _NAME)
        changes = None
        if step % evaluate_every == 0 and step >= first:
            before = {name: grad for name, grad in state.before.held.items() if name in grads}
            changes = _changes(before, {name: grads[name] for name in before}, signal.loss(signals, grads))
            state = state._replace(before=snapshot.none(layers))
        if (step + 1) % evaluate_every == 0 and step + 1 >= first:
            state = state._replace(before=snapshot.take(layers, _active(layers, state.frozen, grads)))
        elif state.before.is_blank:
            state = state._replace(before=snapshot.none(layers))
        return names_of(layers, state.frozen), state, changes

    options = {
        "name": _NAME,
        "threshold": float(threshold),
        "total_steps": int(total_steps),
        "grace": float(grace),
        "evaluate_every": int(evaluate_every),
        "keep": described(keep),
    }
    phases = TwoPhase(dispatch, functools.partial(_conclude, threshold=threshold, keep=keep))
    return phases.policy(init, options, needs={"grads"})


def _conclude(
    state: GradESState,
    layers: Layers,
    readings: Mapping[str, np.ndarray],
    *,
    step: int,
    threshold: float,
    keep: Selectors | None,
) -> tuple[frozenset[str], GradESState]:
    known = np.array([all(kernel in readings for kernel in layer.kernels) for layer in layers], bool)
    change = np.array([sum(float(readings.get(kernel, 0.0)) for kernel in layer.kernels) for layer in layers])
    state = state._replace(frozen=state.frozen | (freezable(layers, keep) & known & (change < threshold)))
    return names_of(layers, state.frozen), state


def _active(layers: Layers, frozen: Bool[np.ndarray, " layers"], grads: Mapping[str, Any]) -> dict[str, Any]:
    """Gradients of the kernels of active layers; those of layers that something else has frozen are not there."""
    active = snapshot.active_kernels(layers, frozen)
    if grads:
        signal.check_kernels(grads, layers)
    return {name: grads[name] for name in active if name in grads}


@jax.jit
def _changes(before: dict[str, jax.Array], after: dict[str, jax.Array], loss: jax.Array | None) -> dict[str, jax.Array]:
    """NaN after a step that was skipped."""

    def change(old: jax.Array, new: jax.Array) -> jax.Array:
        distance = jnp.sum(jnp.abs(new.astype(single(new.dtype)) - old.astype(single(old.dtype))))
        return distance if loss is None else jnp.where(jnp.isfinite(loss), distance, jnp.nan)

    return {name: change(grad, after[name]) for name, grad in before.items()}
