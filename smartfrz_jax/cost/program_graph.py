"""The operations of a traced program as XLA sees them after its simplifications, as a graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from jax.extend import core as jex

from smartfrz_jax.jaxprs import flops, inline

CLAMP = "clamp"
BARRIER = "optimization_barrier"
_ORDER = ("max", "min")


@dataclasses.dataclass(eq=False)
class Operation:
    """An operation of a program.

    Attributes:
        name: Name of the primitive.
        eqn: The equation.
        flops: What it costs, once.
        operands: Indices of the operations whose results it reads; one that is read twice, twice.
        users: Indices of the operations that read its result.
        is_output: Whether the program returns its result.
    """

    name: str
    eqn: Any
    flops: float
    operands: list[int]
    users: set[int] = dataclasses.field(default_factory=set)
    is_output: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its (first) result."""
        return self.eqn.outvars[0].aval.shape

    @property
    def inputs(self) -> list[Any]:
        """Its inputs that are not constants."""
        return [var for var in self.eqn.invars if not isinstance(var, jex.Literal)]

    @property
    def is_multiple(self) -> bool:
        """Whether its result is a constant times its input."""
        constants = [isinstance(var, jex.Literal) for var in self.eqn.invars]
        return (self.name == "mul" and any(constants)) or (self.name == "div" and constants[1])


def graph(closed: Any, backend: str) -> list[Operation]:
    """The operations that the results of a program depend on, in order.

    Equal operations on equal values are one; the maximum of a minimum is one clamp; a multiple of a multiple is a
    multiple of the value itself; sums are negated, not what they are of; multiplying by one is nothing.

    Args:
        closed: A ``ClosedJaxpr``.
        backend: Platform that it will run on.
    """
    flat = inline.inline(closed, (), (), rules=True).jaxpr
    eqns, outvars = _distinct(flat)
    maker = {var: i for i, eqn in enumerate(eqns) for var in eqn.outvars}
    operations = []
    for eqn in eqns:
        price = flops.of_equation(eqn, backend)
        operands = [maker[var] for var in _variables(eqn.invars) if var in maker]
        operations.append(Operation(eqn.primitive.name, eqn, price.needed + price.added, operands))
    for i, operation in enumerate(operations):
        for operand in operation.operands:
            operations[operand].users.add(i)
    for var in _variables(outvars):
        if var in maker:
            operations[maker[var]].is_output = True
    for i, operation in enumerate(operations):
        _simplify(operations, i, operation)
    return operations


def size(var: Any) -> int:
    """Number of elements."""
    return math.prod(var.aval.shape)


def _distinct(jaxpr: Any) -> tuple[list[Any], list[Any]]:
    """The equations of a jaxpr that its results depend on, and the results; equal equations once."""
    same: dict[Any, Any] = {}
    first: dict[Any, Any] = {}
    kept = []
    for eqn in jaxpr.eqns:
        invars = [var if isinstance(var, jex.Literal) else same.get(var, var) for var in eqn.invars]
        eqn = eqn.replace(invars=invars)
        if len(eqn.outvars) == 1 and eqn.primitive.name != BARRIER:
            read = tuple(str(var.val) if isinstance(var, jex.Literal) else var for var in invars)
            params = tuple(sorted((name, str(value)) for name, value in eqn.params.items()))
            key = eqn.primitive.name, params, read, str(eqn.outvars[0].aval)
            if key in first:
                same[eqn.outvars[0]] = first[key]
                continue
            first[key] = eqn.outvars[0]
        kept.append(eqn)
    outvars = [var if isinstance(var, jex.Literal) else same.get(var, var) for var in jaxpr.outvars]
    return inline.needed(jaxpr.replace(eqns=kept), outvars), outvars


def _simplify(operations: list[Operation], i: int, operation: Operation) -> None:
    inner = [operations[at] for at in operation.operands]
    if operation.name == "reduce_sum" and inner and inner[0].name == "neg":
        _bypass(operations, i)
        operation.flops += math.prod(operation.shape)
    elif operation.is_multiple and inner and inner[0].is_multiple:
        _bypass(operations, i)
    elif operation.name == "mul" and any(map(_is_one, inner)):
        operation.flops = 0.0
    elif operation.name in _ORDER:
        for other in inner:
            if other.name in _ORDER and other.name != operation.name and other.users == {i} and not other.is_output:
                other.flops, operation.name = 0.0, CLAMP


def _bypass(operations: list[Operation], i: int) -> None:
    """Makes an operation read the operands of its operand."""
    (at,) = operations[i].operands
    inner = operations[at]
    operations[i].operands = list(inner.operands)
    inner.users.discard(i)
    for operand in inner.operands:
        operations[operand].users.add(i)
        if not inner.users and not inner.is_output:
            operations[operand].users.discard(at)


def _is_one(operation: Operation) -> bool:
    (value, *_) = (*operation.eqn.invars, None)
    return operation.name == "broadcast_in_dim" and isinstance(value, jex.Literal) and value.val == 1


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, jex.Literal)]
