"""Which axis of a value counts the examples of the batch, and whether the examples are independent of each other.

What is computed from an example may be kept and used again with another batch only if it depends on that example
alone: not on the others, as the statistics of a BatchNorm in training mode do; not on its position in the batch. Both
are read off the equations: each hands on the axis that counts the examples, or else mixes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from smartfrz_jax.jaxprs import example_axis_rules as rules
from smartfrz_jax.jaxprs import inline
from smartfrz_jax.jaxprs.example_axis_rules import Axis, Mixed, Value
from smartfrz_jax.jaxprs.parts import Atom, Eqn, Jaxpr, lookup

_RANDOM = ("random_", "rng_", "threefry")


def count(inputs: Sequence[Any], state: Collection[int] = ()) -> int:
    """Number of examples in a batch: the length of the first axis of the first input that has one.

    Args:
        inputs: The batch, and what comes with it, such as random keys.
        state: Positions of inputs that are variables of layers.

    Raises:
        ValueError: If no input has an axis, or the batch is empty.
    """
    for i, part in enumerate(inputs):
        for leaf in jax.tree.leaves(part):
            if i not in state and getattr(leaf, "shape", ()):
                if leaf.shape[0] == 0:
                    raise ValueError(f"inputs: got a batch of shape {leaf.shape}, expected at least one example")
                return leaf.shape[0]
    raise ValueError("inputs: none of them has a first axis to count examples by; pass the batch as arrays")


def axes(jaxpr: Jaxpr, given: Sequence[Axis | None]) -> dict[Any, Axis | str]:
    """The axis that counts the examples, for values of which an example may depend on the others.

    Where values meet of which only some have such an axis, it is theirs: what has none, such as the statistics of a
    BatchNorm in training mode, is for all examples.

    Args:
        jaxpr: The jaxpr.
        given: Axis of each of its inputs; None for those that do not count examples.

    Returns:
        For each value that is computed from examples, their axis; why it has none, if it has none.
    """
    known: dict[Any, Axis | str] = {v: axis for v, axis in zip(jaxpr.invars, given, strict=True) if axis is not None}
    for eqn in jaxpr.eqns:
        ins = [lookup(known, atom) for atom in eqn.invars]
        if any(isinstance(axis, Axis) for axis in ins):
            found = zip(eqn.outvars, _axes_of_results(eqn, ins), strict=True)
            known.update({var: axis for var, axis in found if axis is not None})
        elif any(ins):
            known.update(dict.fromkeys(eqn.outvars, next(why for why in ins if why)))
    return known


def _axes_of_results(eqn: Eqn, ins: Sequence[Axis | str | None]) -> Sequence[Axis | str | None]:
    given = [axis if isinstance(axis, Axis) else None for axis in ins]
    if (body := inline.called(eqn)) is not None:
        inner = axes(body, given)
        return [lookup(inner, atom) for atom in body.outvars]
    # As if everything else were the same for all examples.
    shapes = (atom.aval.shape for atom in eqn.invars)
    values = [
        Value(axis, frozenset() if axis else frozenset(range(len(shape))))
        for axis, shape in zip(given, shapes, strict=True)
    ]
    try:
        return _transfer(eqn, values)
    except Mixed as why:
        return [f"{eqn.primitive.name}: {why}"] * len(eqn.outvars)


def outputs(eqn: Eqn, values: Sequence[Value]) -> list[Value]:
    """What is known about the results of an equation.

    Args:
        eqn: The equation.
        values: What is known about its inputs.

    Raises:
        Mixed: If a result for one example depends on other examples, or on where in the batch the example stands, or
            if that cannot be told.
    """
    name = eqn.primitive.name
    if name.startswith(_RANDOM):
        raise Mixed(f"draws random numbers ({name})")
    if name == "axis_index":
        raise Mixed("asks which device it is on, so which part of the batch it has")
    if any(value.axis is not None for value in values):
        return [Value(axis) for axis in _transfer(eqn, values)]
    return [Value(constant=constant) for constant in _constant(eqn, values)]


def _constant(eqn: Eqn, values: Sequence[Value]) -> list[frozenset[int]]:
    """Axes along which the results are the same everywhere, of an equation that does not depend on examples."""
    found: list[set[int]] = [set() for _ in eqn.outvars]
    shape = eqn.outvars[0].aval.shape if eqn.outvars else ()
    if eqn.primitive.name == "broadcast_in_dim":
        kept = dict(zip(eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape, strict=True))
        found[0].update(axis for axis, size in enumerate(shape) if kept.get(axis) != size)
    if eqn.primitive.name == "iota":
        found[0].update(axis for axis in range(len(shape)) if axis != eqn.params["dimension"])
    for axis in set().union(*(value.constant for value in values)):
        as_examples = [value._replace(axis=Axis(axis)) if axis in value.constant else value for value in values]
        try:
            axes = _transfer(eqn, as_examples)
        except Mixed:
            continue
        for constant, out in zip(found, axes, strict=True):
            if out is not None and out.inner == 1:
                constant.add(out.position)
    return [frozenset(constant) for constant in found]


def _transfer(eqn: Eqn, values: Sequence[Value]) -> list[Axis | None]:
    """Axes of the examples in the results of an equation of which at least one input has such an axis."""
    name = eqn.primitive.name
    shapes = [var.aval.shape for var in eqn.invars]
    rule = _RULES.get(name)
    if rule is not None:
        return rule(eqn, shapes, values)
    if (body := inline.called(eqn)) is not None:
        return [value.axis for value in of_jaxpr(body, values)]
    raise Mixed(f"{name}, of which it is not known whether it keeps the examples apart")


def of_jaxpr(jaxpr: Jaxpr, values: Sequence[Value]) -> list[Value]:
    """What is known about the results of a jaxpr, from what is known about its inputs.

    Raises:
        Mixed: If an equation that the results depend on mixes examples.
    """
    known: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
    for eqn in inline.needed(jaxpr, jaxpr.outvars):
        known.update(zip(eqn.outvars, outputs(eqn, read(known, eqn.invars)), strict=True))
    return read(known, jaxpr.outvars)


def read(known: Mapping[Any, Value], atoms: Sequence[Atom]) -> list[Value]:
    """What is known about some values; nothing about those not in ``known``."""
    return [lookup(known, atom, Value()) for atom in atoms]


def _scan(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    body = eqn.params["jaxpr"].jaxpr
    n_sliced, n_stacked = inline.scan_sizes(eqn)
    n_carry = len(body.outvars) - n_stacked
    n_fixed = len(values) - n_sliced - n_carry
    rows = []
    for value in values[n_fixed + n_carry :]:
        moved = frozenset(at - 1 for at in value.constant if at)
        axis = None if value.axis is None else rules.without(value.axis, (0,), "a loop over the examples")
        rows.append(Value(axis, moved))

    def run(carry: list[Value]) -> list[Value]:
        return of_jaxpr(body, [*values[:n_fixed], *carry, *rows])

    carry = _settled(list(values[n_fixed : n_fixed + n_carry]), lambda carry: run(carry)[:n_carry])
    stacked = [value.axis for value in run(carry)[n_carry:]]
    ys = [None if axis is None else axis._replace(position=axis.position + 1) for axis in stacked]
    return [*(value.axis for value in carry), *ys]


def _while(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    fixed = values[n_cond : n_cond + n_body]
    body = eqn.params["body_jaxpr"].jaxpr
    carry = _settled(list(values[n_cond + n_body :]), lambda carry: of_jaxpr(body, [*fixed, *carry]))
    (going_on,) = of_jaxpr(eqn.params["cond_jaxpr"].jaxpr, [*values[:n_cond], *carry])
    if going_on.axis is not None:
        raise Mixed("a loop that runs as long as an example says")
    return [value.axis for value in carry]


def _settled(carry: list[Value], run: Callable[[list[Value]], list[Value]]) -> list[Value]:
    """What is known about the values that a loop carries, whichever iteration it is in."""
    for _ in range(len(carry) + 2):
        merged = [_either(old, new) for old, new in zip(carry, run(carry), strict=True)]
        if merged == carry:
            return carry
        carry = merged
    raise Mixed("a loop that moves the axis of the examples")


def _either(first: Value, second: Value) -> Value:
    """What is known about a value that is one or the other."""
    if first.axis is None and second.axis is None:
        return Value(constant=first.constant & second.constant)
    axis = rules.agreed((first.axis, second.axis))
    for value in (first, second):
        if value.axis is None and axis.position not in value.constant:
            raise Mixed("a value that is not the same for every position in the batch")
    return Value(axis)


def _cond(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    if values[0].axis is not None:
        raise Mixed("a branch that an example chooses")
    results = [of_jaxpr(branch.jaxpr, values[1:]) for branch in eqn.params["branches"]]
    merged = results[0]
    for result in results[1:]:
        merged = [_either(old, new) for old, new in zip(merged, result, strict=True)]
    return [value.axis for value in merged]


_RULES = rules.RULES | {"cond": _cond, "scan": _scan, "while": _while}
