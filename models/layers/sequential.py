"""Modules and functions called one after the other."""

from __future__ import annotations

from typing import Any

from flax import nnx


class Sequential(nnx.List):
    """``nnx.Sequential`` without a level of its own in the names of variables: ``0/kernel``, not ``layers/0/kernel``.

    Example:
        >>> import jax.numpy as jnp
        >>> layers = Sequential([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu])
        >>> layers(jnp.ones((1, 2))).shape
        (1, 3)
        >>> list(nnx.state(layers))
        [0]
    """

    def __call__(self, x: Any) -> Any:
        """Applies the members in turn."""
        for layer in self:
            x = layer(x)
        return x
