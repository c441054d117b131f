"""A loss through which no derivative passes to the frozen parts of arrays: rows of stacked ones, lookups in tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.jaxprs import split_scan
from smartfrz_jax.jaxprs.parts import ClosedJaxpr, rewritten
from smartfrz_jax.layers.lookups import apart
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree


def stop_parts(function: Callable[..., Any], frozen: Frozen) -> Callable[..., Any]:
    """:func:`stop_lookups`, then :func:`split_rows`: derivatives through it do no work for the frozen parts of arrays.

    Args:
        function: A JAX-traceable function of ``(params, *args, **kwargs)``.
        frozen: The frozen set. Where neither has anything to do for it, the function is as it was.

    Returns:
        A function of the same arguments, of which ``params`` has gone through ``frozen.stop_gradient``.
    """
    return split_rows(stop_lookups(function, frozen), frozen)


def stop_lookups(function: Callable[..., Any], frozen: Frozen) -> Callable[..., Any]:
    """A function with ``stop_gradient`` on tables where lookups read them; or where others do, and lookups train.

    It is traced once more than without; see :mod:`smartfrz_jax.layers.lookups`.

    Args:
        function: A JAX-traceable function of ``(params, *args, **kwargs)``.
        frozen: The frozen set. Where it has no lookups without the rest of their table, or the other way round, the
            function is as it was.

    Returns:
        A function of the same arguments.
    """
    if not frozen.lookups:
        return function
    run = apart(function, frozen.lookups)

    def stopped(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        leaves = paths.flatten(params)
        of_lookups = {
            table: jax.lax.stop_gradient(leaves[table]) if is_frozen else leaves[table]
            for table, is_frozen in frozen.lookups.items()
        }
        others = paths.tree_map(
            lambda name, leaf: leaf if frozen.lookups.get(name, True) else jax.lax.stop_gradient(leaf), params
        )
        return run(others, of_lookups, *args, **kwargs)

    return stopped


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
