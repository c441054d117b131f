"""SlimFit (Ardakani et al., 2023, arXiv 2305.18513): the layers that moved least are frozen, until others move less."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smartfrz_jax.layers.layers import Layers, check_params
from smartfrz_jax.layers.select import Selectors, described
from smartfrz_jax.policies import snapshot
from smartfrz_jax.policies.base import Policy, check_finite, check_update, freezable, kept, names_of
from smartfrz_jax.pytrees import checks, hosts
from smartfrz_jax.pytrees.precision import single
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_NAME = "slimfit"
# Of layers that did not train yet: more than any weights move, so that each has its turn.
_UNKNOWN = 1e30


class SlimFitState(NamedTuple):
    """State of :func:`slimfit`.

    Attributes:
        distances: How far each layer moved when it trained last, relative to its weights, float32 of shape
            ``(layers,)``; of a layer that did not train yet more than any weights move.
        before: Kernels of the active layers one step before the next decision.
        frozen: Which layers are frozen, bool of shape ``(layers,)``.
    """

    distances: Float[np.ndarray, " layers"]
    before: snapshot.Snapshot
    frozen: Bool[np.ndarray, " layers"]


def slimfit(rate: float, *, switch_every: int = 50, seed: int = 0, keep: Selectors | None = None) -> Policy:
    r"""A policy that freezes the share of the layers that moved least: inter-layer scheduling of SlimFit.

    A step moves layer l by the distance

    .. math:: d_l = \|W_l^t - W_l^{t-1}\|_1 / \|W_l^{t-1}\|_1

    Of frozen layers the distance is that of the last time they trained. The layers with the smallest distances are
    frozen until the next decision. As learning rates fall, the distances of those that train fall below those of
    frozen ones, which return then. At first every distance is large, in random order, so every layer has its turn.

    It needs memory for a copy of the active kernels, at the step before each decision. The paper decides after every
    step; here every decision may need a program of its own, and ``switch_every`` bounds how many come in a run. Where a
    step moves nothing, as with ``optax.MultiSteps`` those before the update, the decision is that of the first that
    does, and the copy is kept until then.

    Args:
        rate: Share of the layers to freeze, from 0 to 1: the paper's freezing rate.
        switch_every: Train steps between decisions; 1 in the paper. More than the ``lead`` of the freezer.
        seed: Seed of the order at first.
        keep: Layers that always train: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` is the head, ``()`` none.

    Returns:
        The policy.

    Raises:
        ValueError: If an option is out of range; at ``init``, if ``keep`` names no layer of the network.
        FloatingPointError: In ``update``, if weights are not finite.

    Example:
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> policy = slimfit(0.5, keep=())
        >>> len(policy.update(policy.init(layers, params), layers, step=0, params=lambda: params)[0])
        1
    """
    checks.fraction(rate, "rate")
    checks.count(switch_every, "switch_every")
    checks.seed(seed)
    keep = kept(keep)

    def init(layers: Layers, params: PyTree) -> SlimFitState:
        may_freeze = freezable(layers, keep)
        distances = (_UNKNOWN * (1 + np.random.default_rng(seed).uniform(size=len(layers)))).astype(np.float32)
        return SlimFitState(distances, snapshot.blank(layers, params), _least(distances, may_freeze, rate))

    def update(
        state: SlimFitState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], SlimFitState]:
        check_update(state, SlimFitState, layers, step)
        names_of(layers, state.frozen)  # raises, if it is of another network
        if state.before.is_taken:
            leaves = check_params(layers.unstacked(params()))
            state = _decide(state, layers, leaves, freezable(layers, keep), rate, step)
        if (step + 1) % switch_every == 0:
            leaves = check_params(layers.unstacked(params()))
            active = {name: leaves[name] for name in snapshot.active_kernels(layers, state.frozen)}
            state = state._replace(before=snapshot.take(layers, active))
        elif state.before.is_blank:
            state = state._replace(before=snapshot.none(layers))
        return names_of(layers, state.frozen), state

    options = {
        "name": _NAME,
        "rate": float(rate),
        "switch_every": int(switch_every),
        "seed": int(seed),
        "keep": described(keep),
    }

    def start(state: SlimFitState, layers: Layers) -> frozenset[str]:
        return names_of(layers, state.frozen)

    return Policy(init, update, options=options, start=start)


def _decide(
    state: SlimFitState,
    layers: Layers,
    leaves: Mapping[str, Any],
    may_freeze: Bool[np.ndarray, " layers"],
    rate: float,
    step: int,
) -> SlimFitState:
    before = state.before.held
    moved, size = hosts.fetch(_sums(before, {name: leaves[name] for name in before}))
    if moved and not any(float(distance) for distance in moved.values()):
        return state
    distances = state.distances.copy()
    for number, layer in enumerate(layers):
        kernels = [kernel for kernel in layer.kernels if kernel in before]
        distance = sum(float(moved[kernel]) for kernel in kernels)
        if distance != 0:  # else it was frozen all the same, by hand or for the lead
            distances[number] = distance / max(
                sum(float(size[kernel]) for kernel in kernels), float(np.finfo(np.float32).tiny)
            )
    check_finite(layers, ~np.isfinite(distances), what="params", policy=_NAME, step=step)
    return SlimFitState(distances, snapshot.none(layers), _least(distances, may_freeze, rate))


def _least(
    distances: Float[np.ndarray, " layers"], may_freeze: Bool[np.ndarray, " layers"], rate: float
) -> Bool[np.ndarray, " layers"]:
    """The share of the layers with the smallest distances."""
    order = np.argsort(np.where(may_freeze, distances, np.inf), kind="stable")
    frozen = np.zeros(len(distances), bool)
    frozen[order[: int(rate * len(distances) + 1e-9)]] = True
    return frozen & may_freeze


@jax.jit
def _sums(
    before: dict[str, jax.Array], after: dict[str, jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Sum of the absolute values of what each kernel moved by, and of what it was."""
    old = {name: kernel.astype(single(kernel.dtype)) for name, kernel in before.items()}
    moved = {name: jnp.sum(jnp.abs(after[name].astype(kernel.dtype) - kernel)) for name, kernel in old.items()}
    return moved, {name: jnp.sum(jnp.abs(kernel)) for name, kernel in old.items()}
