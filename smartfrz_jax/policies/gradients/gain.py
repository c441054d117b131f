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
    Saving,
    check_finite,
    check_update,
    freezable,
    kept,
    names_of,
    numbers_of,
    shares_of_cost,
)
from smartfrz_jax.policies.gradients.gain_shares import Rule, Saved, Signals
from smartfrz_jax.pytrees import checks, hosts, paths
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Gradients = Callable[[PyTree, int], PyTree]
"""From parameters and the number of the measurement to the gradient of the loss on a batch that no step has used."""

_NAME = "gain"
# Steps from one measurement to the next, by default: one costs about as much as a step.
_EVERY = 100


@dataclasses.dataclass(frozen=True)
class Measuring:
    """How often :func:`gain` measures, and how sure it must be.

    Attributes:
        every: Train steps between measurements, at least 2. Default: 100, so that they take about 1 % of the run; fewer
            where two windows would not fit into it.
        window: Measurements whose mean is taken; before there are as many, nothing freezes.
        errors: Standard errors that are added to the share of the gain, from 0 up.

    Raises:
        ValueError: If one is out of range.
    """

    every: int | None = None
    window: int = 8
    errors: float = 1.0

    def __post_init__(self) -> None:
        if self.every is not None:
            checks.count(self.every, "every", least=2)
        checks.count(self.window, "window", least=2)
        checks.between(self.errors, "errors", "a finite number from 0 up", 0, float(np.finfo(np.float32).max))


class GainState(NamedTuple):
    """State of :func:`gain`.

    Attributes:
        before: Parameters before the step that is being measured, on the host, by name; zeros until the first.
        gains: Expected fall of the loss by layer in the last measurements, the latest last, float32 of shape
            ``(window, layers)``; zero of layers that were not trained, and of all until a step moves something.
        measurements: Measurements so far, int32.
        frozen: Which layers are frozen, shape ``(layers,)``.
        last: Gradient of the last measurement, on the host, by name; empty unless layers may return.
        signals: What frozen layers show; ``None`` unless layers may return.
    """

    before: dict[str, np.ndarray]
    gains: Float[np.ndarray, "window layers"]
    measurements: Int[np.ndarray, ""]
    frozen: Bool[np.ndarray, " layers"]
    last: dict[str, np.ndarray]
    signals: Signals | None


def gain(
    gradients: Gradients,
    *,
    total_steps: int,
    factor: float = 0.5,
    returns: bool = False,
    measuring: Measuring | None = None,
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
    expected fall of all layers together is not above zero, nothing is decided.

    With ``returns`` frozen layers are judged on: their gradients at two measurements in a row tell what they would have
    gained, at the rate at which they gained when they trained last (exact for SGD, a first estimate for Adam). A front
    stays frozen while the same holds of it with :math:`-e\,\sigma`, in a step with all layers active; else layers at
    its end train again. Let their moments return with them, by ``returning="kept"``.

    A measurement takes a forward and a backward pass on the batch and a copy of the parameters on the host; with
    ``returns`` of the gradient, too. If the step moved nothing, as with ``optax.MultiSteps`` those before the update,
    the first one that does is measured in its place.

    Args:
        gradients: The gradient on an independent batch, such as :func:`smartfrz_jax.nnx.gradient_probe` makes it; best
            of held-out examples, as the gain on examples that a network learns by heart is too high.
        total_steps: Train steps of the run.
        factor: From 0, never freeze, up; 1 freezes what lowers the loss less for its cost than the average layer.
        returns: Whether frozen layers may train again.
        measuring: How often it measures, and how sure it must be; see :class:`Measuring`.
        costs: Forward cost of each layer in any unit, by layer name, of which the backward pass costs twice as much.
            ``None`` asks the account of the train step what each front saves; without one, all layers cost the same.
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
        >>> policy = gain(lambda params, number: gradient, total_steps=100, measuring=Measuring(every=2, window=2))
        >>> state = policy.init(layers, params)
        >>> for step in range(1, 6):
        ...     params = jax.tree.map(lambda leaf: leaf - 0.1, params)
        ...     frozen, state = policy.update(state, layers, step=step, params=lambda: params)
        >>> frozen, [round(float(fall), 3) for fall in state.gains[-1]]
        (frozenset({'a'}), [0.0, 0.4])
    """
    checks.count(total_steps, "total_steps")
    measuring = Measuring() if measuring is None else measuring
    checks.instance(measuring, Measuring, "measuring", "a smartfrz_jax.policies.Measuring, or None")
    rule = _Gain(gradients, total_steps, factor, returns, measuring, numbers_of(costs), kept(keep))
    return Policy(rule.init, rule.update, options=rule.options)


@dataclasses.dataclass(frozen=True)
class _Gain:
    """The options of :func:`gain`, and what it does with them."""

    gradients: Gradients
    total_steps: int
    factor: float
    returns: bool
    measuring: Measuring
    costs: dict[str, float] | None
    keep: tuple[Selector, ...] | None

    def __post_init__(self) -> None:
        expected = (
            "a function of (params, number) to a gradient, such as sfj.nnx.gradient_probe(model, loss_fn, batches)"
        )
        checks.function(self.gradients, "gradients", expected)
        checks.flag(self.returns, "returns")
        checks.between(self.factor, "factor", "a finite number from 0 up", 0, float(np.finfo(np.float32).max))
        if self.measuring.window * self.every >= self.total_steps:
            raise ValueError(
                f"measuring: got a window of {self.measuring.window} measurements, one in {self.every} steps, expected "
                f"fewer than fit into the {self.total_steps} steps of the run, for nothing freezes before; take a "
                "smaller window or measure more often"
            )

    @property
    def every(self) -> int:
        """Train steps between measurements."""
        fits = self.total_steps // (2 * self.measuring.window)
        return max(2, min(_EVERY, fits)) if self.measuring.every is None else self.measuring.every

    @property
    def options(self) -> dict[str, Any]:
        return {
            "name": _NAME,
            "total_steps": int(self.total_steps),
            "factor": float(self.factor),
            "returns": bool(self.returns),
            "window": int(self.measuring.window),
            "measure_every": int(self.every),
            "errors": float(self.measuring.errors),
            "costs": self.costs,
            "keep": described(self.keep),
        }

    def init(self, layers: Layers, params: PyTree) -> GainState:
        freezable(layers, self.keep)
        shares_of_cost(layers, self.costs)
        before = {param: np.zeros(np.shape(leaf), leaf.dtype) for param, leaf in check_params(params).items()}
        gains, none = np.zeros((self.measuring.window, len(layers)), np.float32), np.zeros(len(layers), bool)
        signals = Signals(gains, gains > 0, np.ones(len(layers), np.float32)) if self.returns else None
        return GainState(before, gains, np.zeros((), np.int32), none, before if self.returns else {}, signals)

    def update(
        self, state: GainState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], GainState]:
        check_update(state, GainState, layers, step)
        may_freeze = freezable(layers, self.keep)
        if not (self.returns or (may_freeze & ~state.frozen).any()):
            return names_of(layers, state.frozen), state
        is_first = step % self.every == 1 and any(leaf.any() for leaf in state.before.values())  # else it began here
        by_hand = np.array([name in signals.get("frozen", ()) for name in layers.names], bool)
        waits = _waits(state) and not (state.frozen | by_hand).all()  # what is all frozen never moves
        if is_first or (waits and hosts.fetch(_moved(state.before, paths.flatten(params())))):
            state = self._measured(state, layers, params(), step, again=not is_first)
            # The first agreement takes two measurements.
            if state.measurements >= self.measuring.window + self.returns and not _waits(state):
                state = self._decided(state, self._saved(layers, signals.get("saving")), may_freeze, by_hand)
        if step % self.every == 0:
            state = state._replace(before=hosts.fetch(paths.flatten(params())))
        return names_of(layers, state.frozen), state

    def _measured(self, state: GainState, layers: Layers, now: PyTree, step: int, *, again: bool) -> GainState:
        """With one measurement more; ``again`` is the last one, by a later step."""
        before = paths.tree_map(lambda name, _: state.before[name], now)
        gradient = _fitting(paths.flatten(self.gradients(before, int(state.measurements) - again)), state.before)
        old, new, slope = (layers.unstacked(each) for each in (state.before, paths.flatten(now), gradient))
        falls, moved = hosts.fetch(_falls(old, new, slope))
        found = _by_layer(layers, falls)
        check_finite(layers, ~np.isfinite(found), what="gradients", policy=_NAME, step=step)
        state = state._replace(
            gains=_appended(state.gains, found, again),
            measurements=np.asarray(state.measurements + (not again), np.int32),
        )
        if state.signals is None:
            return state
        has_moved = _appended(state.signals.moved, _by_layer(layers, moved) > 0, again)
        if again:  # the gradient is the same
            return state._replace(signals=state.signals._replace(moved=has_moved))
        agreements = hosts.fetch(_products(slope, layers.unstacked(state.last)))
        shown = state.signals._replace(
            agreements=_appended(state.signals.agreements, _by_layer(layers, agreements)),
            moved=has_moved,
        )
        return state._replace(signals=shown, last=hosts.fetch(gradient))

    def _saved(self, layers: Layers, saving: Saving | None) -> Saved:
        if self.costs is None and saving is not None:
            return lambda active, front: saving(names_of(layers, ~active | front), names_of(layers, ~active))
        costs = shares_of_cost(layers, self.costs)
        return lambda active, front: float(2 * costs[front].sum() / (1 + 2 * costs[active].sum()))

    def _decided(
        self,
        state: GainState,
        saved: Saved,
        may_freeze: Bool[np.ndarray, " layers"],
        by_hand: Bool[np.ndarray, " layers"],
    ) -> GainState:
        rule = Rule(saved, self.factor, self.measuring.errors)
        if state.signals is None:
            active = ~(state.frozen | by_hand)
            return state._replace(frozen=state.frozen | rule.front(state.gains, active, active & may_freeze))
        estimates = state.signals.estimates(state.gains)
        if estimates is None:
            return state
        gains, shown = estimates
        frozen = rule.front_that_returns(gains, state.frozen, ~by_hand, ~by_hand & may_freeze)
        return state._replace(signals=shown, frozen=frozen)


def _waits(state: GainState) -> bool:
    """Whether the last measurement is to be made again, as nothing had moved yet."""
    return int(state.measurements) > 0 and not state.gains[-1].any()


def _appended(rows: np.ndarray, row: np.ndarray, again: bool = False) -> np.ndarray:
    """``again`` puts it in place of the last one."""
    return np.concatenate([rows[:-1] if again else rows[1:], row[None].astype(rows.dtype)])


def _by_layer(layers: Layers, values: Mapping[str, Any]) -> Float[np.ndarray, " layers"]:
    return np.array([sum(values[param] for param in layer.params) for layer in layers], np.float32)


def _fitting(gradient: Mapping[str, Any], params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    for name, leaf in params.items():
        got = np.shape(gradient[name]) if name in gradient else "none"
        if got != leaf.shape:
            raise ValueError(
                f"gradients: got {got} for {name!r}, expected shape {leaf.shape}; return the gradient with respect to "
                "all parameters, as jax.grad of the loss gives it"
            )
    return {name: gradient[name] for name in params}


@jax.jit
def _moved(before: dict[str, Any], now: dict[str, Any]) -> Any:
    return jnp.any(jnp.array([jnp.any(before[name] != now[name]) for name in before]))


@jax.jit
def _falls(
    before: dict[str, Any], now: dict[str, Any], gradient: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The expected fall by parameter, and whether it had an update."""

    def updates(old: Any, new: Any) -> Any:
        kind = jnp.promote_types(jnp.result_type(old), jnp.float32)  # of complex parameters complex
        return new.astype(kind) - old.astype(kind)

    def fall(update: Any, slope: Any) -> Any:
        # jax.grad gives the conjugate of a complex gradient.
        return -jnp.real(jnp.sum(update * slope.astype(update.dtype)))

    moves = {name: updates(before[name], now[name]) for name in before}
    return (
        {name: fall(move, gradient[name]) for name, move in moves.items()},
        {name: jnp.any(move != 0) for name, move in moves.items()},
    )


@jax.jit
def _products(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    def product(x: Any, y: Any) -> Any:
        kind = jnp.promote_types(jnp.result_type(x), jnp.float32)
        return jnp.real(jnp.sum(x.astype(kind) * jnp.conj(y.astype(kind))))

    return {name: product(a[name], b[name]) for name in a}
