"""Partial evaluation of a loss: what depends on frozen layers and the batch alone, and the rest, which trains.

The first part gives, for every example, the same in each epoch; its results at the frontier to the second can be kept.
The frontier is a minimum cut: nothing expensive is computed again, what is cheap (a normalisation, an embedding, an
activation) is if that makes the frontier smaller, and of what can be kept the fewest bytes for an example are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from smartfrz_jax.caching.batch_sizes import Program
from smartfrz_jax.caching.known_values import KnownValues
from smartfrz_jax.caching.loss_jaxpr import INPUTS, LossJaxpr, by_name, changed_variables, updates_of, with_unchanged
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.jaxprs import digests, flops, inline, partial_inline
from smartfrz_jax.jaxprs.example_axis_rules import Axis
from smartfrz_jax.jaxprs.min_cut import min_cut
from smartfrz_jax.jaxprs.partial_inline import Roles
from smartfrz_jax.jaxprs.parts import Atom, Eqn, Var, as_function, variables
from smartfrz_jax.pytrees.types import PyTree


@dataclasses.dataclass(frozen=True)
class Split:
    """A loss in two parts, for one batch size.

    Attributes:
        frontier: What the first part hands to the second, for one example.
        digests: What these values are computed from and how, of equal ones equal.
        needed: Names of the inputs that the second part reads.
        examples: Examples in a batch.
        frozen_flops: FLOPs of the first part, for a batch.
        repeated_flops: Those of them that the second part computes again.
    """

    frontier: tuple[jax.ShapeDtypeStruct, ...]
    digests: tuple[str, ...]
    needed: frozenset[str]
    examples: int
    frozen_flops: float
    repeated_flops: float
    _traced: LossJaxpr
    _jaxpr: Any
    _cut: tuple[Any, ...]
    _axes: tuple[Axis, ...]
    _digest_of: Mapping[Any, str]
    _expensive: frozenset[Any]

    @property
    def bytes_per_example(self) -> int:
        """Bytes of the frontier for one example."""
        return sum(math.prod(value.shape) * value.dtype.itemsize for value in self.frontier)

    @property
    def read(self) -> frozenset[str]:
        """Names of the variables and inputs that the first part reads."""
        return frozenset(self._reads(self._cut, ()))

    @property
    def program(self) -> Program:
        """What computes the first part."""
        jaxpr = self._jaxpr.jaxpr
        consts = dict(zip(jaxpr.constvars, self._jaxpr.consts, strict=True))
        return Program(_needed(jaxpr.eqns, self._cut, ()), consts, jaxpr.invars, self._cut, self.examples)

    def frozen_part(self, variables: PyTree, inputs: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        """The values at the frontier; the first axis of each counts the examples."""
        return self._run_to_cut((), (), (variables, inputs))

    def live_part(self, variables: PyTree, activations: Sequence[jax.Array], inputs: tuple[Any, ...]) -> Any:
        """``(out, updates)`` of the loss from the values at the frontier; inputs not needed may be ``None``."""
        outvars = self._jaxpr.jaxpr.outvars
        values = [
            _from_rows(rows, var, axis) for rows, var, axis in zip(activations, self._cut, self._axes, strict=True)
        ]
        outs = self._run(outvars, self._cut, values, (variables, inputs))
        return jax.tree.unflatten(self._traced.structure, outs)

    def grown(self, old: Split) -> Growth | None:
        """The first part from the values at the frontier of another split, with fewer frozen layers.

        Args:
            old: The other split, for the same batch size.

        Returns:
            How; None if it would do work again that ``old`` has done.
        """
        known = {digest: var for var, digest in self._digest_of.items()}
        given = [known.get(digest) for digest in old.digests]
        if None in given or self.examples != old.examples:
            return None
        todo = _needed(self._jaxpr.jaxpr.eqns, self._cut, given)
        done = {old._digest_of[var] for var in old._expensive}
        if any(self._digest_of.get(var) in done for eqn in todo for var in eqn.outvars):
            return None

        def run(variables: PyTree, activations: Sequence[jax.Array], inputs: tuple[Any, ...]) -> tuple[jax.Array, ...]:
            values = [_from_rows(rows, v, a) for rows, v, a in zip(activations, given, old._axes, strict=True)]
            return self._run_to_cut(given, values, (variables, inputs))

        return Growth(run, frozenset(name for name in self._reads(self._cut, given) if name.startswith(INPUTS)))

    def _run_to_cut(self, given: Sequence[Any], values: Sequence[Any], arguments: Any) -> tuple[jax.Array, ...]:
        outs = self._run(self._cut, given, values, arguments)
        return tuple(_to_rows(out, axis, self.examples) for out, axis in zip(outs, self._axes, strict=True))

    def _run(self, outvars: Sequence[Atom], given: Sequence[Any], values: Sequence[Any], arguments: Any) -> list[Any]:
        eqns, leaves = _needed(self._jaxpr.jaxpr.eqns, outvars, given), by_name(*arguments)
        invars = self._reads(outvars, given)
        for name in invars:
            if name not in leaves:
                raise ValueError(
                    f"{name}: got None, or nothing, but the part of the loss that trains reads it; pass it too"
                )
        run = as_function(self._jaxpr, eqns, [*given, *invars.values()], outvars)
        return run(*values, *(leaves[name] for name in invars))

    def _reads(self, outvars: Sequence[Atom], given: Sequence[Any]) -> dict[str, Any]:
        """Variables and inputs that are read on the way from some values to others, by name."""
        jaxpr = self._jaxpr.jaxpr
        eqns = _needed(jaxpr.eqns, outvars, given)
        read = {*(var for eqn in eqns for var in variables(eqn.invars)), *variables(outvars)} - set(given)
        return {name: var for var, name in zip(jaxpr.invars, self._traced.names, strict=True) if var in read}


class Growth(NamedTuple):
    """How to get from the frontier of a split to that of one with more frozen layers.

    Attributes:
        run: A function of ``(variables, activations, inputs)``.
        needed: Names of the inputs that it reads.
    """

    run: Callable[..., tuple[jax.Array, ...]]
    needed: frozenset[str]


def partial_eval(traced: LossJaxpr, frozen: Frozen, examples: int, state: Mapping[str, str | None]) -> Split:
    """Splits a loss.

    Args:
        traced: The loss; it already runs as it does when ``frozen`` is frozen.
        frozen: The frozen set.
        examples: Examples in the batch.
        state: Name of the layer, or None if there is none, of inputs and variables that are no parameters.

    Returns:
        The two parts.

    Raises:
        ValueError: If keeping the first part's results would change the loss, or there is nothing worth keeping.
    """
    if examples < 2:
        raise ValueError(
            f"inputs: got a batch of {examples}, expected at least 2 examples, to tell which axis counts them"
        )
    owner = {**frozen.layers.owner, **state}
    invars = dict(zip(traced.closed.jaxpr.invars, traced.names, strict=True))
    changed = changed_variables(
        traced,
        [var for var, name in invars.items() if name in frozen.layers.owner],
        [var for var, name in invars.items() if name.startswith(INPUTS) and name not in owner],
    )
    roles, why = _roles(invars, owner, changed, frozen, examples)
    flat = with_unchanged(partial_inline.opened(traced.closed, roles), traced, changed)
    eqns = inline.needed(flat.jaxpr, flat.jaxpr.outvars)
    known = KnownValues(roles, why, {var: owner.get(name) for var, name in invars.items()}, frozen)
    for eqn in eqns:
        known.follow(eqn)
    known.check_updates(zip(traced.updated, updates_of(traced, flat.jaxpr), strict=True), owner)
    cut = _cut(eqns, flat.jaxpr.outvars, known, examples)
    axes = tuple(known.values[var].axis or Axis(0) for var in cut)
    computed, again = _needed(eqns, cut, ()), _needed(eqns, flat.jaxpr.outvars, cut)
    read = {*(var for eqn in again for var in variables(eqn.invars)), *variables(flat.jaxpr.outvars)}
    price = functools.partial(flops.of_equation, backend=jax.default_backend())
    digest_of = digests.digests(flat, traced.names, [eqn for eqn in eqns if known.is_frozen(eqn)])
    return Split(
        frontier=tuple(_of_one(var, axis, examples) for var, axis in zip(cut, axes, strict=True)),
        digests=tuple(digest_of[var] for var in cut),
        needed=frozenset(name for var, name in invars.items() if var in read and name.startswith(INPUTS)),
        examples=examples,
        frozen_flops=sum(price(eqn).needed for eqn in computed),
        repeated_flops=sum(price(eqn).needed for eqn in again if known.is_frozen(eqn)),
        _traced=traced,
        _jaxpr=jex.ClosedJaxpr(flat.jaxpr.replace(eqns=eqns), flat.consts),
        _cut=tuple(cut),
        _axes=axes,
        _digest_of=digest_of,
        _expensive=frozenset(var for eqn in computed if known.is_expensive(eqn) for var in eqn.outvars),
    )


def _roles(
    invars: Mapping[Var, str],
    owner: Mapping[str, str | None],
    changed: Collection[str],
    frozen: Frozen,
    examples: int,
) -> tuple[Roles, dict[Any, str]]:
    """What the inputs of the loss are, and why some change from step to step."""
    roles, why = Roles(set(), set(), set(), set()), dict[Any, str]()
    for var, name in invars.items():
        layer = owner.get(name)
        if layer is not None and layer not in frozen.names:
            roles.live.add(var)
        elif name in changed:
            roles.varying.add(var)
            why[var] = f"the variable {name!r}, which the loss changes"
        elif layer is not None or not name.startswith(INPUTS):
            roles.frozen.add(var)
        elif name in owner:
            roles.varying.add(var)
            why[var] = f"{name!r}, which belongs to no frozen layer"
        elif var.aval.shape[:1] == (examples,):
            roles.data.add(var)
        else:
            roles.varying.add(var)
            why[var] = f"{name!r}, of shape {var.aval.shape}, in which no axis counts the {examples} examples"
    return roles, why


def _cut(eqns: Sequence[Eqn], outvars: Sequence[Atom], known: KnownValues, examples: int) -> list[Any]:
    """The values at the frontier."""
    costs: dict[Any, int] = {}
    edges, sources, sinks = [], [], [var for var in variables(outvars) if known.has_axis(var)]
    for i, eqn in enumerate(eqns):
        read = [var for var in variables(eqn.invars) if known.has_axis(var)]
        if not known.is_frozen(eqn):
            sinks += read
            continue
        made = [var for var in eqn.outvars if known.has_axis(var)]
        # Fewer values where the bytes are the same.
        costs.update({var: (math.prod(var.aval.shape) * var.aval.dtype.itemsize << 16) + 1 for var in made})
        if known.is_expensive(eqn):
            sources += made
        elif made:
            costs[i] = sum(costs[var] for var in made) + 1  # an equation is no value: never cheaper than its results
            edges += [(var, i) for var in read if var in costs]
            edges += [(i, var) for var in made]
    cut = min_cut(costs, edges, sources, [var for var in sinks if var in costs])
    if not cut:
        raise ValueError(
            "frozen: nothing is worth keeping: no frozen layer works on the batch before an active one does. Freeze "
            "the first layers; if they are, they run inside one operation with active ones (a scan, a function with a "
            "differentiation rule of its own), from which they must be taken out"
        )
    return cut


def _needed(eqns: Sequence[Eqn], outvars: Iterable[Atom], given: Iterable[Any]) -> list[Any]:
    """The equations from ``given`` to ``outvars``, in order."""
    given = set(given)
    wanted = set(variables(outvars)) - given
    kept = []
    for eqn in reversed(eqns):
        if wanted.intersection(eqn.outvars):
            kept.append(eqn)
            wanted.update(var for var in variables(eqn.invars) if var not in given)
    return kept[::-1]


def _of_one(var: Var, axis: Axis, examples: int) -> jax.ShapeDtypeStruct:
    rows = jax.eval_shape(lambda x: _to_rows(x, axis, examples), jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype))
    return jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype)


def _to_rows(x: jax.Array, axis: Axis, examples: int) -> jax.Array:
    """``x`` with the axis of the examples in front, and what was merged into it behind that."""
    x = jnp.moveaxis(x, axis.position, 0)
    return x if axis.inner == 1 else x.reshape((examples, axis.inner, *x.shape[1:]))


def _from_rows(rows: jax.Array, var: Var, axis: Axis) -> jax.Array:
    """The inverse of :func:`_to_rows`, in the dtype of ``var``."""
    x = rows if axis.inner == 1 else rows.reshape((-1, *rows.shape[2:]))
    return jnp.moveaxis(x, 0, axis.position).astype(var.aval.dtype)
