"""Along which of its axes a value has the rows of which arrays: what a scan that runs over it reads row by row."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from smartfrz_jax.jaxprs import flops, inline
from smartfrz_jax.jaxprs.parts import ClosedJaxpr, Eqn, Jaxpr, lookup

# For each axis of a value the arrays whose rows are its rows there, with the axis that they have them along.
Axes: TypeAlias = tuple[frozenset[tuple[Hashable, int]], ...]

_NONE: frozenset[tuple[Hashable, int]] = frozenset()
_UNARY = frozenset({
    "cbrt", "copy", "copy_p", "cos", "erf", "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "logistic",
    "optimization_barrier", "pow", "rsqrt", "sharding_constraint", "sin", "sqrt", "stop_gradient", "tan", "tanh",
})  # fmt: skip


def of_array(name: Hashable, rank: int) -> Axes:
    """Axes of an array itself."""
    return tuple(frozenset({(name, axis)}) for axis in range(rank))


def through(eqn: Eqn, ins: Sequence[Axes | None]) -> list[Axes]:
    """Axes of the results of an equation that has no jaxpr in it.

    Args:
        eqn: The equation.
        ins: Axes of its inputs; ``None`` where nothing is known.
    """
    name, params = eqn.primitive.name, eqn.params
    ranks = [len(getattr(var.aval, "shape", ())) for var in eqn.outvars]
    nothing: list[Axes] = [(_NONE,) * rank for rank in ranks]
    if not any(axes is not None and any(axes) for axes in ins):
        return nothing
    shapes = [getattr(var.aval, "shape", ()) for var in eqn.invars]
    known = [(_NONE,) * len(shape) if axes is None else axes for shape, axes in zip(shapes, ins, strict=True)]
    if name == "optimization_barrier":
        return known
    if name in flops.ELEMENTWISE or name in _UNARY:
        like = [axes for axes in known if len(axes) == ranks[0]]
        return [tuple(_NONE.union(*each) for each in zip(*like, strict=True))]
    (first, *others) = known
    if name == "transpose":
        return [tuple(first[axis] for axis in params["permutation"])]
    if name == "broadcast_in_dim":
        places = zip(params["broadcast_dimensions"], first, shapes[0], strict=True)
        kept = {at: axes for at, axes, size in places if size == params["shape"][at]}
        return [tuple(kept.get(at, _NONE) for at in range(ranks[0]))]
    if name == "squeeze":
        return [tuple(axes for at, axes in enumerate(first) if at not in params["dimensions"])]
    if name == "reshape" and params["dimensions"] is None:
        before, after = shapes[0], eqn.outvars[0].aval.shape
        same = next((at for at, sizes in enumerate(zip(before, after, strict=False)) if sizes[0] != sizes[1]), None)
        same = min(len(before), len(after)) if same is None else same
        return [tuple(first[at] if at < same else _NONE for at in range(ranks[0]))]
    if name in flops.REDUCTIONS:
        return [tuple(axes for at, axes in enumerate(first) if at not in params["axes"])]
    if name == "dot_general":
        _, batch = params["dimension_numbers"]
        together = [first[left] | others[0][right] for left, right in zip(*batch, strict=True)]
        return [(*together, *nothing[0][len(together) :])]
    return nothing


class Scan(NamedTuple):
    """A scan that reads arrays row by row.

    Attributes:
        length: Number of rows.
        reverse: Whether it begins with the last.
        axes: The axis of each array along which it reads the rows, by name.
    """

    length: int
    reverse: bool
    axes: Mapping[str, int]


def scans(closed: ClosedJaxpr, names: Sequence[str]) -> list[Scan]:
    """The scans of a jaxpr that read inputs row by row, wherever they are, but for those inside loops.

    Args:
        closed: A ``ClosedJaxpr`` of ``(arrays, *inputs)``.
        names: Names of the arrays, its first inputs.
    """
    invars = zip(closed.jaxpr.invars, names, strict=False)
    return list(_scans(closed.jaxpr, {var: of_array(name, len(var.aval.shape)) for var, name in invars}))


def _scans(jaxpr: Jaxpr, known: dict[Any, Axes]) -> Iterator[Scan]:
    for eqn in jaxpr.eqns:
        ins = [lookup(known, atom) for atom in eqn.invars]
        name, body = eqn.primitive.name, inline.body_of(eqn)
        if name == "scan":
            n_sliced, _ = inline.scan_sizes(eqn)
            pairs = _NONE.union(*(axes[0] for axes in ins[len(ins) - n_sliced :] if axes is not None))
            axes = {str(array): axis for array, axis in pairs}
            if axes and len(axes) == len(pairs):  # else an array is read along two axes
                yield Scan(eqn.params["length"], eqn.params["reverse"], axes)
        elif hasattr(body, "eqns") and len(body.invars) == len(ins):
            inner = {var: axes for var, axes in zip(body.invars, ins, strict=True) if axes is not None}
            yield from _scans(body, inner)
            if len(body.outvars) == len(eqn.outvars):
                outs = zip(eqn.outvars, body.outvars, strict=True)
                known.update((out, inner[var]) for out, var in outs if lookup(inner, var) is not None)
        else:
            known.update(zip(eqn.outvars, through(eqn, ins), strict=True))
