"""Why a step costs more than its frozen set asks for, read off its jaxpr.

A gradient is computed if something reads it. So the question is what, and it is put to the jaxpr by cutting: how much
of the step would disappear if no number (a norm, a check) were made of whole arrays, or if the results that have the
shapes of frozen parameters were not returned?
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.extend import core as jex

from smartfrz_jax import flops, inlining, paths
from smartfrz_jax.accounting import Account
from smartfrz_jax.freezing import Frozen

Cause = Literal["norm", "mask", "apart", "scan", "optimizer", "behind", "unknown"]

_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
_LOOPS = frozenset({"scan", "while"})
# What a value passes on its way from a gradient to a result of the step.
_PASSING = flops.ELEMENTWISE | flops.FREE | {"cond", "integer_pow"}
# What is done to a mask before it is applied.
# fmt: off
_OF_MASKS = frozenset({
    "and", "broadcast_in_dim", "convert_element_type", "dynamic_slice", "eq", "expand_dims", "ge", "gt", "le", "lt",
    "ne", "neg", "not", "or", "reshape", "slice", "squeeze", "stop_gradient", "sub", "xor",
})
# fmt: on
# A cut explains what is missing if it brings at least this part of it, and more than rounding.
_PART, _NOTHING = 0.5, 1e-4


class Diagnosis(NamedTuple):
    """What keeps the saving from coming.

    Attributes:
        cause: Its name.
        reason: What the step does.
        cure: What to do about it.
    """

    cause: Cause
    reason: str
    cure: str


_FRONT_DOORS = (
    "take the gradients from the optimizer's (or the TrainState's) value_and_grad, or from smartfrz_jax.value_and_grad"
)
_LOGGED = Diagnosis(
    "norm",
    "the step computes a number, such as a norm that is logged, from the gradients of frozen layers too",
    f"{_FRONT_DOORS}: there the gradients of frozen layers are zeros that cost nothing, and norms are over active "
    "layers",
)
_CLIPPED = Diagnosis(
    "norm",
    "something that acts on all layers, such as a clip by the global norm or a check for finite values, reads the "
    "gradients of frozen layers too",
    f"{_FRONT_DOORS}, and put the clip inside the transformation that smartfrz_jax.freeze (or the optimizer) is given",
)
_MASKED = Diagnosis(
    "mask",
    "what is frozen is known only when the step runs: a mask is multiplied with, or selects from, gradients that are "
    "therefore computed for all layers",
    "make the frozen set static, as smartfrz_jax.Frozen is: an attribute of the optimizer or of the TrainState, or a "
    "static argument of jax.jit",
)
_RETURNED = Diagnosis(
    "apart",
    "the step returns the gradients of frozen layers, for an update that is compiled apart",
    "put gradients and update into one jitted step, so that what the update does not read is not computed",
)
UPDATE_ONLY = Diagnosis(
    "apart",
    "this program has no products of matrices and no convolutions: it is the update alone, and the gradients are "
    "compiled apart",
    "put gradients and update into one jitted step, and pass that one here",
)
STATE_KEPT = Diagnosis(
    "optimizer",
    "the optimizer's state of frozen layers is still an argument of the step, and goes on moving their weights",
    "use smartfrz_jax.freeze(tx, frozen) for the whole tree, and smartfrz_jax.migrate for its state; the optimizers of "
    "smartfrz_jax.nnx and smartfrz_jax.linen do so",
)
_UPDATED = Diagnosis(
    "optimizer",
    "the optimizer reads the gradients of frozen layers, for their moments or their weights",
    f"{_FRONT_DOORS}, and use smartfrz_jax.freeze(tx, frozen), which shows the optimizer the active layers alone",
)
_SCANNED = Diagnosis(
    "scan",
    "frozen and active blocks are stacked and run in one scan, whose backward pass computes the gradients of all rows",
    "scan over the frozen blocks and over the active ones apart, as smartfrz_jax.nnx.scan_blocks does, or run the "
    "blocks one by one",
)
_ELSEWHERE = Diagnosis(
    "unknown",
    "the cause could not be told from the step's jaxpr",
    "compare the step with the jaxpr of account.trace(frozen), which does what is asked for and no more; an account of "
    "another loss or batch gives wrong predictions too",
)
NOT_TRACED = Diagnosis(
    "unknown",
    "the cause cannot be told without the step's jaxpr",
    "pass the jaxpr, step.trace(*args).jaxpr",
)


def diagnose(account: Account, before: Frozen, after: Frozen, closed: Any, missing: float) -> Diagnosis:
    """Why a step does not save what it should.

    Args:
        account: The account of the step.
        before: A frozen set.
        after: Another one, with more layers.
        closed: Jaxpr of the step for it.
        missing: What should have been saved and was not, as a share of the step.

    Returns:
        The first cause that explains at least half of it.
    """
    step = Program(closed, account.backend)
    enough = max(_PART * missing, _NOTHING)
    least, most = (Program(account.trace(frozen), account.backend).cost() for frozen in (after, before))
    if account.saving(after, before) - (1 - least / most) > enough:
        return _SCANNED
    total = step.cost()
    least = min(least, total * (1 - missing))  # the account may be for a larger batch
    arrays = [var for var in step.results if var.aval.shape]
    if (total - max(step.cost(arrays), least)) / total > enough:
        return _LOGGED
    without_numbers = step.cost(arrays, numbers=False)
    if (total - max(without_numbers, least)) / total > enough:
        return _CLIPPED
    shapes = {leaf.shape for name, leaf in paths.flatten(account.params).items() if name in after.params}
    others = [var for var in arrays if var.aval.shape not in shapes]
    if (without_numbers - max(step.cost(others, numbers=False), least)) / total <= enough:
        return _ELSEWHERE
    # Of kernels, if possible: statistics of batches have the shapes of vectors of weights.
    rank = max(map(len, shapes))
    results = [var for var in arrays if var.aval.shape in shapes and len(var.aval.shape) == rank and step.way(var).ends]
    if all(step.is_gradient(var) for var in results):
        return _RETURNED
    return _MASKED if step.is_masked(arrays) else _UPDATED


def has_products(jaxpr: Any) -> bool:
    """Whether there are products of matrices or convolutions in a jaxpr, or in one inside it."""
    return any(
        eqn.primitive.name in _PRODUCTS or any(map(has_products, _jaxprs_in(eqn))) for eqn in getattr(jaxpr, "eqns", ())
    )


def has_loops(jaxpr: Any) -> bool:
    """Whether products or convolutions run in a loop, so that XLA, which counts its body once, counts too few."""
    return any(
        any(has_products(inner) if eqn.primitive.name in _LOOPS else has_loops(inner) for inner in _jaxprs_in(eqn))
        for eqn in jaxpr.eqns
    )


def _jaxprs_in(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


class Way(NamedTuple):
    """The way to a result of a step, from the last operations that are more than a step from element to element.

    Attributes:
        eqns: The equations on it, last first.
        ends: The operations where it begins: products, sums.
        inputs: Inputs of the step that are read on it.
    """

    eqns: list[Any]
    ends: list[Any]
    inputs: list[Any]


class Program:
    """The equations of a step, flat, with their prices.

    Args:
        closed: A ``ClosedJaxpr``.
        backend: Platform that it runs on.

    Attributes:
        results: What it returns.
    """

    def __init__(self, closed: Any, backend: str):
        jaxpr = inlining.inline(closed, (), (), rules=True).jaxpr
        self.results = [var for var in jaxpr.outvars if not isinstance(var, jex.Literal)]
        self._eqns = jaxpr.eqns
        self._maker = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
        self._made = set[Any]()  # depends on more than steps from element to element
        for eqn in jaxpr.eqns:
            if eqn.primitive.name not in _PASSING or not self._made.isdisjoint(_variables(eqn)):
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

    def _read(self, eqn: Any, wanted: Collection[Any]) -> set[Any]:
        """Inputs of an equation that those of its results depend on that are wanted."""
        if eqn.primitive.name == "cond":
            return set().union(*(self._through[var] for var in eqn.outvars if var in wanted))
        return set(_variables(eqn))

    def is_gradient(self, result: Any) -> bool:
        """Whether a result is a gradient, or a multiple of one: nothing of its shape that went in is in it."""
        return all(var.aval.shape != result.aval.shape for var in self.way(result).inputs)

    def is_masked(self, results: Iterable[Any]) -> bool:
        """Whether something that the step is told, and is not the same for all results, is multiplied into them."""
        kinds = collections.defaultdict[Any, set[Any]](set)
        for result in results:
            way = self.way(result)
            for eqn in way.eqns:
                for var in _selectors(eqn) if not self._made.isdisjoint(_variables(eqn)) else ():
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

    def _origin(self, var: Any) -> tuple[Any, tuple[Any, ...]] | None:
        """The input of the step that a mask is made of, and how; None if it is made of more."""
        path = []
        while (eqn := self._maker.get(var)) is not None:
            inputs = list(_variables(eqn))
            if eqn.primitive.name not in _OF_MASKS or len(inputs) != 1:
                return None
            literals = tuple(str(atom.val) for atom in eqn.invars if isinstance(atom, jex.Literal))
            path.append((eqn.primitive.name, str(eqn.params), literals))
            (var,) = inputs
        return var, tuple(path)


def _selectors(eqn: Any) -> list[Any]:
    if eqn.primitive.name in ("select_n", "cond"):
        return list(eqn.invars[:1])
    return list(eqn.invars) if eqn.primitive.name == "mul" else []


def _through(cond: Any) -> Iterator[tuple[Any, set[Any]]]:
    """The inputs of a ``cond`` that each of its results depends on, in any branch."""
    branches = [inlining.inline(branch, (), (), rules=True).jaxpr for branch in cond.params["branches"]]
    for at, outvar in enumerate(cond.outvars):
        read = cond.invars[:1]
        for branch in branches:
            result = [var for var in branch.outvars[at : at + 1] if not isinstance(var, jex.Literal)]
            used = {var for eqn in inlining.needed(branch, result) for var in _variables(eqn)}.union(result)
            read += [outer for outer, inner in zip(cond.invars[1:], branch.invars, strict=True) if inner in used]
        yield outvar, {var for var in read if not isinstance(var, jex.Literal)}


def _variables(eqn: Any) -> Iterator[Any]:
    return (var for var in eqn.invars if not isinstance(var, jex.Literal))
