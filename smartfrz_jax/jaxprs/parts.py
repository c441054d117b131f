"""What a jaxpr is made of, and parts of one as functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend import core as jex

# For annotations. JAX's own types do not know what is read here: shapes of variables, parameters of primitives.
Jaxpr: TypeAlias = Any
ClosedJaxpr: TypeAlias = Any
Eqn: TypeAlias = Any
Var: TypeAlias = Any
Atom: TypeAlias = Any  # a variable or a literal


def variables(atoms: Iterable[Atom]) -> list[Var]:
    """Those that are not literals."""
    return [atom for atom in atoms if not isinstance(atom, jex.Literal)]


def lookup(known: Mapping[Any, Any], atom: Atom, default: Any = None) -> Any:
    """What is known of a variable; ``default`` for others, and for literals, which cannot be hashed."""
    return default if isinstance(atom, jex.Literal) else known.get(atom, default)


def as_function(
    closed: ClosedJaxpr, eqns: Sequence[Eqn], invars: Sequence[Var], outvars: Sequence[Atom]
) -> Callable[..., list[Any]]:
    """Some equations of a ``ClosedJaxpr`` as a function of the values of ``invars``, which returns a list."""
    part = closed.jaxpr.replace(
        eqns=list(eqns), invars=list(invars), outvars=list(outvars), debug_info=anonymous(closed.jaxpr)
    )
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(part, closed.consts))


def anonymous(jaxpr: Jaxpr) -> Any:
    """Debug information for another jaxpr of the same function, with other inputs and results."""
    return jex.DebugInfo(jaxpr.debug_info.traced_for, jaxpr.debug_info.func_src_info, None, None)


def rewritten(
    function: Callable[..., Any],
    values: Sequence[Any],
    change: Callable[[ClosedJaxpr], tuple[ClosedJaxpr, Sequence[Any]]],
) -> Any:
    """What a function gives, by way of a jaxpr that has been changed.

    Args:
        function: A JAX-traceable function of ``values`` to anything.
        values: Arrays.
        change: From the jaxpr of the function to another one, with the same results, and the values that it takes.
    """
    structure: list[Any] = []

    def flat(*values: Any) -> list[Any]:
        leaves, treedef = jax.tree.flatten(function(*values))
        structure[:] = treedef, [_ARRAY if _is_array(leaf) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if _is_array(leaf)]

    closed, values = change(jax.make_jaxpr(flat)(*values))
    arrays = iter(jex.jaxpr_as_fun(closed)(*values))
    treedef, leaves = structure
    return jax.tree.unflatten(treedef, [next(arrays) if leaf is _ARRAY else leaf for leaf in leaves])


_ARRAY = object()


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)
