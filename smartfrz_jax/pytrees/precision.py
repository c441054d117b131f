"""The precision in which sums over parameters and gradients are taken, whatever theirs is."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def single(dtype: Any) -> Any:
    """float32, or complex64 of complex numbers, whose imaginary parts count.

    Args:
        dtype: Of the array.

    Example:
        >>> single(jnp.bfloat16).__name__, single(jnp.complex64).__name__
        ('float32', 'complex64')
    """
    return jnp.complex64 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float32
