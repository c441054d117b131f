"""What a freezing policy is, and what its implementations share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from smartfrz_jax.layers import Layers

PyTree = Any


class InitFn(Protocol):
    """``init(layers, params) -> state``."""

    def __call__(self, layers: Layers, params: PyTree) -> PyTree:
        """State at the start of the run.

        Args:
            layers: The network's layers.
            params: Its parameter pytree.

        Returns:
            A pytree of arrays, which checkpoints as it is.
        """
        ...


class UpdateFn(Protocol):
    """``update(state, layers, *, step, params, ...) -> (names, state)``."""

    def __call__(
        self, state: PyTree, layers: Layers, *, step: int, params: PyTree, **signals: Any
    ) -> tuple[frozenset[str], PyTree]:
        """Called once after every train step.

        Args:
            state: State of the previous call.
            layers: The network's layers.
            step: Number of train steps done.
            params: Parameter pytree after that step.
            **signals: ``grads`` (gradients of the active layers by parameter name; only if the policy ``needs`` them),
                ``loss`` (scalar, if the loop passes it), ``features`` (a function without arguments that computes the
                output of every layer on a probe batch, by layer name; if the loop provides it).

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
    """

    init: InitFn
    update: UpdateFn
    needs: frozenset[str] = frozenset()


def freezable(layers: Layers, keep: Iterable[str] | None) -> np.ndarray:
    """Which layers a policy may freeze.

    Args:
        layers: The network's layers.
        keep: Names of layers never to freeze; ``None`` keeps the head, ``()`` nothing.

    Returns:
        Boolean array of shape ``(layers,)``.

    Raises:
        ValueError: If a name is not a layer of the network.
    """
    kept = set(layers.check([layers.head] if keep is None else keep, "keep"))
    return np.array([name not in kept for name in layers.names], bool)


def names_of(layers: Layers, mask: np.ndarray) -> frozenset[str]:
    """Names of the layers at which a boolean array of shape ``(layers,)`` is true."""
    return frozenset(name for name, chosen in zip(layers.names, np.asarray(mask), strict=True) if chosen)


def require(signals: dict[str, Any], name: str, policy: str, way_out: str) -> Any:
    """A signal that the policy cannot do without.

    Raises:
        ValueError: If the loop did not provide it.
    """
    value = signals.get(name)
    if value is None:
        raise ValueError(f"{name}: the policy {policy!r} needs it and got none; {way_out}")
    return value


def check_positive(value: float, argument: str) -> None:
    """Raises ``ValueError`` unless ``value`` is above zero."""
    if not value > 0:
        raise ValueError(f"{argument}: got {value}, expected a number above 0")


def check_fraction(value: float, argument: str, *, zero: bool = True) -> None:
    """Raises ``ValueError`` unless ``value`` is in [0, 1], or in (0, 1] without ``zero``."""
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{argument}: got {value}, expected a share {'from' if zero else 'above'} 0 up to 1")
