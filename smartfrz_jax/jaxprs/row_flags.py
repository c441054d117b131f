"""A flag in a jaxpr that stands for "this row of the stacked blocks is frozen", and what it becomes for each row.

A block that is stacked is traced once for all of its rows. What it does otherwise in frozen rows than in others, it
selects by this flag; where the scan is split, the flag is a constant, and what is not selected goes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax.extend import core as jex
from jax.interpreters import mlir

from smartfrz_jax.jaxprs.parts import Atom, Eqn, Jaxpr, lookup, variables
from smartfrz_jax.pytrees.types import PyTree

_flag_p = jex.Primitive("row_is_frozen")
_flag_p.def_abstract_eval(lambda *, rows: core.ShapedArray((), jnp.bool_))
_flag_p.def_impl(lambda *, rows: jnp.asarray(all(rows)))
# Outside of a scan that is split there is no row: what stands for all rows is frozen if all are.
mlir.register_lowering(_flag_p, mlir.lower_fun(lambda *, rows: jnp.asarray(all(rows)), multiple_results=False))


def flag(rows: tuple[bool, ...]) -> jax.Array:
    """Whether the row that a block runs with is frozen.

    Args:
        rows: Whether each is.
    """
    return _flag_p.bind(rows=rows)


def selected(rows: tuple[bool, ...], active: PyTree, frozen: PyTree) -> PyTree:
    """What a block computes: one thing in frozen rows, another in those that train.

    Args:
        rows: Whether each row is frozen.
        active: What is computed in rows that train.
        frozen: What is computed in frozen ones.
    """
    is_frozen = flag(rows)
    return jax.tree.map(lambda a, b: a if a is b else jax.lax.select_n(is_frozen, *_alike(a, b)), active, frozen)


def _alike(active: Any, frozen: Any) -> tuple[jax.Array, jax.Array]:
    active = jnp.asarray(active)
    return active, jnp.asarray(frozen, active.dtype)


def flags(jaxpr: Jaxpr) -> set[tuple[bool, ...]]:
    """What the flags in a jaxpr are, of jaxprs in it too."""
    found = {eqn.params["rows"] for eqn in jaxpr.eqns if eqn.primitive is _flag_p}
    return found.union(*(flags(inner) for eqn in jaxpr.eqns for inner in inner_jaxprs(eqn)))


def inner_jaxprs(eqn: Eqn) -> list[Jaxpr]:
    """The jaxprs among the parameters of an equation."""
    found = []
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            body = getattr(each, "jaxpr", each)
            if hasattr(body, "eqns"):
                found.append(body)
    return found


def resolved(jaxpr: Jaxpr, row: int | None) -> Jaxpr:
    """A jaxpr with constants in place of flags, without what is then not selected.

    Args:
        jaxpr: The jaxpr.
        row: The row; ``None`` for none in particular, outside of scans.
    """
    if not flags(jaxpr):
        return jaxpr
    env: dict[Any, Atom] = {}
    eqns = []
    for eqn in jaxpr.eqns:
        invars = [lookup(env, atom, atom) for atom in eqn.invars]
        if eqn.primitive is _flag_p:
            rows = eqn.params["rows"]
            value = all(rows) if row is None else rows[row]
            env[eqn.outvars[0]] = jex.Literal(np.bool_(value), eqn.outvars[0].aval)
        elif eqn.primitive.name == "select_n" and isinstance(invars[0], jex.Literal) and np.ndim(invars[0].val) == 0:
            env[eqn.outvars[0]] = invars[1 + int(invars[0].val)]
        elif row is None and eqn.primitive.name == "scan":
            eqns.append(eqn.replace(invars=invars))
        else:
            eqns.append(eqn.replace(invars=invars, params={k: _resolved(v, row) for k, v in eqn.params.items()}))
    outvars = [lookup(env, atom, atom) for atom in jaxpr.outvars]
    return jaxpr.replace(eqns=_live(eqns, outvars), outvars=outvars)


def _resolved(value: Any, row: int | None) -> Any:
    if isinstance(value, tuple | list) and any(hasattr(getattr(each, "jaxpr", each), "eqns") for each in value):
        return type(value)(_resolved(each, row) for each in value)
    if isinstance(value, jex.ClosedJaxpr):
        return jex.ClosedJaxpr(resolved(value.jaxpr, row), value.consts)
    return resolved(value, row) if hasattr(value, "eqns") and hasattr(value, "outvars") else value


def _live(eqns: list[Eqn], outvars: list[Atom]) -> list[Eqn]:
    """The equations that results depend on, or that have effects."""
    wanted, kept = set(variables(outvars)), []
    for eqn in reversed(eqns):
        if eqn.effects or not wanted.isdisjoint(eqn.outvars):
            kept.append(eqn)
            wanted.update(variables(eqn.invars))
    return kept[::-1]
