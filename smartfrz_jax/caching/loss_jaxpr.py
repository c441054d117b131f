"""The jaxpr of a loss, by the names of its variables and inputs, and which variables the loss changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from smartfrz_jax.jaxprs import inline
from smartfrz_jax.jaxprs.parts import ClosedJaxpr, Jaxpr, Var, lookup
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree

INPUTS = "inputs:"


class LossJaxpr(NamedTuple):
    """A loss, traced.

    Attributes:
        closed: ``ClosedJaxpr`` of ``(variables, *inputs)`` to ``(out, updates)``.
        structure: Tree structure of ``(out, updates)``.
        names: Name of each input of the jaxpr, a variable's or ``"inputs:0"``, ``"inputs:1/labels"``.
        updated: Names of the variables that come back, as the last outputs.
    """

    closed: ClosedJaxpr
    structure: Any
    names: tuple[str, ...]
    updated: tuple[str, ...]


def trace(loss_fn: Callable[..., Any], variables: PyTree, inputs: tuple[Any, ...]) -> LossJaxpr:
    """Traces a function of ``(variables, *inputs)`` to ``(out, updates)``, the latter variables by name."""
    closed, shapes = jax.make_jaxpr(loss_fn, return_shape=True)(variables, *inputs)
    return LossJaxpr(closed, jax.tree.structure(shapes), tuple(by_name(variables, inputs)), tuple(sorted(shapes[1])))


def by_name(variables: PyTree, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Variables and inputs by the names that :class:`LossJaxpr` has for them."""
    return paths.flatten(variables) | {INPUTS + name: leaf for name, leaf in paths.flatten(inputs).items()}


def changed_variables(traced: LossJaxpr, params: Iterable[Any], data: Iterable[Any]) -> set[str]:
    """Names of the variables that come back as something else."""
    invars = dict(zip(traced.names, traced.closed.jaxpr.invars, strict=True))
    flat = inline.inline(traced.closed, list(params), list(data)).jaxpr  # for what only passes through a call
    maker = {var: eqn for eqn in flat.eqns for var in eqn.outvars}
    updates = zip(traced.updated, updates_of(traced, flat), strict=True)
    return {name for name, var in updates if _unstacked(maker, var) is not invars[name]}


def _unstacked(maker: Mapping[Any, Any], var: Var) -> Any:
    """The value that was stacked to be cut out as ``var``, as a loop over blocks does with what it does not use."""
    squeeze = lookup(maker, var)
    cut = None if squeeze is None or squeeze.primitive.name != "squeeze" else maker.get(squeeze.invars[0])
    stack = None if cut is None else lookup(maker, cut.invars[0])
    if squeeze is None or cut is None or stack is None:
        return var
    if cut.primitive.name == "slice" and cut.outvars[0].aval.shape[:1] == (1,):
        axis, row = 0, cut.params["start_indices"][0]
    elif cut.primitive.name == "split" and set(cut.params["sizes"]) == {1}:
        axis, row = cut.params["axis"], cut.outvars.index(squeeze.invars[0])
    else:
        return var
    if stack.primitive.name == "stack" and stack.params["axis"] == axis:
        return _unstacked(maker, stack.invars[row])
    if stack.primitive.name == "concatenate" and len(stack.invars) == stack.outvars[0].aval.shape[axis]:
        part = maker.get(stack.invars[row])
        if part is not None and part.primitive.name in ("broadcast_in_dim", "reshape"):
            return _unstacked(maker, part.invars[0])
    return var


def with_unchanged(closed: ClosedJaxpr, traced: LossJaxpr, changed: Collection[str]) -> Any:
    """The same jaxpr, with the variables that do not change as they came."""
    jaxpr = closed.jaxpr
    invars = dict(zip(traced.names, jaxpr.invars, strict=True))
    updates = updates_of(traced, jaxpr)
    kept = [var if name in changed else invars[name] for name, var in zip(traced.updated, updates, strict=True)]
    outvars = [*jaxpr.outvars[: len(jaxpr.outvars) - len(kept)], *kept]
    return jex.ClosedJaxpr(jaxpr.replace(outvars=outvars), closed.consts)


def updates_of(traced: LossJaxpr, jaxpr: Jaxpr) -> Sequence[Any]:
    """The outputs of a jaxpr that are new values of variables."""
    return jaxpr.outvars[len(jaxpr.outvars) - len(traced.updated) :]
