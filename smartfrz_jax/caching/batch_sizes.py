"""Whether a program computes the same for an example in batches of two sizes.

Both are traced, and their equations compared: an axis that is longer in one of them counts the examples, and must be
handed on as such, by values too that depend on no example, such as a mask of ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from smartfrz_jax.jaxprs import digests, example_axis
from smartfrz_jax.jaxprs.example_axis_rules import RULES, Axis, Mixed, Value
from smartfrz_jax.jaxprs.parts import Atom, Eqn, lookup

# Parameters that the shapes of the results tell.
_SHAPES = frozenset({"shape", "new_sizes", "limit_indices", "slice_sizes"})
_SOURCES = frozenset({"broadcast_in_dim", "iota"})
# Of which what they run is compared in place of what goes in and comes out.
_LOOPS = frozenset({"cond", "scan", "shard_map", "while"})


class Program(NamedTuple):
    """Equations of a jaxpr for one batch size.

    Attributes:
        eqns: The equations.
        consts: Values of variables that are constants.
        invars: The other variables that they may read, in an order that does not depend on the size.
        outvars: The results.
        examples: Examples in the batch.
    """

    eqns: Sequence[Eqn]
    consts: Mapping[Any, Any]
    invars: Sequence[Any]
    outvars: Sequence[Atom]
    examples: int

    def body(self, closed: Any) -> Program:
        """What an equation of it runs."""
        is_closed = isinstance(closed, jex.ClosedJaxpr)
        jaxpr, consts = (closed.jaxpr, closed.consts) if is_closed else (closed, ())
        known = dict(zip(jaxpr.constvars, consts, strict=True)) if is_closed else {}
        invars = jaxpr.invars if is_closed else [*jaxpr.constvars, *jaxpr.invars]
        return Program(jaxpr.eqns, known, invars, jaxpr.outvars, self.examples)

    def constant(self, atom: Atom) -> Any:
        """The value of a literal or a constant; ``None`` of what is computed."""
        return atom.val if isinstance(atom, jex.Literal) else self.consts.get(atom)


def difference(one: Program, other: Program) -> str | None:
    """What two programs compute differently for the same examples, or may; ``None`` if nothing."""
    names, its_names = ([eqn.primitive.name for eqn in program.eqns] for program in (one, other))
    if names != its_names:
        return f"{len(names)} operations stand where that has {len(its_names)}, or others"
    same = dict(zip(one.invars, other.invars, strict=True))
    try:
        for eqn, its_eqn in zip(one.eqns, other.eqns, strict=True):
            _check_atoms(one, eqn.invars, other, its_eqn.invars, same)
            _check(one, eqn, other, its_eqn)
            same.update(zip(eqn.outvars, its_eqn.outvars, strict=True))
        _check_atoms(one, one.outvars, other, other.outvars, same)
    except Mixed as how:
        return str(how)
    return None


def _check_atoms(
    one: Program, atoms: Sequence[Atom], other: Program, its_atoms: Sequence[Atom], same: Mapping[Any, Any]
) -> None:
    """Raises :class:`Mixed` unless values that are read are the same constants, or the same results."""
    for atom, its_atom in zip(atoms, its_atoms, strict=True):
        value, its_value = one.constant(atom), other.constant(its_atom)
        if value is None and its_value is None:
            if lookup(same, atom) is not its_atom:
                raise Mixed("another value is read")
        elif value is None or its_value is None or digests.of_array(value) != digests.of_array(its_value):
            got, expected = ("an array" if getattr(v, "shape", ()) else str(v) for v in (value, its_value))
            raise Mixed(f"{got} stands where that has {expected}")


def _check(one: Program, eqn: Eqn, other: Program, its_eqn: Eqn) -> None:
    """Raises :class:`Mixed`, saying how, if two equations differ."""
    name = eqn.primitive.name
    bodies = _check_params(one, eqn, other, its_eqn)
    axes, found = (
        [_axis(a.aval.shape, b.aval.shape, one.examples, other.examples) for a, b in zip(*both, strict=True)]
        for both in ((eqn.invars, its_eqn.invars), (eqn.outvars, its_eqn.outvars))
    )
    if not any(axes):
        if any(found) and not bodies and name not in _SOURCES:
            raise Mixed(f"{name}: as many values as there are examples")
    elif name in RULES:
        values = [
            Value(axis) if axis else Value(constant=frozenset(range(len(atom.aval.shape))))
            for axis, atom in zip(axes, eqn.invars, strict=True)
        ]
        try:
            kept = [value.axis for value in example_axis.outputs(eqn, values)]
        except Mixed as how:
            raise Mixed(f"{name}: {how}") from None
        if kept != found:
            raise Mixed(f"{name}: another axis as long as the batch")
    elif not bodies or (name not in _LOOPS and not _is_call(eqn, bodies[0])):
        raise Mixed(f"{name}: of which it is not known whether it depends on the number of examples")


def _check_params(one: Program, eqn: Eqn, other: Program, its_eqn: Eqn) -> list[Any]:
    """Raises :class:`Mixed` if parameters differ, or what they run; returns what that is."""
    bodies: list[Any] = []
    for key, value in eqn.params.items():
        leaves, its_leaves = (
            [leaf for leaf in jax.tree.leaves(params[key], is_leaf=digests.is_jaxpr) if digests.is_jaxpr(leaf)]
            for params in (eqn.params, its_eqn.params)
        )
        for body, its_body in zip(leaves, its_leaves, strict=True):
            how = difference(one.body(body), other.body(its_body))
            if how is not None:
                raise Mixed(how)
        bodies += leaves
        its_value = its_eqn.params[key]
        if not leaves and key not in _SHAPES and digests.of_param(value) != digests.of_param(its_value):
            raise Mixed(f"{eqn.primitive.name}: {key} {value} stands where that has {its_value}")
    return bodies


def _axis(shape: tuple[int, ...], its_shape: tuple[int, ...], examples: int, its_examples: int) -> Axis | None:
    """The axis that is longer where the batch is."""
    longer = [at for at, (size, its_size) in enumerate(zip(shape, its_shape, strict=True)) if size != its_size]
    if not longer:
        return None
    (at, *more) = longer
    if more or shape[at] * its_examples != its_shape[at] * examples:
        raise Mixed(f"shape {shape} stands where that has {its_shape}")
    return Axis(at, max(1, shape[at] // examples))


def _is_call(eqn: Eqn, body: Any) -> bool:
    """Whether what an equation runs takes the very values that it is given."""
    shapes = [var.aval.shape for var in (body.jaxpr if isinstance(body, jex.ClosedJaxpr) else body).invars]
    return shapes == [atom.aval.shape for atom in eqn.invars]
