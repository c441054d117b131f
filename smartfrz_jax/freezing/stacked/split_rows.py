"""A loss whose scans over stacked weights are split into runs of frozen and of active rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.jaxprs import split_scan
from smartfrz_jax.jaxprs.parts import ClosedJaxpr, rewritten
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree


def split_rows(function: Callable[..., Any], frozen: Frozen) -> Callable[..., Any]:
    """A function with its scans split, so that derivatives through it do no work for frozen rows.

    It is traced once more than without; see :mod:`smartfrz_jax.jaxprs.split_scan`.

    Args:
        function: A JAX-traceable function of ``(params, *args, **kwargs)``.
        frozen: The frozen set. Where no layer is frozen, or no scan reads rows that train, the function is as it was.

    Returns:
        A function of the same arguments, of which ``params`` has gone through ``frozen.stop_gradient``.
    """
    if not frozen.reads_rows:
        return function
    stacks = {name: stack for name, stack in frozen.layers.stacks.items() if not frozen.is_frozen(name)}

    def split(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        named, structure = paths.flatten(params), jax.tree.structure(params)

        def of_leaves(*leaves: Any) -> Any:
            return function(jax.tree.unflatten(structure, leaves), *args, **kwargs)

        def change(closed: ClosedJaxpr) -> tuple[ClosedJaxpr, list[Any]]:
            of_rows, live = {}, []
            for name, var in zip(named, closed.jaxpr.invars, strict=True):
                if name in stacks:
                    flags = tuple(layer in frozen.names for layer in stacks[name].layers)
                    of_rows[var] = split_scan.Stacked(stacks[name].axis, flags)
                elif not frozen.is_frozen(name):
                    live.append(var)
            return split_scan.split(closed, of_rows, live), [*named.values()]

        return rewritten(of_leaves, [*named.values()], change)

    return split
