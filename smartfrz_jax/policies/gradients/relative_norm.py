"""Relative gradient norm (Lee et al., 2023, arXiv 2210.11466): layers whose weights hardly feel the loss are frozen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smartfrz_jax.layers.layers import Layers, check_params
from smartfrz_jax.layers.select import Selectors, described
from smartfrz_jax.policies.base import Policy, check_update, freezable, kept, names_of
from smartfrz_jax.policies.gradients import signal
from smartfrz_jax.policies.two_phase import Readings, TwoPhase
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

_NAME = "relative_gradient_norm"


class RelativeNormState(NamedTuple):
    """State of :func:`relative_gradient_norm`.

    Attributes:
        sums: Sum of every layer's relative gradient norms since the last decision, float32 of shape ``(layers,)`` on
            the device.
        counted: Gradients in each sum, int32 of shape ``(layers,)`` on the device.
        norms: Relative gradient norm of every layer as last measured, float32 of shape ``(layers,)``; infinite where it
            never was.
        frozen: Which layers are frozen, shape ``(layers,)``.
    """

    sums: Float[Array, " layers"]
    counted: Int[Array, " layers"]
    norms: Float[np.ndarray, " layers"]
    frozen: Bool[np.ndarray, " layers"]


def relative_gradient_norm(
    threshold: float, evaluate_every: int, *, batches: int = 5, keep: Selectors | None = None
) -> Policy:
    r"""A policy that freezes, in any order, the layers whose gradient is small for their weights.

    The relative gradient norm (RGN) of a layer with kernels :math:`\theta` and their gradient g is

    .. math:: \text{RGN} = \|g\|_2 / \|\theta\|_2

    At each decision it is the mean over the last ``batches`` steps, and a layer is frozen whose RGN is below
    ``threshold`` times the largest of a layer that trains. That of a frozen layer is the one it had when it trained
    last: it returns when the largest has fallen so far that it is no longer below.

    Auto-RGN of the paper multiplies each tensor's learning rate by its RGN over the largest, anew in each epoch from
    five batches, and stops none. This freezes those that it would slow down most; choose the threshold for a network.

    It needs the gradients after each step, and no memory. Gradients that are not finite are left out, and those of
    steps whose loss is not.

    Args:
        threshold: Share of the largest RGN, from 0, freeze nothing, to 1.
        evaluate_every: Train steps between decisions: those of an epoch in the paper. More than the ``lead`` of the
            freezer.
        batches: Steps before a decision whose gradients count, at most ``evaluate_every``; 5 in the paper.
        keep: Layers never to freeze: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` keeps the head, ``()`` nothing.

    Returns:
        The policy.

    Raises:
        ValueError: If an option is out of range; at ``init``, if ``keep`` names no layer of the network; in ``update``,
            if there are gradients, but none is of a kernel of the network, or one has another shape.

    Example:
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> policy = relative_gradient_norm(0.1, evaluate_every=1, batches=1)
        >>> grads = {"a/kernel": jnp.full((2, 2), 0.05), "b/kernel": jnp.ones((2, 2))}
        >>> state = policy.init(layers, params)
        >>> policy.update(state, layers, step=1, params=lambda: params, grads=grads)[0]
        frozenset({'a'})
    """
    checks.fraction(threshold, "threshold")
    checks.count(evaluate_every, "evaluate_every")
    checks.count(batches, "batches")
    if batches > evaluate_every:
        raise ValueError(f"batches: got {batches}, expected at most the steps between decisions, {evaluate_every}")
    keep = kept(keep)

    def init(layers: Layers, params: PyTree) -> RelativeNormState:
        freezable(layers, keep)
        check_params(params)
        unknown = np.full(len(layers), np.inf, np.float32)
        return RelativeNormState(*_nothing(len(layers)), unknown, np.zeros(len(layers), bool))

    def dispatch(
        state: RelativeNormState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], RelativeNormState, Readings | None]:
        check_update(state, RelativeNormState, layers, step)
        names = names_of(layers, state.frozen)  # raises, if it is of another network
        grads = signal.gradients(signals, _NAME)
        if (step - 1) % evaluate_every >= evaluate_every - batches:
            leaves = check_params(layers.unstacked(params()))
            state = _accumulate(state, layers, grads, leaves, signal.loss(signals, grads))
        if step % evaluate_every:
            return names, state, None
        sums, counted = _nothing(len(layers))
        return names, state._replace(sums=sums, counted=counted), {"sums": state.sums, "counted": state.counted}

    options = {
        "name": _NAME,
        "threshold": float(threshold),
        "evaluate_every": int(evaluate_every),
        "batches": int(batches),
        "keep": described(keep),
    }
    phases = TwoPhase(dispatch, functools.partial(_conclude, threshold=threshold, keep=keep))
    return phases.policy(init, options, needs={"grads"})


def _conclude(
    state: RelativeNormState,
    layers: Layers,
    readings: Mapping[str, np.ndarray],
    *,
    step: int,
    threshold: float,
    keep: Selectors | None,
) -> tuple[frozenset[str], RelativeNormState]:
    counted = readings["counted"]
    if counted.any():
        norms = np.where(counted, readings["sums"] / np.maximum(counted, 1), state.norms).astype(np.float32)
        frozen = freezable(layers, keep) & (norms < threshold * norms[counted > 0].max())
        state = state._replace(norms=norms, frozen=frozen)
    return names_of(layers, state.frozen), state


def _accumulate(
    state: RelativeNormState,
    layers: Layers,
    grads: Mapping[str, Any],
    leaves: Mapping[str, Any],
    loss: jax.Array | None,
) -> RelativeNormState:
    if not grads:  # all layers are frozen
        return state
    signal.check_kernels(grads, layers)
    kernels = tuple(tuple(kernel for kernel in layer.kernels if kernel in grads) for layer in layers)
    names = [kernel for some in kernels for kernel in some]
    for name in names:
        signal.check_shape(grads, name, leaves[name])
    given = {name: grads[name] for name in names}, {name: leaves[name] for name in names}
    sums, counted = _add(state.sums, state.counted, *given, loss, kernels)
    return state._replace(sums=sums, counted=counted)


def _nothing(n: int) -> tuple[jax.Array, jax.Array]:
    return jax.device_put((np.zeros(n, np.float32), np.zeros(n, np.int32)))


@functools.partial(jax.jit, static_argnums=5)
def _add(
    sums: jax.Array,
    counted: jax.Array,
    grads: dict[str, jax.Array],
    params: dict[str, jax.Array],
    loss: jax.Array | None,
    kernels: tuple[tuple[str, ...], ...],
) -> tuple[jax.Array, jax.Array]:
    def norm(arrays: dict[str, jax.Array], names: tuple[str, ...]) -> jax.Array:
        return jnp.sqrt(
            sum((jnp.sum(jnp.square(jnp.abs(arrays[n]).astype(jnp.float32))) for n in names), jnp.float32(0))
        )

    norms = jnp.stack(
        [norm(grads, names) / norm(params, names) if names else jnp.float32(jnp.nan) for names in kernels]
    )
    finite = jnp.isfinite(norms) if loss is None else jnp.isfinite(norms) & jnp.isfinite(loss)
    return sums + jnp.where(finite, norms, 0.0), counted + finite.astype(jnp.int32)
