"""Digests of the values of a jaxpr: equal for values that are computed in the same way from the same inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from smartfrz_jax.jaxprs.parts import Atom, ClosedJaxpr, Eqn, Jaxpr


def digests(closed: ClosedJaxpr, names: Sequence[str], eqns: Iterable[Eqn]) -> dict[Any, str]:
    """Digests of the values that some equations compute.

    Args:
        closed: A ``ClosedJaxpr``.
        names: Name of each of its inputs.
        eqns: Equations of it, in order, that depend on nothing else.

    Returns:
        A digest for each result of ``eqns``, which does not depend on the rest of the program.
    """
    known = dict(zip(closed.jaxpr.invars, (_digest("input", name) for name in names), strict=True))
    known |= {var: of_array(value) for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True)}
    inputs = set(known)
    _follow(eqns, known)
    return {var: digest for var, digest in known.items() if var not in inputs}


def is_jaxpr(value: Any) -> bool:
    """Whether a parameter of an equation is what it runs."""
    return isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)


def _follow(eqns: Iterable[Eqn], known: dict[Any, str]) -> None:
    for eqn in eqns:
        ins = (_of_atom(known, atom) for atom in eqn.invars)
        whole = _digest(eqn.primitive.name, _of_params(eqn.params), *ins)
        for i, var in enumerate(eqn.outvars):
            known[var] = _digest(whole, str(i), str(var.aval))


def _of_params(params: Mapping[str, Any]) -> str:
    return _digest(*(f"{name}={of_param(value)}" for name, value in sorted(params.items())))


def of_param(value: Any) -> str:
    """A digest of a parameter of an equation."""
    if isinstance(value, jex.ClosedJaxpr):
        return _digest(_of_jaxpr(value.jaxpr), *map(of_array, value.consts))
    if isinstance(value, jex.Jaxpr):
        return _of_jaxpr(value)
    if isinstance(value, tuple | list):
        return _digest(*map(of_param, value))
    # A rule for derivatives is an object made by each trace; what it is the rule of is in the jaxpr.
    return "callable" if callable(value) and not isinstance(value, type | np.dtype) else repr(value)


def _of_jaxpr(jaxpr: Jaxpr) -> str:
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    known = {var: _digest("argument", str(i), str(var.aval)) for i, var in enumerate(inputs)}
    _follow(jaxpr.eqns, known)
    return _digest(*(_of_atom(known, atom) for atom in jaxpr.outvars))


def _of_atom(known: Mapping[Any, str], atom: Atom) -> str:
    return of_array(atom.val) if isinstance(atom, jex.Literal) else known[atom]


def of_array(value: Any) -> str:
    """A digest of the contents of an array."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    return _digest("array", str(array.dtype), str(array.shape), hashlib.sha256(array.tobytes()).hexdigest())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
