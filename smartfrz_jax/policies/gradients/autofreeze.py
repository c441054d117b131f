"""AutoFreeze (Liu et al., 2021, arXiv 2102.01386), the paper's second baseline (appendix B)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smartfrz_jax.layers.layers import Layers, check_params
from smartfrz_jax.layers.select import Selectors, described
from smartfrz_jax.policies.base import (
    MAX_CONSECUTIVE_ERRORS,
    Policy,
    check_errors,
    check_finite,
    check_update,
    freezable,
    kept,
    names_of,
)
from smartfrz_jax.policies.gradients import signal
from smartfrz_jax.policies.two_phase import Readings, TwoPhase
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.precision import single
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


_NAME = "autofreeze"
# Beside the norms, by name of parameter, which these are not.
_COUNTED, _ERRORS = "gradients//counted", "gradients//errors"


class AutoFreezeState(NamedTuple):
    """State of :func:`autofreeze`.

    Attributes:
        accumulated: Sum of the gradients since the last evaluation, float32 (complex64 of complex parameters), by
            parameter name; a scalar zero for parameters of frozen layers.
        counted: Gradients in that sum, int32 on the device.
        errors: Steps in a row, up to now, of which a gradient or the loss was not finite, int32 on the device.
        norms: L1 norm of each layer's sum at the last evaluation, float32 of shape ``(layers,)``.
        evaluations: Evaluations so far, int32.
        frozen: Which layers are frozen, shape ``(layers,)``.
    """

    accumulated: dict[str, Float[Array, "..."]]
    counted: Int[Array, ""]
    errors: Int[Array, ""]
    norms: Float[np.ndarray, " layers"]
    evaluations: Int[np.ndarray, ""]
    frozen: Bool[np.ndarray, " layers"]


def autofreeze(
    evaluate_every: int,
    *,
    percentile: float = 50,
    max_consecutive_errors: int = MAX_CONSECUTIVE_ERRORS,
    keep: Selectors | None = None,
) -> Policy:
    r"""A policy that freezes the first layers whose gradients have stopped changing.

    The gradients of an interval are added up. At its end, G is the L1 norm of each layer's sum, and

    .. math:: \eta = |G_\text{prev} - G_\text{cur}| / G_\text{prev}

    its rate of change. Front to back, layers freeze as long as their :math:`\eta` is below the given percentile of that
    of all active layers. The first interval only gives :math:`G_\text{prev}`. As in the original code, the norms are
    L1, and a layer without any gradient has :math:`\eta = 0`. Kept layers count in the percentile, and are passed over.
    Layers that something else has frozen, of whose parameters none has a gradient, do not count.

    A step with a gradient or a loss that is not finite is left out, as ``optax.apply_if_finite`` and loss scales of
    float16 do: the sum of the others counts for the whole interval, and an interval without any is not evaluated.

    It needs the gradients after each step, and memory for their sum: a float32 copy of the active parameters.

    Args:
        evaluate_every: Train steps between evaluations: for the paper's four per epoch, a quarter of an epoch's steps.
        percentile: N of the paper, from 0 to 100; 50 there.
        max_consecutive_errors: Steps in a row that may be left out; more end the run, at an evaluation.
        keep: Layers never to freeze: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` keeps the head, ``()`` nothing.

    Returns:
        The policy.

    Raises:
        ValueError: If an option is out of range; at ``init``, if ``keep`` names no layer of the network; in ``update``,
            if there is no gradient at all though not all layers are frozen, or a layer has only some of its own.
        FloatingPointError: In ``update``, if gradients were not finite in more than ``max_consecutive_errors`` steps in
            a row, or a norm of their sum is not.

    Example:
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> policy = autofreeze(evaluate_every=1)
        >>> state = policy.init(layers, params)
        >>> for step, scale in enumerate((1.0, 2.0), start=1):
        ...     grads = {"a/kernel": jnp.ones((2, 2)), "b/kernel": jnp.full((2, 2), scale)}
        ...     frozen, state = policy.update(state, layers, step=step, params=params, grads=grads)
        >>> frozen
        frozenset({'a'})
    """
    checks.count(evaluate_every, "evaluate_every")
    checks.between(percentile, "percentile", "a number from 0 to 100", 0, 100)
    checks.count(max_consecutive_errors, "max_consecutive_errors", least=0)
    keep = kept(keep)

    def init(layers: Layers, params: PyTree) -> AutoFreezeState:
        freezable(layers, keep)
        return _start(layers, check_params(layers.unstacked(params)))

    def dispatch(
        state: AutoFreezeState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], AutoFreezeState, Readings | None]:
        check_update(state, AutoFreezeState, layers, step)
        state, readings = _accumulate(state, layers, signal.gradients(signals, _NAME), signals), None
        if step % evaluate_every == 0:
            sums = _l1_norms({p: state.accumulated[p] for p in _active_params(layers, state.frozen)})
            readings = sums | {_COUNTED: state.counted, _ERRORS: state.errors}
            state = state._replace(accumulated=_zeros(state, layers), counted=_zero())
        return names_of(layers, state.frozen), state, readings

    named = {"name": _NAME, "evaluate_every": int(evaluate_every), "percentile": float(percentile)}
    rule = {"evaluate_every": evaluate_every, "percentile": percentile, "most": max_consecutive_errors, "keep": keep}
    phases = TwoPhase(dispatch, functools.partial(_conclude, **rule))
    return phases.policy(init, named | {"keep": described(keep)}, needs={"grads"})


def _start(layers: Layers, leaves: Mapping[str, Any]) -> AutoFreezeState:
    return AutoFreezeState(
        {p: jnp.zeros_like(leaves[p], single(leaves[p].dtype)) for layer in layers for p in layer.params},
        _zero(),
        _zero(),
        np.zeros(len(layers), np.float32),
        np.zeros((), np.int32),
        np.zeros(len(layers), bool),
    )


def _conclude(
    state: AutoFreezeState,
    layers: Layers,
    readings: Mapping[str, np.ndarray],
    *,
    step: int,
    evaluate_every: int,
    percentile: float,
    most: int,
    keep: Selectors | None,
) -> tuple[frozenset[str], AutoFreezeState]:
    check_errors(readings[_ERRORS], most, what="grads", policy=_NAME, step=step)
    if readings[_COUNTED]:
        norms = _norms(layers, readings, float(readings[_COUNTED] / evaluate_every))
        check_finite(layers, ~np.isfinite(norms), what="grads", policy=_NAME, step=step)
        state = _evaluate(state, layers, freezable(layers, keep), percentile, norms)
    return names_of(layers, state.frozen), state


def _accumulate(
    state: AutoFreezeState, layers: Layers, grads: Mapping[str, Any], signals: Mapping[str, Any]
) -> AutoFreezeState:
    by_hand = np.array([name in signals.get("frozen", ()) for name in layers.names], bool)
    state = state._replace(frozen=state.frozen | _frozen_by_others(layers, grads, state.frozen, by_hand))
    active = _active_params(layers, state.frozen)
    selected, loss = _select(grads, active, state.accumulated), signal.loss(signals, grads)
    sums = {p: state.accumulated[p] for p in active}
    added, counted, errors = _add(sums, state.counted, state.errors, selected, loss)
    return state._replace(accumulated=state.accumulated | added, counted=counted, errors=errors)


def _norms(layers: Layers, sums: Mapping[str, np.ndarray], share: float) -> Float[np.ndarray, " layers"]:
    """L1 norm of each layer's sum; ``share`` is the part of the interval's steps that it is made of."""
    norms = np.array([sum(float(sums.get(param, 0.0)) for param in layer.params) for layer in layers], np.float32)
    norms /= np.float32(share)
    return norms


def _evaluate(
    state: AutoFreezeState, layers: Layers, may_freeze: np.ndarray, percentile: float, norms: np.ndarray
) -> AutoFreezeState:
    """Compares the norms with the last ones."""
    frozen = state.frozen
    if state.evaluations > 0 and not frozen.all():
        change = _rate_of_change(state.norms.astype(np.float64), norms.astype(np.float64))
        threshold = np.percentile(change[~frozen], percentile)
        ends_prefix = ~frozen & may_freeze & (change >= threshold)
        frozen = frozen | (may_freeze & ~np.logical_or.accumulate(ends_prefix))
    active = set(_active_params(layers, frozen))
    return state._replace(
        accumulated={p: x if p in active else _zero(np.float32) for p, x in state.accumulated.items()},
        norms=norms,
        evaluations=np.asarray(state.evaluations + 1, np.int32),
        frozen=frozen,
    )


def _zeros(state: AutoFreezeState, layers: Layers) -> dict[str, Any]:
    """Sums to begin with, where the last ones lie."""
    active = set(_active_params(layers, state.frozen))
    with jax.transfer_guard_host_to_device("allow"):  # of the number zero
        return {p: jnp.zeros_like(x) if p in active else _zero(np.float32) for p, x in state.accumulated.items()}


def _rate_of_change(previous: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Finite also where ``previous`` is zero: there it is huge, unless ``current`` is zero as well."""
    change = np.abs(previous - current) / np.maximum(previous, np.finfo(np.float32).tiny)
    return np.where(current > 0, change, 0.0)


def _active_params(layers: Layers, frozen: np.ndarray) -> list[str]:
    return [param for layer, is_frozen in zip(layers, frozen, strict=True) if not is_frozen for param in layer.params]


def _frozen_by_others(layers: Layers, grads: Mapping[str, Any], frozen: np.ndarray, by_hand: np.ndarray) -> np.ndarray:
    without = np.array([not any(param in grads for param in layer.params) for layer in layers], bool)
    if not (frozen | by_hand).all() and (frozen | without).all():
        raise signal.unknown(grads, "an active layer")
    return without


def _select(grads: Mapping[str, Any], params: list[str], like: Mapping[str, Any]) -> dict[str, Any]:
    for param in params:
        if param not in grads:
            raise ValueError(
                f"grads: {param!r} of an active layer is missing (got {len(grads)} gradients); pass a dict from "
                "parameter names to gradients, such as Frozen.active_leaves(grads)"
            )
        signal.check_shape(grads, param, like[param])
    return {param: grads[param] for param in params}


@jax.jit
def _add(
    accumulated: dict[str, jax.Array],
    counted: jax.Array,
    errors: jax.Array,
    grads: dict[str, jax.Array],
    loss: jax.Array | None,
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    finite = jnp.all(jnp.array([jnp.isfinite(grad).all() for grad in grads.values()]))
    if loss is not None:
        finite &= jnp.isfinite(loss)
    added = {
        name: jnp.where(finite, total + grads[name].astype(total.dtype), total) for name, total in accumulated.items()
    }
    return added, counted + finite.astype(jnp.int32), jnp.where(finite, 0, errors + 1)


def _zero(dtype: Any = np.int32) -> jax.Array:
    return jax.device_put(np.zeros((), dtype))


@jax.jit
def _l1_norms(accumulated: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.sum(jnp.abs(total)) for name, total in accumulated.items()}
