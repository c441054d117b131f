"""Freezing the front that lowers the loss least for what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smartfrz_jax.layers.layers import Layers, check_params
from smartfrz_jax.layers.select import Selector, Selectors, described
from smartfrz_jax.policies.base import (
    Policy,
    check_finite,
    check_update,
    freezable,
    kept,
    names_of,
    numbers_of,
    shares_of_cost,
)
from smartfrz_jax.pytrees import checks, hosts, paths
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Gradients = Callable[[PyTree, int], PyTree]
"""From parameters and the number of the measurement to the gradient of the loss on a batch that no step has used."""

_NAME = "gain"
_MEASUREMENTS = 100  # in a run, by default


class GainState(NamedTuple):
    """State of :func:`gain`.

    Attributes:
        before: Parameters before the step that is being measured, on the host, by name; zeros until the first.
        gains: Expected fall of the loss by layer in the last measurements, the latest last, float32 of shape
            ``(window, layers)``.
        measurements: Measurements so far, int32.
        frozen: Which layers are frozen, shape ``(layers,)``.
    """

    before: dict[str, np.ndarray]
    gains: Float[np.ndarray, "window layers"]
    measurements: Int[np.ndarray, ""]
    frozen: Bool[np.ndarray, " layers"]


def gain(
    gradients: Gradients,
    *,
    total_steps: int,
    factor: float = 0.5,
    window: int = 8,
    measure_every: int | None = None,
    errors: float = 1.0,
    costs: Mapping[str, float] | None = None,
    keep: Selectors | None = None,
) -> Policy:
    r"""A policy that freezes the front whose share in the fall of the loss is below its share in the cost of a step.

    The update :math:`u` of a train step, whatever the optimizer, against the gradient :math:`g` of a batch that the
    step has not seen gives the fall of the loss to be expected of each layer,

    .. math:: -\langle u_l, g_l \rangle

    Front to back, the longest run of active layers is frozen for which

    .. math:: \frac{\sum_l \text{gain}_l}{\text{gain of all active layers}} + e\,\sigma
              \le \text{factor} \cdot \frac{\text{backward cost of these layers}}{\text{cost of the step}}

    with means over a window of measurements, and the standard error :math:`\sigma` of their quotient. Where the
    expected fall of all layers together is not above zero, nothing is decided. In costs a backward pass counts twice
    the forward pass.

    A measurement takes a forward and a backward pass on the batch and a copy of the parameters on the host.

    Args:
        gradients: The gradient on an independent batch, such as :func:`smartfrz_jax.nnx.gradient_probe` makes it; best
            of held-out examples, as the gain on examples that a network learns by heart is too high.
        total_steps: Train steps of the run.
        factor: From 0, never freeze, up; 1 freezes what lowers the loss less for its cost than the average layer.
        window: Measurements whose mean is taken; before there are as many, nothing freezes.
        measure_every: Train steps between measurements, at least 2. Default: a hundredth of the run.
        errors: Standard errors that are added to the share of the gain, e.
        costs: Forward cost of each layer in any unit, by layer name; ``None`` makes all equal.
        keep: Layers never to freeze: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` keeps the head, ``()`` nothing.

    Returns:
        The policy.

    Raises:
        TypeError: If ``gradients`` is not a function.
        ValueError: If an option is out of range; at ``init``, if ``keep`` or ``costs`` do not fit the network; in
            ``update``, if the gradient lacks a parameter or has another shape.
        FloatingPointError: In ``update``, if a gain is not finite.

    Example:
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> gradient = {"a": {"kernel": jnp.zeros((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> policy = gain(lambda params, number: gradient, total_steps=100, window=2, measure_every=2)
        >>> state = policy.init(layers, params)
        >>> for step in range(1, 6):
        ...     params = jax.tree.map(lambda leaf: leaf - 0.1, params)
        ...     frozen, state = policy.update(state, layers, step=step, params=lambda: params)
        >>> frozen, [round(float(fall), 3) for fall in state.gains[-1]]
        (frozenset({'a'}), [0.0, 0.4])
    """
    checks.count(total_steps, "total_steps")
    measure_every = max(2, total_steps // _MEASUREMENTS) if measure_every is None else measure_every
    rule = _Gain(gradients, total_steps, factor, window, measure_every, errors, numbers_of(costs), kept(keep))
    return Policy(rule.init, rule.update, options=rule.options)


@dataclasses.dataclass(frozen=True)
class _Gain:
    """The options of :func:`gain`, and what it does with them."""

    gradients: Gradients
    total_steps: int
    factor: float
    window: int
    measure_every: int
    errors: float
    costs: dict[str, float] | None
    keep: tuple[Selector, ...] | None

    def __post_init__(self) -> None:
        expected = (
            "a function of (params, number) to a gradient, such as sfj.nnx.gradient_probe(model, loss_fn, batches)"
        )
        checks.function(self.gradients, "gradients", expected)
        checks.count(self.window, "window", least=2)
        checks.count(self.measure_every, "measure_every", least=2)
        if self.window * self.measure_every >= self.total_steps:
            raise ValueError(
                f"window: got {self.window} measurements, one in {self.measure_every} steps, expected fewer than fit "
                f"into the {self.total_steps} steps of the run, for nothing freezes before; take a smaller window or "
                "measure_every"
            )
        for value, argument in ((self.factor, "factor"), (self.errors, "errors")):
            expected = "a finite number from 0 up"
            if not 0 <= checks.number(value, argument, expected) < np.inf:
                raise ValueError(f"{argument}: got {value}, expected {expected}")

    @property
    def options(self) -> dict[str, Any]:
        return {
            "name": _NAME,
            "total_steps": int(self.total_steps),
            "factor": float(self.factor),
            "window": int(self.window),
            "measure_every": int(self.measure_every),
            "errors": float(self.errors),
            "costs": self.costs,
            "keep": described(self.keep),
        }

    def init(self, layers: Layers, params: PyTree) -> GainState:
        freezable(layers, self.keep)
        shares_of_cost(layers, self.costs)
        leaves = check_params(params)
        before = {param: np.zeros(np.shape(leaf), leaf.dtype) for param, leaf in leaves.items()}
        gains = np.zeros((self.window, len(layers)), np.float32)
        return GainState(before, gains, np.zeros((), np.int32), np.zeros(len(layers), bool))

    def update(
        self, state: GainState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], GainState]:
        check_update(state, GainState, layers, step)
        may_freeze = freezable(layers, self.keep)
        if not (may_freeze & ~state.frozen).any():
            return names_of(layers, state.frozen), state
        if step % self.measure_every == 0:
            state = state._replace(before=hosts.fetch(paths.flatten(params())))
        elif step % self.measure_every == 1 and step > self.measure_every:
            state = self._measured(state, layers, params(), step)
            if state.measurements >= self.window:
                by_hand = np.array([name in signals.get("frozen", ()) for name in layers.names], bool)
                shares = shares_of_cost(layers, self.costs)
                more = _front(state.gains, shares, state.frozen | by_hand, may_freeze, self.factor, self.errors)
                state = state._replace(frozen=state.frozen | more)
        return names_of(layers, state.frozen), state

    def _measured(self, state: GainState, layers: Layers, now: PyTree, step: int) -> GainState:
        before = paths.tree_map(lambda name, _: state.before[name], now)
        gradient = _fitting(paths.flatten(self.gradients(before, int(state.measurements))), state.before)
        found = _gains(layers, state.before, paths.flatten(now), gradient)
        check_finite(layers, ~np.isfinite(found), what="gradients", policy=_NAME, step=step)
        return state._replace(
            gains=np.concatenate([state.gains[1:], found[None]]),
            measurements=np.asarray(state.measurements + 1, np.int32),
        )


def _fitting(gradient: Mapping[str, Any], params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    for name, leaf in params.items():
        got = np.shape(gradient[name]) if name in gradient else "none"
        if got != leaf.shape:
            raise ValueError(
                f"gradients: got {got} for {name!r}, expected shape {leaf.shape}; return the gradient with respect to "
                "all parameters, as jax.grad of the loss gives it"
            )
    return {name: gradient[name] for name in params}


def _gains(
    layers: Layers, before: Mapping[str, Any], now: Mapping[str, Any], gradient: Mapping[str, Any]
) -> Float[np.ndarray, " layers"]:
    falls = hosts.fetch(_falls(*(layers.unstacked(dict(each)) for each in (before, now, gradient))))
    return np.array([sum(falls[param] for param in layer.params) for layer in layers], np.float32)


@jax.jit
def _falls(before: dict[str, Any], now: dict[str, Any], gradient: dict[str, Any]) -> dict[str, Any]:
    def fall(old: Any, new: Any, slope: Any) -> Any:
        kind = jnp.promote_types(jnp.result_type(old), jnp.float32)  # of complex parameters complex
        update = new.astype(kind) - old.astype(kind)
        return -jnp.real(jnp.sum(update * slope.astype(kind)))  # jax.grad gives the conjugate of a complex gradient

    return {name: fall(before[name], now[name], gradient[name]) for name in before}


def _front(
    gains: Float[np.ndarray, "window layers"],
    costs: Float[np.ndarray, " layers"],
    frozen: Bool[np.ndarray, " layers"],
    may_freeze: Bool[np.ndarray, " layers"],
    factor: float,
    errors: float,
) -> Bool[np.ndarray, " layers"]:
    """The layers that freeze now."""
    active = ~frozen
    candidate = active & may_freeze
    of_all = gains[:, active].sum(axis=1, dtype=np.float64)
    if not of_all.mean() > 0:
        return np.zeros(len(frozen), bool)
    of_front = np.cumsum(np.where(candidate, gains, 0.0), axis=1, dtype=np.float64)
    share = of_front.mean(axis=0) / of_all.mean()
    residuals = of_front - share * of_all[:, None]
    error = residuals.std(axis=0, ddof=1) / np.sqrt(len(gains)) / of_all.mean()
    saved = 2 * np.cumsum(np.where(candidate, costs, 0.0)) / (costs.sum() + 2 * costs[active].sum())
    ends = np.flatnonzero(candidate & (share + errors * error <= factor * saved))
    return candidate & (np.arange(len(frozen)) <= (ends[-1] if len(ends) else -1))
