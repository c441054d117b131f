"""Which parameters are the stacked weights of one block: a loop reads all of them row by row.

``nn.scan`` of Linen, ``nnx.scan`` and ``jax.lax.scan`` over a tree of weights run one block many times, each time with
the next row. What is frozen of such a block is frozen in all of its rows, unless these are layers of their own
(:mod:`smartfrz_jax.layers.row_layers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from smartfrz_jax.jaxprs import inline
from smartfrz_jax.jaxprs.parts import ClosedJaxpr, Eqn, Jaxpr, lookup
from smartfrz_jax.pytrees import paths

_Rows = frozenset[str]
_NONE: _Rows = frozenset()
# What comes out of these has no longer the rows of one parameter.
_JOINING = frozenset({"concatenate", "stack", "pad", "reduce_sum", "dot_general"})


def stacks(closed: ClosedJaxpr, names: Sequence[str]) -> list[_Rows]:
    """Groups of parameters that a loop reads row by row.

    Weights that are stacked on the way, as ``smartfrz_jax.nnx.scan_blocks`` does, are not: each is one row.

    Args:
        closed: A ``ClosedJaxpr`` or ``Jaxpr`` of ``(params, *inputs)``.
        names: Names of the parameters, its first inputs.

    Returns:
        The groups; no parameter is in two of them.
    """
    jaxpr = closed.jaxpr
    rows: dict[Any, _Rows | None] = dict.fromkeys(jaxpr.invars[len(names) :])
    rows.update(zip(jaxpr.invars, [frozenset({name}) for name in names], strict=False))
    groups: list[_Rows] = []
    for found in _read(jaxpr, rows):
        apart = [group for group in groups if group.isdisjoint(found)]
        groups = [*apart, found.union(*(group for group in groups if group not in apart))]
    return groups


def name_of(stack: Iterable[str], others: Iterable[str]) -> str:
    """A name for a group of parameters: the path of the module that holds them and no other.

    Where there is none, those of several modules, joined by a plus sign.

    Args:
        stack: Names of its parameters, in order.
        others: Names of all other variables.

    Example:
        >>> name_of(["blocks/up/kernel", "blocks/down/kernel"], ["head/kernel"])
        'blocks'
        >>> name_of(["up", "down"], ["head"])
        'up+down'
    """
    parts = [name.split(paths.SEPARATOR) for name in stack]
    outside = [name.split(paths.SEPARATOR) for name in others]
    depth = 1
    while any(other[:depth] in [part[:depth] for part in parts] for other in outside):
        depth += 1
    while len({tuple(part[: depth + 1]) for part in parts}) == 1 and depth + 1 < min(map(len, parts)):
        depth += 1
    return "+".join(dict.fromkeys(paths.SEPARATOR.join(part[:depth]) for part in parts))


def _read(jaxpr: Jaxpr, rows: dict[Any, _Rows | None], *, in_loop: bool = False) -> Iterator[_Rows]:
    """Yields, for every loop, what it reads row by row; extends ``rows``, which has None for what depends on data."""
    sliced = set[str]()
    for eqn in jaxpr.eqns:
        ins = [lookup(rows, atom, _NONE) for atom in eqn.invars]
        outs: list[_Rows | None] = [_joined(eqn, ins)] * len(eqn.outvars)
        name = eqn.primitive.name
        if name == "scan":
            n_sliced, _ = inline.scan_sizes(eqn)
            yield _union(ins[len(ins) - n_sliced :])
            fixed = [*ins[: len(ins) - n_sliced], *[None] * n_sliced]
            yield from _read_body(eqn.params["jaxpr"], fixed, in_loop=True)
            outs = [None] * len(eqn.outvars)
        elif name == "while":
            n_cond = eqn.params["cond_nconsts"]
            yield from _read_body(eqn.params["body_jaxpr"], ins[n_cond:], in_loop=True)
            outs = [None] * len(eqn.outvars)
        elif name == "cond":
            for branch in eqn.params["branches"]:
                yield from _read_body(branch, ins[1:], in_loop=in_loop)
        elif name == "dynamic_slice" and in_loop:
            sliced.update(ins[0] or ())
        elif (body := inline.body_of(eqn)) is not None and len(body.invars) == len(ins):
            inner = dict(zip(body.invars, ins, strict=True))
            yield from _read(body, inner, in_loop=in_loop)
            if len(body.outvars) == len(outs):
                outs = [lookup(inner, atom, _NONE) for atom in body.outvars]
        rows.update(zip(eqn.outvars, outs, strict=True))
    yield frozenset(sliced)


def _read_body(body: Jaxpr, ins: Sequence[_Rows | None], *, in_loop: bool) -> Iterator[_Rows]:
    jaxpr = getattr(body, "jaxpr", body)
    constants = len(jaxpr.invars) - len(ins)  # of a while loop: its own come first
    rows = dict(zip(jaxpr.invars[max(constants, 0) :], ins[max(-constants, 0) :], strict=True))
    yield from _read(jaxpr, rows, in_loop=in_loop)


def _joined(eqn: Eqn, ins: Sequence[_Rows | None]) -> _Rows | None:
    """The parameters whose rows are rows of a result too; None if it depends on data."""
    if None in ins:
        return None
    grows = eqn.primitive.name == "broadcast_in_dim" and eqn.outvars[0].aval.size > eqn.invars[0].aval.size
    return _NONE if grows or eqn.primitive.name in _JOINING else _union(ins)


def _union(ins: Iterable[_Rows | None]) -> _Rows:
    return frozenset[str]().union(*(each for each in ins if each is not None))
