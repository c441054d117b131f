"""Tracing functions that are meant to run under ``jax.pmap``, ``jax.shard_map`` or ``jax.vmap``, outside of them.

A BatchNorm with ``axis_name="batch"`` averages its statistics over that axis, which only exists inside the step. For
the order of layers and for the price of the work of one device it does not matter what the axis is, so it is bound
here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax

_UNBOUND = re.compile(r"unbound axis name:? *'?([^\s.,;']+)")


def make_jaxpr(function: Callable[..., Any], *, return_shape: bool = False) -> Callable[..., Any]:
    """``jax.make_jaxpr``, in which axes that the function names are bound.

    An axis has as many positions as there are devices, which is what it has under ``jax.pmap``.

    Args:
        function: A JAX-traceable function.
        return_shape: As for ``jax.make_jaxpr``.

    Example:
        >>> make_jaxpr(lambda x: jax.lax.pmean(x, "batch"))(1.0).out_avals
        [ShapedArray(float32[])]
    """

    def traced(*args: Any) -> Any:
        axes: list[tuple[str, int]] = []
        while True:
            try:
                return jax.make_jaxpr(function, axis_env=axes, return_shape=return_shape)(*args)
            except NameError as error:
                found = _UNBOUND.search(str(error))
                if found is None or found[1] in dict(axes):
                    raise
                axes.append((found[1], jax.device_count()))

    return traced
