"""The recent history of every layer's tailored weights: a ring buffer, as a pytree of fixed shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


class History(struct.PyTreeNode):
    """Ring buffer of records of tailored weights (paper, section 3.1 and appendix C: window 30).

    Attributes:
        values: float32 of shape ``(layers, window, size)``; slot ``n % window`` holds a layer's record number ``n``.
        count: int32 of shape ``(layers,)``: records of each layer so far.

    Example:
        >>> history = History.create(layers=2, window=3, size=4)
        >>> history = history.record(jnp.ones((2, 4)), active=jnp.array([True, False]))
        >>> history.chronological()[1].tolist()
        [[False, False, True], [False, False, False]]
    """

    values: Float[Array, "layers window size"]
    count: Int[Array, " layers"]

    @classmethod
    def create(cls, layers: int, window: int = 30, size: int = 1024) -> History:
        """An empty history.

        Raises:
            TypeError: If one is no number.
            ValueError: If one of the numbers is no integer, or below 1.
        """
        for argument, value in (("layers", layers), ("window", window), ("size", size)):
            checks.count(value, argument)
        return cls(jnp.zeros((layers, window, size), jnp.float32), jnp.zeros(layers, jnp.int32))

    @property
    def window(self) -> int:
        """Records that are kept of a layer."""
        return self.values.shape[1]

    def record(self, weights: Float[Array, "layers size"], active: Bool[Array, " layers"]) -> History:
        """Adds a record of the active layers and drops the history of the others.

        Args:
            weights: Tailored weights, shape ``(layers, size)``.
            active: Shape ``(layers,)``, true for layers that train.

        Raises:
            TypeError: If ``weights`` are no numbers, or ``active`` no booleans.
            ValueError: If a shape does not fit.
        """
        checks.numbers(weights, "weights", "an array of numbers, of shape (layers, size)")
        checks.booleans(active, "active", "an array of bool, of shape (layers,)")
        expected = (self.values.shape[0], self.values.shape[2])
        if weights.shape != expected or active.shape != expected[:1]:
            raise ValueError(
                f"weights, active: got shapes {weights.shape} and {active.shape}, expected {expected} and "
                f"{expected[:1]}; make the history for as many layers and samples as the tailoring has"
            )
        return _record(self, weights, active)

    def chronological(self) -> tuple[Float[Array, "layers window size"], Bool[Array, "layers window"]]:
        """The records from the oldest to the newest, and which of them exist.

        The newest is last; where a layer has fewer records than the window, the places before them are zero and
        masked false.
        """
        return _chronological(self)


@jax.jit
def _record(history: History, weights: jax.Array, active: jax.Array) -> History:
    here = jnp.arange(history.window)[None] == (history.count % history.window)[:, None]
    values = jnp.where(here[:, :, None], weights.astype(jnp.float32)[:, None, :], history.values)
    return History(
        values=jnp.where(active[:, None, None], values, 0.0),
        count=jnp.where(active, history.count + 1, 0),
    )


@jax.jit
def _chronological(history: History) -> tuple[jax.Array, jax.Array]:
    age = jnp.arange(history.window - 1, -1, -1)[None]
    slots = (history.count[:, None] - 1 - age) % history.window
    mask = age < history.count[:, None]
    values = jnp.take_along_axis(history.values, slots[:, :, None], axis=1)
    return jnp.where(mask[:, :, None], values, 0.0), mask
