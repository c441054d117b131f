"""Lookups in a table apart from its other uses, such as the embedding of a network whose head it is too.

A lookup takes some of a table's values (a gather), and a later use of the same table depends on it. What is gathered
for something else, such as the embeddings of the labels in a loss, is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from smartfrz_jax.jaxprs import inline
from smartfrz_jax.jaxprs.parts import Atom, ClosedJaxpr, Eqn, Jaxpr, Var, anonymous, lookup, rewritten, variables
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree

_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
_REMAT = frozenset({"remat2", "checkpoint"})
_TAKING = frozenset({"dynamic_slice", "gather"})
# What comes out of these, if no other variable goes in, is the table still.
_THE_TABLE = frozenset({
    "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "div", "mul", "neg", "pad", "pvary",
    "reduce_precision", "reshape", "sharding_constraint", "slice", "squeeze", "stop_gradient", "transpose",
})  # fmt: skip
_Tables = frozenset[Any]
_NONE: _Tables = frozenset()


class Lookup(NamedTuple):
    """The lookups in a table.

    Attributes:
        array: Name of the table.
    """

    array: str

    @property
    def name(self) -> str:
        """The name under which the table that they read is a parameter.

        Example:
            >>> Lookup("embed/embedding").name
            'embed/embedding[lookup]'
        """
        return f"{self.array}[lookup]"


def apart(function: Callable[..., Any], tables: Collection[str]) -> Callable[..., Any]:
    """A function whose lookups read tables of their own; it is traced once more than without.

    Args:
        function: A JAX-traceable function of ``(params, *args, **kwargs)``.
        tables: Names of the tables, among the parameters.

    Returns:
        A function of ``(params, of_lookups, *args, **kwargs)``: ``of_lookups`` has what lookups read, by name of the
        table.
    """

    def run(params: PyTree, of_lookups: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        named, structure = paths.flatten(params), jax.tree.structure(params)

        def of_leaves(*leaves: Any) -> Any:
            return function(jax.tree.unflatten(structure, leaves), *args, **kwargs)

        def change(closed: ClosedJaxpr) -> tuple[ClosedJaxpr, list[Any]]:
            name_of = dict(zip(closed.jaxpr.invars, named, strict=True))
            closed, looked_up = with_lookups(closed, [var for var, name in name_of.items() if name in tables])
            for table in set(tables).difference(map(name_of.__getitem__, looked_up)):
                raise ValueError(
                    f"loss_fn: has no lookups in {table!r} that can be told from its other uses, expected those that "
                    "the layers were found with; find the layers of this function, or without lookups=True"
                )
            return closed, [*named.values(), *(of_lookups[name_of[var]] for var in looked_up)]

        return rewritten(of_leaves, [*named.values()], change)

    return run


def with_lookups(closed: ClosedJaxpr, tables: Sequence[Var]) -> tuple[ClosedJaxpr, list[Var]]:
    """The same jaxpr with inputs of their own for what lookups read.

    Lookups inside loops other than scans, in what a scan carries or takes a row of, and inside calls with a
    differentiation rule of their own, are none.

    Args:
        closed: A ``ClosedJaxpr``.
        tables: Those of its inputs whose lookups are to be apart.

    Returns:
        A ``ClosedJaxpr`` with further inputs behind the others, and the tables that these are for.
    """
    body = _Body.of(closed, {table: table for table in tables})
    body.mark([_NONE] * len(body.outvars))
    looked_up = body.looked_up()
    return body.changed({table: jex.Var(table.aval) for table in looked_up}), looked_up


@dataclasses.dataclass(eq=False)
class _Node:
    """An equation.

    Attributes:
        eqn: It.
        taken: The table that it takes values of, if it does that.
        bodies: The jaxprs in it that read tables, and may have lookups.
        is_lookup: Whether what it takes reaches another use of the table.
    """

    eqn: Eqn
    taken: Var = None
    bodies: Sequence[_Body] = ()
    is_lookup: bool = False


@dataclasses.dataclass(eq=False)
class _Body:
    """A jaxpr without the calls that only group equations, as far as tables go into these.

    Attributes:
        jaxpr: It, as it was.
        consts: Values of its constants.
        nodes: Its equations.
        outvars: Its results.
        tables: The values that are a table, cast or reshaped maybe, each with the table.
        origin: And with the input that has it.
    """

    jaxpr: Jaxpr
    consts: dict[Var, Any]
    nodes: list[_Node]
    outvars: list[Atom]
    tables: dict[Var, Var]
    origin: dict[Var, Var]

    @classmethod
    def of(cls, closed: ClosedJaxpr, tables: Mapping[Var, Var]) -> _Body:
        """A body.

        Args:
            closed: The jaxpr.
            tables: Those of its inputs that have tables, each with the table.
        """
        body = cls(closed.jaxpr, {}, [], [], dict(tables), {var: var for var in tables})
        body.outvars = body._read(closed, closed.jaxpr.invars, None)
        return body

    def _read(self, closed: ClosedJaxpr, values: Sequence[Atom], call: Eqn | None) -> list[Atom]:
        """Appends the equations of a jaxpr of these values; its results."""
        constants = [jex.Var(var.aval) for var in closed.jaxpr.constvars]
        self.consts.update(zip(constants, closed.consts, strict=True))
        env = dict(zip((*closed.jaxpr.constvars, *closed.jaxpr.invars), (*constants, *values), strict=True))
        for eqn in inline.equations(closed.jaxpr, call):
            invars = [lookup(env, atom, atom) for atom in eqn.invars]
            if eqn.primitive.name in _CALLS and self._read_by(invars):
                outvars = self._read(_closed(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))), invars, eqn)
            else:
                outvars = [jex.Var(var.aval) for var in eqn.outvars]
                self.nodes.append(self._node(eqn.replace(invars=invars, outvars=outvars)))
            env.update(zip(eqn.outvars, outvars, strict=True))
        return [lookup(env, atom, atom) for atom in closed.jaxpr.outvars]

    def _read_by(self, atoms: Iterable[Atom]) -> list[Var]:
        """Those of some values that are tables."""
        return [var for var in variables(atoms) if var in self.tables]

    def _node(self, eqn: Eqn) -> _Node:
        read, name = self._read_by(eqn.invars), eqn.primitive.name
        if len(read) == 1 and name in _THE_TABLE and len(variables(eqn.invars)) == 1:
            self.tables[eqn.outvars[0]], self.origin[eqn.outvars[0]] = self.tables[read[0]], self.origin[read[0]]
        elif len(read) == 1 and name in _TAKING and eqn.invars[0] is read[0]:
            return _Node(eqn, self.tables[read[0]])
        elif read:
            return _Node(eqn, bodies=[self._inner(closed, _unchanged(eqn)) for closed in _bodies(eqn)])
        return _Node(eqn)

    def _inner(self, closed: ClosedJaxpr, values: Sequence[Atom]) -> _Body:
        pairs = zip(closed.jaxpr.invars, values, strict=False)
        return _Body.of(closed, {var: self.tables[atom] for var, atom in pairs if self._read_by([atom])})

    def mark(self, behind: Sequence[_Tables]) -> list[_Tables]:
        """Finds out what is a lookup.

        Args:
            behind: For each result the tables of which another use depends on it.

        Returns:
            The same for each input.
        """
        reached: dict[Any, _Tables] = {}
        _add(reached, self.outvars, behind)
        for node in reversed(self.nodes):
            eqn = node.eqn
            outs = [reached.get(var, _NONE) for var in eqn.outvars]
            if node.bodies:
                _add(reached, _of_body(eqn), _through(node, outs))
                used = self._read_by(_of_body(eqn)[len(_unchanged(eqn)) :])
                _add(reached, eqn.invars, [frozenset(self.tables[var] for var in used)] * len(eqn.invars))
                continue
            node.is_lookup = node.taken is not None and node.taken in _NONE.union(*outs)
            used = [] if node.is_lookup or self._read_by(eqn.outvars) else self._read_by(eqn.invars)
            every = _NONE.union(*outs, {self.tables[var] for var in used})
            _add(reached, eqn.invars, [every] * len(eqn.invars))
        return [reached.get(var, _NONE) for var in self.jaxpr.invars]

    def looked_up(self) -> list[Var]:
        """The inputs with tables that lookups read."""
        read = [node.eqn.invars[0] for node in self.nodes if node.is_lookup]
        read += [_of_body(node.eqn)[position] for node in self.nodes for position in _looked_up(node)]
        found = {self.origin[var] for var in read}
        return [var for var in self.jaxpr.invars if var in found]

    def changed(self, own: Mapping[Var, Var]) -> ClosedJaxpr:
        """The jaxpr with further inputs, ``own``, each by the input with a table in whose place lookups read it."""
        eqns, own, further = [], dict(own), list(own.values())
        env, consts = dict[Any, Any](), dict(self.consts)
        for node in self.nodes:
            eqn = node.eqn.replace(invars=[lookup(env, atom, atom) for atom in node.eqn.invars])
            if _looked_up(node):
                made, outvars = _again(node, eqn, own)
                eqns += made.jaxpr.eqns
                consts.update(zip(made.jaxpr.constvars, made.consts, strict=True))
                env.update(zip(eqn.outvars, outvars, strict=True))
                continue
            eqns.append(eqn.replace(invars=[own[node.eqn.invars[0]], *eqn.invars[1:]]) if node.is_lookup else eqn)
            if self._read_by(eqn.outvars) and self.origin[eqn.outvars[0]] in own:
                (out,) = eqn.outvars
                own[out] = jex.Var(out.aval)
                eqns.append(eqn.replace(invars=[lookup(own, atom, atom) for atom in eqn.invars], outvars=[own[out]]))
        jaxpr = self.jaxpr.replace(
            eqns=eqns,
            constvars=list(consts),
            invars=[*self.jaxpr.invars, *further],
            outvars=[lookup(env, atom, atom) for atom in self.outvars],
            debug_info=anonymous(self.jaxpr),
        )
        return jex.ClosedJaxpr(jaxpr, list(consts.values()))


def _add(reached: dict[Any, _Tables], atoms: Sequence[Atom], tables: Sequence[_Tables]) -> None:
    for atom, each in zip(atoms, tables, strict=True):
        if not isinstance(atom, jex.Literal):
            reached[atom] = reached.get(atom, _NONE) | each


def _bodies(eqn: Eqn) -> list[ClosedJaxpr]:
    """The jaxprs in an equation in which lookups are found: of a scan, a checkpoint or a cond."""
    if eqn.primitive.name == "cond":
        return list(eqn.params["branches"])
    return [_closed(eqn.params["jaxpr"])] if eqn.primitive.name in _REMAT | {"scan"} else []


def _closed(jaxpr: ClosedJaxpr | Jaxpr) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jex.ClosedJaxpr(jaxpr, ())


def _of_body(eqn: Eqn) -> list[Atom]:
    """The inputs of an equation that are those of the jaxprs in it."""
    return eqn.invars[eqn.primitive.name == "cond" :]


def _unchanged(eqn: Eqn) -> list[Atom]:
    """Those of them, the first ones, that are the same whenever the jaxprs run."""
    return eqn.invars[: _scan_sizes(eqn)[0]] if eqn.primitive.name == "scan" else _of_body(eqn)


def _through(node: _Node, outs: list[_Tables]) -> list[_Tables]:
    """For each input of the jaxprs in an equation the tables of which another use depends on it."""
    fixed, carried = _scan_sizes(node.eqn)
    while True:
        found = [body.mark(outs) for body in node.bodies]
        ins = [_NONE.union(*each) for each in zip(*found, strict=True)]
        around = [out | each for out, each in zip(outs, ins[fixed : fixed + carried], strict=False)]
        if around == outs[:carried]:
            return ins
        outs = [*around, *outs[carried:]]


def _looked_up(node: _Node) -> list[int]:
    """Positions of those inputs of the jaxprs in an equation that lookups in these read."""
    return sorted({list(body.jaxpr.invars).index(var) for body in node.bodies for var in body.looked_up()})


def _again(node: _Node, eqn: Eqn, own: Mapping[Var, Var]) -> tuple[ClosedJaxpr, list[Atom]]:
    """An equation made again, with what lookups in its jaxprs read as further inputs of these.

    Args:
        node: The equation as it was.
        eqn: The same with inputs that may be others.
        own: What lookups read in place of tables.

    Returns:
        A jaxpr with the equations that take its place, and its results.
    """
    at, params, name = _looked_up(node), eqn.params, eqn.primitive.name
    n_own = len(at)

    def as_function(body: _Body) -> Callable[..., list[jax.Array]]:
        further = {body.jaxpr.invars[i]: jex.Var(body.jaxpr.invars[i].aval) for i in at}
        return jex.jaxpr_as_fun(body.changed(further))

    functions = [as_function(body) for body in node.bodies]
    fixed, carried = _scan_sizes(eqn)

    def run(*values: jax.Array) -> Sequence[jax.Array]:
        of_body, tables = values[:-n_own], values[-n_own:]
        if name == "cond":
            return jax.lax.switch(of_body[0], functions, *of_body[1:], *tables)
        if name in _REMAT:
            options = {option: params[option] for option in ("policy", "prevent_cse")}
            return jax.checkpoint(functions[0], **options)(*of_body, *tables)

        def of_row(carry: Sequence[jax.Array], row: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
            outs = functions[0](*of_body[:fixed], *carry, *row, *tables)
            return outs[:carried], outs[carried:]

        carry, rows = list(of_body[fixed : fixed + carried]), list(of_body[fixed + carried :])
        options = {option: params[option] for option in ("length", "reverse", "unroll")}
        carry, outs = jax.lax.scan(of_row, carry, rows, **options)
        return [*carry, *outs]

    invars = [*eqn.invars, *(own[_of_body(node.eqn)[i]] for i in at)]
    closed = jax.make_jaxpr(run)(*(atom.aval for atom in invars))
    env = dict(zip(closed.jaxpr.invars, invars, strict=True))
    eqns = [each.replace(invars=[lookup(env, atom, atom) for atom in each.invars]) for each in closed.jaxpr.eqns]
    made = jex.ClosedJaxpr(closed.jaxpr.replace(eqns=eqns), closed.consts)
    return made, [lookup(env, atom, atom) for atom in closed.jaxpr.outvars]


def _scan_sizes(eqn: Eqn) -> tuple[int, int]:
    """Numbers of inputs of a scan that are the same in each iteration, and that are carried; 0 of other equations."""
    if eqn.primitive.name != "scan":
        return 0, 0
    n_sliced, n_stacked = inline.scan_sizes(eqn)
    carried = len(eqn.outvars) - n_stacked
    return len(eqn.invars) - n_sliced - carried, carried
