"""What a freezing policy is, and what its implementations share."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from smartfrz_jax.layers.layers import Layers, check_layers
from smartfrz_jax.layers.select import Selector, Selectors, as_selectors, select
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from smartfrz_jax.policies.two_phase import TwoPhase


NEVER = checks.LARGEST  # a step that no run reaches

# Steps in a row with gradients or losses that are not finite, by default: loss scales of float16 start far too high.
MAX_CONSECUTIVE_ERRORS = 20


Saving = Callable[[Collection[str], Collection[str]], float]
"""From the names of frozen layers, and of those before, to the share of a step's cost that is saved."""


class InitFn(Protocol):
    """``init(layers, params) -> state``."""

    def __call__(self, layers: Layers, params: PyTree) -> PyTree:
        """State at the start of the run.

        Args:
            layers: The network's layers.
            params: Its parameter pytree; ``layers.unstacked(params)`` has every parameter by the name that its layer
                gives it, where rows of stacked ones are layers, too.

        Returns:
            A pytree of arrays, which checkpoints as it is.
        """
        ...


class UpdateFn(Protocol):
    """``update(state, layers, *, step, params, ...) -> (names, state)``."""

    def __call__(
        self, state: PyTree, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], PyTree]:
        """Called once after every train step.

        Args:
            state: State of the previous call.
            layers: The network's layers.
            step: Number of train steps done.
            params: A function without arguments that gives the parameter pytree after that step, as for ``init``. It is
                a function because gathering the parameters of a model takes time, and most steps do not look at them.
            **signals: ``frozen`` (names of the layers that are frozen by hand, whatever the policy decides), ``grads``
                (gradients of the active layers by parameter name, if the policy ``needs`` them), and what the loop has
                of ``loss`` (scalar), ``features`` (a function to every layer's output on a probe batch, by layer name)
                and ``saving`` (a :data:`Saving`).

        Returns:
            Names of the layers that are frozen from now on, and the new state. The decision is the same on every
            process that has the same inputs, and does not depend on time.
        """
        ...


class Policy(NamedTuple):
    """A freezing policy: like an optax transformation, a pair of pure functions.

    Attributes:
        init: Makes the state.
        update: Takes what has been observed, decides, and returns the new state.
        needs: Signals, besides ``step`` and ``params``, that the loop must provide: ``"grads"``, ``"features"``.
        options: What it was made with, as far as JSON can hold it, and its ``"name"``. A checkpoint notes them, and is
            refused by a run with others. Empty if that is not to be checked.
        phases: ``update`` in two parts, for a ``Freezer`` that has a ``delay``; ``None`` if it reads nothing of the
            device, or is to be waited for all the same.
        start: From the first state and the layers to the names of those that are frozen before the first step, which
            :meth:`smartfrz_jax.Freezer.start` asks for; ``None`` if that is never any.
    """

    init: InitFn
    update: UpdateFn
    needs: frozenset[str] = frozenset()
    options: Mapping[str, Any] = types.MappingProxyType({})
    phases: TwoPhase | None = None
    start: Callable[[PyTree, Layers], frozenset[str]] | None = None


class ScheduleState(NamedTuple):
    """State of a policy that knows beforehand when each layer freezes.

    Attributes:
        freeze_at: Steps after which each layer is frozen, int32 of shape ``(layers,)``; ``NEVER`` for those that stay.
    """

    freeze_at: Int[np.ndarray, " layers"]


def check_policy(policy: Any) -> None:
    """Raises ``TypeError`` unless ``policy`` is a :class:`Policy` of two functions."""
    expected = "a smartfrz_jax.Policy, such as smartfrz_jax.progress(total_steps=1000)"
    checks.instance(policy, Policy, "policy", expected)
    checks.function(policy.init, "policy", "a function as its init")
    checks.function(policy.update, "policy", "a function as its update")


def check_features(policy: Policy, features: Any) -> None:
    """Checks what a loop computes of its layers' outputs, or ``None``, beside the policy.

    Raises:
        TypeError: If it is no function.
        ValueError: If the policy needs one, and there is none.
    """
    expected = "a function to the layers' outputs on a probe batch, by layer name"
    if features is not None:
        checks.function(features, "features", expected)
    elif "features" in policy.needs:
        raise ValueError(f"features: got none, but the policy looks at them, expected {expected}")


def decision(returned: Any) -> tuple[frozenset[str], PyTree]:
    """What a policy's ``update`` returned: names of layers, and its state.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise TypeError(
            f"policy: its update returned {checks.got(returned)}, expected the pair (names of layers, state)"
        )
    names, state = returned
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"policy: its update decided on {checks.got(names)}, expected a frozenset of names of layers")
    names = frozenset(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"policy: its update named a layer {checks.got(name)}, expected a string")
    return names, state


def scheduled(freeze_at: Callable[[Layers], Int[np.ndarray, " layers"]], options: Mapping[str, Any]) -> Policy:
    """A policy that knows beforehand when each layer freezes.

    Args:
        freeze_at: From the network's layers to the number of steps after which each is frozen, shape ``(layers,)``.
            Called once, at the start of the run; from then on the moments are in the state.
        options: The policy's.

    Returns:
        The policy.
    """

    def init(layers: Layers, params: PyTree) -> ScheduleState:
        check_layers(layers)
        return ScheduleState(np.asarray(freeze_at(layers), np.int32))

    def update(
        state: ScheduleState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], ScheduleState]:
        check_update(state, ScheduleState, layers, step)
        return names_of(layers, state.freeze_at <= step), state

    def start(state: ScheduleState, layers: Layers) -> frozenset[str]:
        return names_of(layers, state.freeze_at <= 0)

    return Policy(init, update, options=options, start=start)


def kept(keep: Selectors | None) -> tuple[Selector, ...] | None:
    """``keep`` as a tuple, so that it can be read more than once; one selector alone is a tuple of one.

    Raises:
        TypeError: If it selects no layers.
    """
    return None if keep is None else as_selectors(keep, "keep")


def check_update(state: Any, kind: type, layers: Any, step: Any) -> None:
    """Checks what every ``update`` is given.

    Args:
        state: The state.
        kind: The type of the policy's states.
        layers: The network's layers.
        step: Number of train steps done.

    Raises:
        TypeError: If one is of another type.
        ValueError: If ``step`` is negative.
    """
    checks.instance(state, kind, "state", f"a {kind.__name__}, from the init or the last update of the same policy")
    check_layers(layers)
    checks.count(step, "step", least=0)


def numbers_of(costs: Any) -> dict[str, float] | None:
    """Costs by layer name, as Python's numbers.

    Raises:
        TypeError: If they are no mapping, or not to numbers.
    """
    if costs is None:
        return None
    expected = "a dict from each layer's name to its cost, a number, or None for equal costs"
    checks.by_name(costs, "costs", expected)
    return {name: checks.number(cost, "costs", expected) for name, cost in costs.items()}


def freezable(layers: Layers, keep: Selectors | None) -> Bool[np.ndarray, " layers"]:
    """Which layers a policy may freeze.

    Args:
        layers: The network's layers.
        keep: Layers never to freeze, see :func:`smartfrz_jax.layers.select.select`; ``None`` keeps the head, the layer
            used last, ``()`` nothing.

    Returns:
        Boolean array of shape ``(layers,)``.

    Raises:
        TypeError: If ``layers`` are no :class:`~smartfrz_jax.Layers`.
        ValueError: If one of ``keep`` is not a layer of the network.
    """
    check_layers(layers)
    names = set(select(layers, layers.head if keep is None else keep, "keep"))
    return np.array([name not in names for name in layers.names], bool)


def shares_of_cost(layers: Layers, costs: Mapping[str, float] | None) -> Float[np.ndarray, " layers"]:
    """Each layer's share of the network's cost.

    Args:
        layers: The network's layers.
        costs: Cost of each layer, in any unit; ``None`` makes all equal.

    Returns:
        Numbers that sum to one, float64 of shape ``(layers,)``.

    Raises:
        ValueError: If a layer is missing from ``costs`` or unknown, or a cost is negative, not finite, or all are zero.
    """
    if costs is None:
        return np.full(len(layers), 1 / len(layers))
    layers.check(costs, "costs")
    for name in layers.names:
        if not 0 <= costs.get(name, -1) < np.inf:
            got = f"{costs[name]:g}" if name in costs else "nothing"
            raise ValueError(
                f"costs: got {got} for layer {name!r}, expected a finite number from 0 up for each of the "
                f"{len(layers)} layers"
            )
    values = np.array([costs[name] for name in layers.names], np.float64)
    if not values.sum() > 0:
        raise ValueError("costs: got only zeros; give at least one layer a cost, or pass None for equal costs")
    return values / values.sum()


def names_of(layers: Layers, mask: Bool[np.ndarray, " layers"]) -> frozenset[str]:
    """Names of the layers at which a boolean array of shape ``(layers,)`` is true.

    Args:
        layers: The network's layers.
        mask: From a policy's state.

    Returns:
        The names.

    Raises:
        ValueError: If the state was made for another number of layers.
    """
    if len(mask) != len(layers):
        raise ValueError(
            f"layers: got {len(layers)}, but the policy's state is for {len(mask)}; make the state with the "
            "policy's init for these layers"
        )
    return frozenset(name for name, chosen in zip(layers.names, mask, strict=True) if chosen)


def require(signals: dict[str, Any], name: str, policy: str, way_out: str) -> Any:
    """A signal that the policy cannot do without.

    Args:
        signals: What the loop passed to ``update``.
        name: Name of the signal.
        policy: Name of the policy, for the error.
        way_out: What the reader of the error can do.

    Returns:
        The signal.

    Raises:
        ValueError: If the loop did not provide it.
    """
    value = signals.get(name)
    if value is None:
        raise ValueError(f"{name}: the policy {policy!r} needs it and got none; {way_out}")
    return value


def check_finite(layers: Layers, wrong: Bool[np.ndarray, " layers"], *, what: str, policy: str, step: int) -> None:
    """Stops a run that has diverged: no policy decides on NaN.

    Args:
        layers: The network's layers.
        wrong: Where a layer has a value that is not finite, shape ``(layers,)``.
        what: What is not finite.
        policy: Name of the policy.
        step: Number of train steps done.

    Raises:
        FloatingPointError: If ``wrong`` is true anywhere.
    """
    names = [name for name, bad in zip(layers.names, wrong, strict=True) if bad]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise FloatingPointError(
            f"{what}: not finite after step {step} in layer {', '.join(map(repr, names[:3]))}{more}, so the policy "
            f"{policy!r} cannot judge; the training has diverged, go back to an earlier checkpoint or lower the "
            "learning rate"
        )


def check_errors(errors: Any, most: int, *, what: str, policy: str, step: int) -> None:
    """Stops a run of which too many steps in a row were skipped.

    Args:
        errors: Steps in a row, up to now, whose signal was not finite: an integer.
        most: How many may be.
        what: What is not finite.
        policy: Name of the policy.
        step: Number of train steps done.

    Raises:
        FloatingPointError: If they are more.
    """
    if errors > most:
        raise FloatingPointError(
            f"{what}: not finite in the {int(errors)} steps up to step {step}, so the policy {policy!r} cannot judge; "
            "the training has diverged, go back to an earlier checkpoint or lower the learning rate. If the steps were "
            f"skipped on purpose, raise max_consecutive_errors, which is {most}"
        )
