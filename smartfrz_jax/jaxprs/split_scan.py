"""Splits the scans over stacked weights of which some rows are frozen, into runs of rows that are frozen alike.

The gradient of what a scan runs over is computed in full as soon as one row of it is wanted. In runs of frozen rows the
weights are constants instead: no gradients of them, and in a run at the front no backward pass at all. Where the
gradient of what goes into a run is not wanted, its first row runs on its own, for a loop would compute it. Rows that
freeze by turns, as every other does, are one run, of periods.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from smartfrz_jax.jaxprs import flops, inline, row_axes, row_flags
from smartfrz_jax.jaxprs.parts import Atom, ClosedJaxpr, Eqn, Jaxpr, anonymous, lookup, variables

_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
_REMAT = frozenset({"remat2", "checkpoint"})


class Stacked(NamedTuple):
    """A stacked input.

    Attributes:
        axis: The axis along which its rows are stacked.
        frozen: Whether each row is frozen.
    """

    axis: int
    frozen: tuple[bool, ...]


def split(closed: ClosedJaxpr, stacks: Mapping[Any, Stacked], live: Collection[Any]) -> ClosedJaxpr:
    """The same jaxpr with scans over stacked weights split into runs.

    Values are those of the whole scan, up to the rounding of what XLA compiles apart. A scan inside a loop, or inside a
    call with a differentiation rule of its own, stays whole.

    Args:
        closed: A ``ClosedJaxpr``.
        stacks: Those of its inputs that are stacked, and of which some rows train. Derivatives with respect to the
            others must be left out, or be zero, before: here they are where a scan reads the rows, and only there.
        live: Those of its inputs that derivatives are wanted for; stacked ones need not be among them.

    Returns:
        A ``ClosedJaxpr`` with the same inputs and outputs.
    """
    splitter, env = _Splitter(stacks, live), dict[Any, Any]()
    splitter.run(row_flags.resolved(closed.jaxpr, None), env)
    outvars = [lookup(env, var, var) for var in closed.jaxpr.outvars]
    return jex.ClosedJaxpr(closed.jaxpr.replace(eqns=splitter.eqns, outvars=outvars), closed.consts)


class _Run(NamedTuple):
    """Consecutive rows of a scan that are frozen alike, or of which as many as a period has are so by turns.

    Attributes:
        rows: Them.
        frozen: For each row of a period whether each value that is run over is of frozen rows alone.
        in_place: Whether no derivative passes. Rows are then read where they lie, and not sliced off together.
    """

    rows: range
    frozen: tuple[tuple[bool, ...], ...]
    in_place: bool


class _Splitter:
    """The equations so far; of which stacks each value has the rows; and which depend on what trains."""

    def __init__(self, stacks: Mapping[Any, Stacked], live: Collection[Any]):
        self.eqns: list[Eqn] = []
        self._stacks = stacks
        self._axes = {var: _rows_alone(var, stack) for var, stack in stacks.items()}
        self._live = {*live, *stacks}
        self._otherwise = set(live).difference(stacks)  # what depends on that not row by row alone

    def run(self, jaxpr: Jaxpr, env: dict[Any, Any], call: Eqn | None = None) -> None:
        """Appends the equations of ``jaxpr``, whose inputs are found in ``env``; adds its other values to ``env``."""
        for eqn in inline.equations(jaxpr, call):
            invars = [lookup(env, var, var) for var in eqn.invars]
            name, body = eqn.primitive.name, inline.body_of(eqn)
            if name in _CALLS and body is not None and self._matters(invars):
                outs = self._call(body, invars, eqn)
            elif name in _REMAT and self._matters(invars):
                outs = self._checkpointed(eqn, body, invars)
            elif name == "scan" and body is not None and self._is_over_rows(eqn, invars):
                outs = self._scanned(eqn, invars)
            else:
                outs = self._append(eqn, invars)
            env.update(zip(eqn.outvars, outs, strict=True))

    def _matters(self, invars: Sequence[Atom]) -> bool:
        """Whether there may be a scan over rows in a call, or results of it have rows of a stack."""
        return any(var in self._axes for var in variables(invars))

    def _call(self, body: Jaxpr, invars: Sequence[Atom], call: Eqn | None) -> list[Any]:
        env = dict(zip(body.invars, invars, strict=True))
        self.run(body, env, call)
        return [lookup(env, var, var) for var in body.outvars]

    def _emit(self, call: Eqn | None, function: Callable[..., Any], invars: Sequence[Atom]) -> list[Any]:
        """Appends the equations of a function of these values."""
        return self._call(jax.make_jaxpr(function)(*(var.aval for var in invars)).jaxpr, invars, call)

    def _append(self, eqn: Eqn, invars: list[Atom]) -> list[Any]:
        outvars = [jex.Var(var.aval) for var in eqn.outvars]
        eqn = eqn.replace(invars=invars, outvars=outvars)
        self.eqns.append(eqn)
        axes = [lookup(self._axes, atom) for atom in invars]
        found = [()] * len(outvars) if row_flags.inner_jaxprs(eqn) else row_axes.through(eqn, axes)
        self._axes.update((var, of_var) for var, of_var in zip(outvars, found, strict=True) if any(of_var))
        live = [var for var in variables(invars) if var in self._live]
        for var, of_var in zip(outvars, found, strict=True):
            if live and flops.is_differentiable(eqn) and jnp.issubdtype(flops.shape_of(var).dtype, jnp.inexact):
                self._live.add(var)
                read = _sources(of_var)
                if any(each in self._otherwise or not read >= _sources(self._axes[each]) for each in live):
                    self._otherwise.add(var)
        return outvars

    def _checkpointed(self, eqn: Eqn, body: Jaxpr, invars: list[Atom]) -> list[Any]:
        """A checkpoint, with the scans inside it split."""
        inner = [jex.Var(var.aval) for var in body.invars]
        for var, atom in zip(inner, invars, strict=True):
            for known in (self._live, self._otherwise):
                known.update([var] if not isinstance(atom, jex.Literal) and atom in known else [])
            if (axes := lookup(self._axes, atom)) is not None:
                self._axes[var] = axes
        outer, self.eqns = self.eqns, []
        results = self._call(body, inner, None)
        names = {"eqns": self.eqns, "invars": inner, "outvars": results, "debug_info": anonymous(body)}
        self.eqns = outer
        return self._append(eqn.replace(params={**eqn.params, "jaxpr": body.replace(**names)}), invars)

    def _is_over_rows(self, eqn: Eqn, invars: Sequence[Atom]) -> bool:
        n_sliced, _ = inline.scan_sizes(eqn)
        axes = [lookup(self._axes, atom) for atom in invars[len(invars) - n_sliced :]]
        return any(each is not None and each[0] for each in axes)

    def _scanned(self, eqn: Eqn, invars: list[Atom]) -> list[Any]:
        n_sliced, n_stacked = inline.scan_sizes(eqn)
        n_carry = len(eqn.outvars) - n_stacked
        n_fixed = len(invars) - n_sliced - n_carry
        fixed, carry, sliced = invars[:n_fixed], invars[n_fixed : n_fixed + n_carry], invars[n_fixed + n_carry :]
        stacked: dict[int, list[Any]] = {}
        runs = self._runs(eqn, fixed, carry, sliced)
        pieces = self._pieces(eqn, sorted((run.rows for run in runs), key=lambda rows: rows.start), sliced)
        for run in runs:
            function = functools.partial(_run, eqn, run, (n_fixed, n_carry))
            over = sliced if run.in_place else pieces[run.rows.start]
            outs = self._emit(eqn, function, [*fixed, *carry, *over])
            carry, stacked[run.rows.start] = outs[:n_carry], outs[n_carry:]
        parts = zip(*(stacked[start] for start in sorted(stacked)), strict=True)
        return [*carry, *(self._emit(eqn, lambda *ys: jnp.concatenate(ys), list(ys))[0] for ys in parts)]

    def _pieces(self, eqn: Eqn, runs: Sequence[range], sliced: Sequence[Atom]) -> dict[int, list[Any]]:
        """What a scan runs over, cut into runs, by the first row; the derivative of a cut is one array, not a sum."""
        sizes = [len(rows) for rows in runs]
        cut = [self._emit(eqn, lambda x: jax.lax.split(x, sizes), [atom]) for atom in sliced]
        return {rows.start: [parts[at] for parts in cut] for at, rows in enumerate(runs)}

    def _runs(self, eqn: Eqn, fixed: Sequence[Atom], carry: Sequence[Atom], sliced: Sequence[Atom]) -> list[_Run]:
        """The runs of a scan, in the order in which it runs."""
        length = eqn.params["length"]
        frozen = [self._frozen(atom, length) for atom in sliced]
        flags = sorted(row_flags.flags(eqn.params["jaxpr"].jaxpr))
        kinds = list(zip(*frozen, *flags, strict=True))
        live = [not isinstance(atom, jex.Literal) and atom in self._live for atom in sliced]
        carries = any(var in self._live for var in variables(carry))
        is_fixed_live = any(var in self._live for var in variables(fixed))
        runs: list[_Run] = []
        order, at = range(length)[:: -1 if eqn.params["reverse"] else 1], 0

        def append(count: int, period: int, *, in_place: bool) -> int:
            rows = sorted(order[at : at + count])
            frozen = tuple(tuple(kinds[row][: len(sliced)]) for row in rows[:period])
            runs.append(_Run(range(rows[0], rows[-1] + 1), frozen, in_place))
            return at + count

        for kind, group in itertools.groupby(order, kinds.__getitem__):
            if carries:
                break
            carries = is_fixed_live or any(a and not b for a, b in zip(live, kind, strict=False))
            at = append(1 if carries else len(list(group)), 1, in_place=not carries)
        for period, times in _periods([kinds[row] for row in order[at:]]):
            at = append(period * times, period, in_place=False)
        return runs

    def _frozen(self, atom: Atom, length: int) -> tuple[bool, ...]:
        """For each row whether a value that is run over is of frozen rows alone."""
        axes = lookup(self._axes, atom)
        if axes is None or atom in self._otherwise or _sources(axes) != _sources(axes[:1]):
            return (False,) * length
        return tuple(all(self._stacks[var].frozen[row] for var in _sources(axes)) for row in range(length))


def _rows_alone(var: Any, stack: Stacked) -> row_axes.Axes:
    axes = row_axes.of_array(var, len(var.aval.shape))
    return tuple(each if at == stack.axis else frozenset() for at, each in enumerate(axes))


def _sources(axes: row_axes.Axes) -> frozenset[Any]:
    """The stacks that a value has rows of."""
    return frozenset(var for of_axis in axes for var, _ in of_axis)


def _periods(kinds: Sequence[Any]) -> list[tuple[int, int]]:
    """How to run through rows of these kinds so that the fewest are compiled: lengths of periods, and how often each.

    Example:
        >>> _periods("aabababc")
        [(1, 1), (2, 3), (1, 1)]
    """
    best: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]  # for each number of last rows
    for start in reversed(range(len(kinds))):
        rest, found = len(kinds) - start, []
        for period in range(1, rest // 2 + 1):
            times = 1
            while kinds[start : start + period] == kinds[start + times * period : start + (times + 1) * period]:
                times += 1
                found.append((period, times))
        options = [(1, 1), *found]
        costs = [period + best[rest - period * times][0] for period, times in options]
        cost, (period, times) = min(zip(costs, options, strict=True), key=lambda each: (each[0], each[1][0]))
        best.append((cost, [(period, times), *best[rest - period * times][1]]))
    return best[-1][1]


def _run(eqn: Eqn, run: _Run, sizes: tuple[int, int], *values: jax.Array) -> list[jax.Array]:
    """One run of a scan, over its rows or, in place, over the whole arrays: its carry, and what it stacks."""
    n_fixed, n_carry = sizes
    fixed, carry, sliced = values[:n_fixed], values[n_fixed : n_fixed + n_carry], values[n_fixed + n_carry :]
    start, period = run.rows.start, len(run.frozen)
    bodies = [row_flags.resolved(eqn.params["jaxpr"].jaxpr, start + at) for at in range(period)]
    steps = [jex.jaxpr_as_fun(jex.ClosedJaxpr(body, ())) for body in bodies]
    parts = [_parts(x, period) for x in sliced]
    over = [
        [jax.lax.stop_gradient(x[at]) if is_frozen else x[at] for x, is_frozen in zip(parts, frozen, strict=True)]
        for at, frozen in enumerate(run.frozen)
    ]

    def of_period(carry: Sequence[jax.Array], rows: Any) -> tuple[list[jax.Array], list[list[jax.Array]]]:
        if run.in_place:
            rows = [[jax.lax.dynamic_index_in_dim(x, rows, keepdims=False) for x in over[0]]]
        outs: list[list[jax.Array]] = [[]] * period
        for at in range(period)[:: -1 if eqn.params["reverse"] else 1]:
            results = steps[at](*fixed, *carry, *rows[at])
            carry, outs[at] = results[:n_carry], results[n_carry:]
        return list(carry), outs

    if len(run.rows) == 1:
        carried, outs = of_period(carry, start if run.in_place else [[x[0] for x in over[0]]])
        return [*carried, *(y[None] for y in outs[0])]
    options = {name: eqn.params[name] for name in ("reverse", "unroll")}
    indices = jnp.arange(start, run.rows.stop)
    length = len(run.rows) // period
    carried, outs = jax.lax.scan(of_period, list(carry), indices if run.in_place else over, length=length, **options)
    return [*carried, *map(_together, zip(*outs, strict=True))]


def _parts(x: jax.Array, period: int) -> list[jax.Array]:
    """The first row of each period, the second, and so on; the derivative is one array, not a sum."""
    if period == 1:
        return [x]
    parts = jax.lax.split(x.reshape(-1, period, *x.shape[1:]), (1,) * period, axis=1)
    return [jax.lax.squeeze(part, (1,)) for part in parts]


def _together(parts: Sequence[jax.Array]) -> jax.Array:
    """What :func:`_parts` takes apart."""
    return parts[0] if len(parts) == 1 else jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
