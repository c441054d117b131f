"""A train step as its equations: what its results cost, and by which way they come about."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core as jex

from smartfrz_jax.jaxprs import flops, inline
from smartfrz_jax.jaxprs.parts import ClosedJaxpr, Eqn, Var, variables

# What a value passes on its way from a gradient to a result of the step.
_PASSING = flops.ELEMENTWISE | flops.FREE | flops.COLLECTIVES | flops.EXCHANGES | {"cond", "integer_pow"}
# What is done to a mask before it is applied.
# fmt: off
_OF_MASKS = frozenset({
    "and", "broadcast_in_dim", "convert_element_type", "dynamic_slice", "eq", "expand_dims", "ge", "gt", "le", "lt",
    "ne", "neg", "not", "or", "reshape", "slice", "squeeze", "stop_gradient", "sub", "xor",
})
# fmt: on


class Way(NamedTuple):
    """The way to a result of a step, from the last operations that are more than a step from element to element.

    Attributes:
        eqns: The equations on it, last first.
        ends: The operations where it begins: products, sums.
        inputs: Inputs of the step that are read on it.
    """

    eqns: list[Eqn]
    ends: list[Any]
    inputs: list[Any]


class StepProgram:
    """The equations of a step, flat, with their prices in FLOPs.

    Args:
        closed: A ``ClosedJaxpr``.
        backend: Platform that it runs on.

    Attributes:
        results: What it returns.
    """

    def __init__(self, closed: ClosedJaxpr, backend: str):
        jaxpr = inline.inline(closed, (), (), rules=True).jaxpr
        self.results = variables(jaxpr.outvars)
        self._eqns = jaxpr.eqns
        self._maker = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
        self._made = set[Any]()  # depends on more than steps from element to element
        for eqn in jaxpr.eqns:
            if eqn.primitive.name not in _PASSING or not self._made.isdisjoint(variables(eqn.invars)):
                self._made.update(eqn.outvars)
        conds = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
        self._through = {var: read for eqn in conds for var, read in _through(eqn)}
        self._prices = [sum(flops.of_equation(eqn, backend)) for eqn in jaxpr.eqns]

    def cost(self, results: Iterable[Any] | None = None, *, numbers: bool = True) -> float:
        """FLOPs of what some results depend on.

        Args:
            results: The results; all by default.
            numbers: Whether to count what they depend on by way of single numbers.
        """
        wanted = set(self.results if results is None else results)
        total = 0.0
        for eqn, price in zip(reversed(self._eqns), reversed(self._prices), strict=True):
            if not wanted.isdisjoint(eqn.outvars):
                total += price
                wanted.update(
                    var for var in self._read(eqn, wanted) if numbers or getattr(var.aval, "shape", None) != ()
                )
        return total

    def way(self, result: Any) -> Way:
        """The way to a result."""
        way = Way([], [], [])
        seen, rest = {result}, [result]
        while rest:
            var = rest.pop()
            eqn = self._maker.get(var)
            if eqn is None:
                way.inputs.append(var)
            elif eqn.primitive.name not in _PASSING:
                way.ends.append(eqn)
            else:
                way.eqns.append(eqn)
                new = self._read(eqn, {var}) - seen
                seen |= new
                rest.extend(new)
        return way

    def _read(self, eqn: Eqn, wanted: Collection[Any]) -> set[Any]:
        """Inputs of an equation that those of its results depend on that are wanted."""
        if eqn.primitive.name == "cond":
            return set().union(*(self._through[var] for var in eqn.outvars if var in wanted))
        return set(variables(eqn.invars))

    def is_gradient(self, result: Any) -> bool:
        """Whether a result is a gradient, or a multiple of one: nothing of its shape that went in is in it."""
        return all(var.aval.shape != result.aval.shape for var in self.way(result).inputs)

    def is_masked(self, results: Iterable[Any]) -> bool:
        """Whether something that the step is told, and is not the same for all results, is multiplied into them."""
        kinds = collections.defaultdict[Any, set[Any]](set)
        for result in results:
            way = self.way(result)
            for eqn in way.eqns:
                for var in _selectors(eqn) if not self._made.isdisjoint(variables(eqn.invars)) else ():
                    if isinstance(var, jex.Literal):
                        if eqn.primitive.name == "mul" and jnp.ndim(var.val) == 0 and var.val == 0:
                            return True
                    elif (origin := self._origin(var)) is not None:
                        source, path = origin
                        if source.aval.dtype == bool or (source.aval.shape and source.aval.shape == result.aval.shape):
                            return True
                        kinds[source].add(path)
        numbers = [var for var in kinds if not var.aval.shape and var not in self.results]
        return len(numbers) > 1 or any(len(paths_) > 1 for paths_ in kinds.values())

    def _origin(self, var: Var) -> tuple[Any, tuple[Any, ...]] | None:
        """The input of the step that a mask is made of, and how; None if it is made of more."""
        path = []
        while (eqn := self._maker.get(var)) is not None:
            inputs = variables(eqn.invars)
            if eqn.primitive.name not in _OF_MASKS or len(inputs) != 1:
                return None
            literals = tuple(str(atom.val) for atom in eqn.invars if isinstance(atom, jex.Literal))
            path.append((eqn.primitive.name, str(eqn.params), literals))
            (var,) = inputs
        return var, tuple(path)


def _selectors(eqn: Eqn) -> list[Any]:
    if eqn.primitive.name in ("select_n", "cond"):
        return list(eqn.invars[:1])
    return list(eqn.invars) if eqn.primitive.name == "mul" else []


def _through(cond: Eqn) -> Iterator[tuple[Any, set[Any]]]:
    """The inputs of a ``cond`` that each of its results depends on, in any branch."""
    branches = [inline.inline(branch, (), (), rules=True).jaxpr for branch in cond.params["branches"]]
    for at, outvar in enumerate(cond.outvars):
        read = cond.invars[:1]
        for branch in branches:
            result = variables(branch.outvars[at : at + 1])
            used = {var for eqn in inline.needed(branch, result) for var in variables(eqn.invars)}.union(result)
            read += [outer for outer, inner in zip(cond.invars[1:], branch.invars, strict=True) if inner in used]
        yield outvar, set(variables(read))
