"""The operations that an equation consists of, and which layer each belongs to.

Most equations are one operation. A loop over the data, such as a recurrence over time, and what ``jax.shard_map`` runs
are those of their body: the layers in it are told apart as they are elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core as jex

from smartfrz_jax.cost.kinds import kind_of
from smartfrz_jax.jaxprs import flops, inline
from smartfrz_jax.jaxprs.parts import Eqn, lookup

_WITH_OPERATIONS = frozenset({"scan", "shard_map"})


class Source(NamedTuple):
    """Where a value comes from.

    Attributes:
        layers: The layers whose parameters were combined last with what it is made of, as a bit mask.
        is_data: Whether it depends on the data.
    """

    layers: int = 0
    is_data: bool = False


class Operation(NamedTuple):
    """An operation.

    Attributes:
        eqn: Its equation, which may be in the body of another one.
        kind: Kind of operation.
        owner: Index of its layer; -1 if it is in none.
        times: How often it runs.
        forward: Price of running it so often.
        takes_weights: Whether it combines parameters with data.
    """

    eqn: Eqn
    kind: str
    owner: int
    times: int
    forward: flops.Flops
    takes_weights: bool


def follow(eqns: Sequence[Eqn], sources: dict[Any, Source], backend: str) -> list[list[Operation]]:
    """The operations of each equation.

    Args:
        eqns: Equations of an inlined jaxpr, in order.
        sources: Where its inputs come from, if from layers or the data. What the equations make is added.
        backend: Platform that they will run on.
    """
    found = []
    for eqn in eqns:
        ins = [lookup(sources, atom, Source()) for atom in eqn.invars]
        weights = _union(source for source in ins if not source.is_data)
        layers = weights or _union(source for source in ins if source.is_data)
        is_data = any(source.is_data for source in ins)
        kind = kind_of(eqn, [s.layers > 0 and not s.is_data for s in ins], [s.is_data for s in ins])
        price = flops.of_equation(eqn, backend)
        whole = Operation(eqn, kind, layers.bit_length() - 1, 1, price, is_data and weights > 0)
        found.append(_of_body(eqn, ins, backend) or [whole])
        sources.update(dict.fromkeys(eqn.outvars, Source(layers, is_data)))
    return found


def _union(sources: Any) -> int:
    return functools.reduce(int.__or__, (source.layers for source in sources), 0)


def _of_body(eqn: Eqn, ins: list[Source], backend: str) -> list[Operation]:
    """The operations in the body of a loop or of what devices run; none for other equations."""
    if eqn.primitive.name not in _WITH_OPERATIONS or inline.body_of(eqn) is None:
        return []
    body, times = flops.repeated(eqn)
    flat = inline.inline(jex.ClosedJaxpr(body, ()), (), ()).jaxpr
    while True:
        sources = dict(zip(flat.invars, ins, strict=True))
        found = follow(flat.eqns, sources, backend)
        again = list(ins)
        for at, atom in _carried(eqn, flat):
            more = lookup(sources, atom, Source())
            again[at] = Source(ins[at].layers | more.layers, ins[at].is_data or more.is_data)
        if again == ins:
            every = [operation for operations in found for operation in operations]
            return [op._replace(times=op.times * times, forward=op.forward.times(times)) for op in every]
        ins = again


def _carried(eqn: Eqn, body: Any) -> list[tuple[int, Any]]:
    """Positions of the inputs that a loop carries, and what of its body goes there next."""
    if eqn.primitive.name != "scan":
        return []
    n_sliced, n_stacked = inline.scan_sizes(eqn)
    carry = body.outvars[: len(body.outvars) - n_stacked]
    return list(enumerate(carry, len(eqn.invars) - n_sliced - len(carry)))


def shares(operations: Sequence[Operation], frozen: np.ndarray) -> list[tuple[Operation, float, float]]:
    """Each operation of an equation, and its share in the gradients: of weights, and of what is between the layers.

    The equation is differentiated as a whole. Shares are those in the forward pass; only operations that take weights
    of layers that are not ``frozen`` have one in the gradients of weights.
    """
    if len(operations) == 1:
        return [(operations[0], 1.0, 1.0)]
    every = [op.forward.needed for op in operations]
    trained = [op.forward.needed if op.takes_weights and not frozen[op.owner] else 0.0 for op in operations]
    return list(zip(operations, _of_one(trained if any(trained) else every), _of_one(every), strict=True))


def _of_one(amounts: Sequence[float]) -> list[float]:
    total = sum(amounts)
    return [amount / total if total else 1 / len(amounts) for amount in amounts]
