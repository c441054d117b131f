"""A flat jaxpr in which what trains is kept apart from what does not, and otherwise as few calls opened as possible.

Unlike :mod:`smartfrz_jax.jaxprs.inline`, which is for looking at a jaxpr, this is for running it: blocks that train
keep their ``jax.checkpoint`` and stay in their scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex

from smartfrz_jax.jaxprs import inline
from smartfrz_jax.jaxprs.parts import Atom, ClosedJaxpr, Eqn, Jaxpr, anonymous, lookup, variables

_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
_REMAT = frozenset({"remat2", "checkpoint"})


class Roles(NamedTuple):
    """The inputs of a jaxpr, by what they are.

    Attributes:
        frozen: Parameters and other variables that never change.
        live: Those that train.
        varying: What changes from step to step otherwise.
        data: The batch.
    """

    frozen: set[Any]
    live: set[Any]
    varying: set[Any]
    data: set[Any]


def opened(closed: ClosedJaxpr, roles: Roles) -> Any:
    """The same jaxpr with every equation that does not depend on changing values outside of calls that do.

    A ``jax.checkpoint`` over both is left with what depends on changing values. A scan over frozen and live weights
    together is unrolled; then all scans over weights are, and nothing is checkpointed any more.

    Args:
        closed: A ``ClosedJaxpr``.
        roles: What its inputs are.

    Returns:
        A ``ClosedJaxpr`` with the same inputs and outputs, every variable bound once.
    """
    opener = _Opener(roles)
    env: dict[Any, Any] = {}
    opener.run(closed.jaxpr, env, opener.eqns)
    if opener.is_mixed:
        closed = inline.inline(closed, [*roles.frozen, *roles.live], roles.data)
        opener, env = _Opener(roles), {}
        opener.run(closed.jaxpr, env, opener.eqns)
    outvars = [lookup(env, var, var) for var in closed.jaxpr.outvars]
    return jex.ClosedJaxpr(closed.jaxpr.replace(eqns=opener.eqns, outvars=outvars), closed.consts)


class _Opener:
    """The equations so far, and on what each value depends."""

    def __init__(self, roles: Roles):
        self.eqns: list[Eqn] = []
        self.is_mixed = False
        self._on = Roles(*map(set, roles))

    def run(self, jaxpr: Jaxpr, env: dict[Any, Any], live_eqns: list[Eqn]) -> None:
        """Appends the equations of ``jaxpr``: to ``live_eqns`` those that depend on changing values."""
        for eqn in jaxpr.eqns:
            invars = [lookup(env, var, var) for var in eqn.invars]
            name, body = eqn.primitive.name, inline.body_of(eqn)
            is_live = any(var in self._on.live or var in self._on.varying for var in variables(invars))
            if body is not None and (name in _CALLS or (name in _REMAT and not is_live)):
                inner = dict(zip(body.invars, invars, strict=True))
                self.run(body, inner, live_eqns)
                outs = [lookup(inner, var, var) for var in body.outvars]
            elif body is not None and name in _REMAT:
                outs = self._checkpointed(eqn, body, invars, live_eqns)
            else:
                self.is_mixed |= name == "scan" and self._is_over_both(eqn, invars)
                outs = self._append(eqn, invars, live_eqns if is_live else self.eqns)
            env.update(zip(eqn.outvars, outs, strict=True))

    def _append(self, eqn: Eqn, invars: list[Atom], eqns: list[Eqn]) -> list[Any]:
        outvars = [jex.Var(var.aval) for var in eqn.outvars]
        eqns.append(eqn.replace(invars=invars, outvars=outvars))
        self._follow(variables(invars), outvars)
        return outvars

    def _checkpointed(self, eqn: Eqn, body: Jaxpr, invars: list[Atom], live_eqns: list[Eqn]) -> list[Any]:
        inner, rest = dict(zip(body.invars, invars, strict=True)), list[Any]()
        self.run(body, inner, rest)
        outs = [lookup(inner, var, var) for var in body.outvars]
        made = {var for part in rest for var in part.outvars}
        ins = dict.fromkeys(var for part in rest for var in variables(part.invars) if var not in made)
        remade = list(dict.fromkeys(var for var in variables(outs) if var in made))
        body = body.replace(eqns=rest, invars=list(ins), outvars=remade, debug_info=anonymous(body))
        outer = {var: jex.Var(var.aval) for var in remade}
        for var in remade:
            self._follow([var], [outer[var]])
        params = {**eqn.params, "jaxpr": body}
        live_eqns.append(eqn.replace(invars=list(ins), outvars=list(outer.values()), params=params))
        return [lookup(outer, var, var) for var in outs]

    def _follow(self, invars: Sequence[Atom], outvars: Sequence[Atom]) -> None:
        for reached in self._on:
            if any(var in reached for var in invars):
                reached.update(outvars)

    def _is_over_both(self, eqn: Eqn, invars: list[Atom]) -> bool:
        """Whether a scan runs over values of which some change and others do not."""
        n_sliced, _ = inline.scan_sizes(eqn)
        on = self._on
        sliced = [var for var in variables(invars[len(invars) - n_sliced :]) if var not in on.data]
        if any(var in on.live for var in variables(invars)):
            return any(var in on.frozen and var in on.live for var in sliced)
        return any(var in on.frozen for var in sliced) and any(var in on.varying for var in sliced)
