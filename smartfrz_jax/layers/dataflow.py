"""Where a forward function consumes its parameters, read off its jaxpr.

The jaxpr of ``forward(params, *inputs)`` says for any model, whatever library wrote it, in which order the parameters
are used: in the equations in which a value that depends on parameters alone meets one that depends on the data. Casts,
reshapes and re-parameterisations of the weights themselves are therefore looked through.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex

from smartfrz_jax.jaxprs import inline, named_axes, row_axes
from smartfrz_jax.jaxprs.parts import ClosedJaxpr, Eqn, Jaxpr, lookup, variables
from smartfrz_jax.layers import stacks
from smartfrz_jax.layers.lookups import Lookup, with_lookups
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree

_Inner = tuple[Any, list[Any]]

# What comes out of these depends on the data that go in, though the body run once may not show it.
_CONTROL_FLOW = frozenset({"cond", "scan", "while"})


class _Data(frozenset[str]):
    """Tag of a value that depends on the data: the parameters combined with it last, along each way it came.

    A value that depends on parameters alone is tagged with a plain frozenset of their names.
    """


class _Number(frozenset[str]):
    """Tag of one number made of parameters alone, such as a penalty on weights, and of copies of it."""


@dataclasses.dataclass(frozen=True)
class Consumption:
    """The equations that consume each parameter.

    Attributes:
        uses: Ranks of the equations that combine the parameter with data, in order, by parameter name. Ranks are
            tuples, compared lexicographically, that begin with the index in the inlined jaxpr; an equation inside a
            loop ranks below the loop. Backward passes, and penalties on weights, are left out if there are others.
        sources: Parameters combined last with the data that reach the first such equation, by parameter name: those of
            the layer or layers just before.
        merged: Parameters that were combined with the parameter alone, before any data met them, by parameter name: the
            scales of a weight normalisation and the kernel that they scale.
        between: Parameters that are used on the way from the first use of another to its last, and neither before nor
            after, by name of the other: for an embedding that is the classifier too, all the rest.
        stacks: Groups of parameters that one loop reads row by row: the weights of a block that is run many times.
        scans: For each scan its length, whether it runs backwards, and which arrays it reads row by row, with the axis.
        lookups: Those of which the uses are told apart from the others of their table, which it has under their names.
    """

    uses: dict[str, list[tuple[int, ...]]]
    sources: dict[str, frozenset[str]]
    merged: dict[str, frozenset[str]]
    between: dict[str, frozenset[str]]
    stacks: Sequence[frozenset[str]] = ()
    scans: Sequence[row_axes.Scan] = ()
    lookups: Sequence[Lookup] = ()

    @functools.cached_property
    def first(self) -> dict[str, tuple[int, ...]]:
        """Rank of the first equation that combines a parameter with data."""
        return {name: ranks[0] for name, ranks in self.uses.items()}

    @functools.cached_property
    def last(self) -> dict[str, int]:
        """Index, in the inlined jaxpr, of the last such equation."""
        return {name: ranks[-1][0] for name, ranks in self.uses.items()}

    def used_again(self, params: Iterable[str]) -> dict[str, frozenset[str]]:
        """Those of a layer's parameters that are used again behind other layers, with what is used in between."""
        own = frozenset(params)
        others = {name: self.between.get(name, frozenset()) - own for name in own}
        return {name: between for name, between in others.items() if between}


def consumption(
    forward: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    writes: bool = False,
    tables: Collection[str] = (),
) -> Consumption:
    """Finds where ``forward(params, *inputs)`` consumes each parameter. Nothing is computed, only traced.

    Args:
        forward: A JAX-traceable function of ``(params, *inputs)``.
        params: Parameter pytree; arrays or ``jax.ShapeDtypeStruct``.
        *inputs: The data. If none are given, every array that ``forward`` closes over counts as data.
        writes: Whether ``forward`` returns ``params`` too, behind its output, with new values for some: what is only
            written is then consumed where its new value is made.
        tables: Parameters whose lookups are to be told apart from their other uses, if they have both.

    Returns:
        The consuming equations; parameters which the output does not depend on are missing from it.

    Raises:
        ValueError: If ``forward`` computes with none of them, but closes over arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}
        >>> used = consumption(lambda p, x: x @ p["b"] @ p["a"], params, jnp.ones((2, 3)))
        >>> sorted(used.first, key=used.first.get)
        ['b', 'a']
    """
    closed, params_alone = _traced(forward, params, inputs)
    read = {var for eqn in closed.jaxpr.eqns for var in variables(eqn.invars)}
    if closed.consts and read.isdisjoint(closed.jaxpr.invars[: len(params_alone)]):
        raise ValueError(
            "forward: computes with none of the parameters, but with arrays that it closes over, expected a function "
            "that computes with its first argument; pass the parameters on to the network"
        )
    closed, lookups = _apart(closed, params_alone, tables)
    names = [*params_alone, *(lookup.name for lookup in lookups)]
    flat = _inlined(closed, len(names), inputs)
    used = consumed(flat, names, data_is_closed_over=not inputs, written=params_alone if writes else ())
    found = {"stacks": stacks.stacks(closed, names), "scans": row_axes.scans(closed, names), "lookups": lookups}
    return dataclasses.replace(used, **found)


def trace(forward: Callable[..., Any], params: PyTree, inputs: Sequence[Any]) -> tuple[Any, list[str]]:
    """The inlined jaxpr of ``forward(params, *inputs)``, and the names of the parameters, its first arguments."""
    closed, names = _traced(forward, params, inputs)
    return _inlined(closed, len(names), inputs), names


def _traced(forward: Callable[..., Any], params: PyTree, inputs: Sequence[Any]) -> tuple[Any, list[str]]:
    of_arrays, arrays = _without_flags(forward, inputs)
    return named_axes.make_jaxpr(of_arrays)(params, *arrays), list(paths.flatten(params))


def _without_flags(forward: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Callable[..., Any], list[Any]]:
    """``forward`` as a function of the arrays alone, and these; ``True``, ``False`` and texts are what they are."""
    places = [place for place, value in enumerate(inputs) if not isinstance(value, bool | str)]

    def of_arrays(params: PyTree, *arrays: Any) -> Any:
        given = dict(enumerate(inputs)) | dict(zip(places, arrays, strict=True))
        return forward(params, *given.values())

    return of_arrays, [inputs[place] for place in places]


def _apart(closed: ClosedJaxpr, names: Sequence[str], tables: Collection[str]) -> tuple[ClosedJaxpr, list[Lookup]]:
    """The jaxpr with what lookups read behind the parameters, where it has lookups and other uses of a table."""
    name_of = dict(zip(closed.jaxpr.invars, names, strict=False))
    looked_up, found = with_lookups(closed, [var for var, name in name_of.items() if name in tables])
    if not found:
        return closed, []
    invars = list(looked_up.jaxpr.invars)
    params, data, own = invars[: len(names)], invars[len(names) : -len(found)], invars[-len(found) :]
    jaxpr = looked_up.jaxpr.replace(invars=[*params, *own, *data])
    return jex.ClosedJaxpr(jaxpr, looked_up.consts), [Lookup(name_of[var]) for var in found]


def _inlined(closed: ClosedJaxpr, n_params: int, inputs: Sequence[Any]) -> Any:
    data = closed.jaxpr.invars[n_params:] if inputs else closed.jaxpr.constvars
    return inline.inline(closed, closed.jaxpr.invars[:n_params], data)


def consumed(
    closed: ClosedJaxpr, names: Sequence[str], *, data_is_closed_over: bool, written: Sequence[str] = ()
) -> Consumption:
    """As :func:`consumption`, of what :func:`trace` gives; the last outputs are new values of those ``written``."""
    jaxpr = closed.jaxpr
    tags: dict[Any, frozenset[str]] = {}
    tags.update(dict.fromkeys(jaxpr.constvars, _Data() if data_is_closed_over else frozenset()))
    tags.update(zip(jaxpr.invars, [frozenset({name}) for name in names], strict=False))
    tags.update(dict.fromkeys(jaxpr.invars[len(names) :], _Data()))
    uses: dict[str, list[tuple[int, ...]]] = {}
    first: dict[str, _Use] = {}
    for use in _uses(jaxpr, tags):
        if use.name not in uses or not (use.is_number or _is_backward(jaxpr.eqns[use.rank[0]])):
            uses.setdefault(use.name, []).append(use.rank)
            first.setdefault(use.name, use)
    for use in _written(jaxpr, written, tags):
        if use.name not in uses:
            uses[use.name], first[use.name] = [use.rank], use
    sources = {name: use.sources for name, use in first.items()}
    merged = {name: use.merged - {name} for name, use in first.items()}
    return Consumption(uses, sources, merged, _between(jaxpr, uses))


def _written(jaxpr: Jaxpr, names: Sequence[str], tags: Mapping[Any, frozenset[str]]) -> Iterator[_Use]:
    """Where new values are made, of the parameters that are the last outputs."""
    makers = {var: index for index, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    for name, atom in zip(names, jaxpr.outvars[len(jaxpr.outvars) - len(names) :], strict=True):
        tag = lookup(tags, atom, frozenset())
        if not isinstance(atom, jex.Literal) and atom in makers and tag != {name}:
            is_data = isinstance(tag, _Data)
            yield _Use((makers[atom],), name, tag if is_data else frozenset(), frozenset() if is_data else tag, False)


def _is_backward(eqn: Eqn) -> bool:
    return "transpose(" in str(eqn.source_info.name_stack)


def _between(jaxpr: Jaxpr, uses: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, frozenset[str]]:
    found = {}
    for name, ranks in uses.items():
        first, last = ranks[0][0], ranks[-1][0]
        if first == last:
            continue
        inside = {other for other, theirs in uses.items() if first < theirs[0][0] and theirs[-1][0] < last}
        if inside:  # but maybe on another branch, or for another input
            way = _way(jaxpr.eqns, first, last)
            found[name] = frozenset(other for other in inside if any(rank[0] in way for rank in uses[other]))
    return found


def _way(eqns: Sequence[Eqn], first: int, last: int) -> set[int]:
    """Indices of the equations that depend on one equation and that another depends on."""
    after, before = set(eqns[first].outvars), set(variables(eqns[last].invars))
    reached = []
    for index in range(first + 1, last):
        if any(var in after for var in variables(eqns[index].invars)):
            after.update(eqns[index].outvars)
            reached.append(index)
    way = set()
    for index in reversed(reached):
        if any(var in before for var in eqns[index].outvars):
            before.update(variables(eqns[index].invars))
            way.add(index)
    return way


class _Use(NamedTuple):
    """An equation that combines a parameter, or a number made of it, with data."""

    rank: tuple[int, ...]
    name: str
    sources: frozenset[str]
    merged: frozenset[str]
    is_number: bool


def _uses(jaxpr: Jaxpr, tags: dict[Any, frozenset[str]]) -> Iterator[_Use]:
    """Yields every use, in the order of execution; extends ``tags``."""
    for index, eqn in enumerate(jaxpr.eqns):
        ins = [lookup(tags, atom, frozenset()) for atom in eqn.invars]
        data = [tag for tag in ins if isinstance(tag, _Data)]
        on_params = [tag for tag in ins if not isinstance(tag, _Data)]
        weights, sources = _join(on_params), _join(data)
        whole = _join([tag for tag in on_params if not isinstance(tag, _Number)])
        outs = [weights] * len(eqn.outvars)
        if not data:
            reduces = any(var.aval.shape for var in variables(eqn.invars))
            is_number = [not whole or (reduces and not var.aval.shape) for var in eqn.outvars]
            outs = [_Number(weights) if number else weights for number in is_number]
        else:
            rank, results = (index,), []
            for body, args in _bodies(eqn):
                inner = {var: ins[arg] for var, arg in zip(body.invars, args, strict=True)}
                for use in _uses(body, inner):
                    yield use._replace(rank=(index, *use.rank))
                rank = (index, len(body.eqns))
                results.append([lookup(inner, atom, frozenset()) for atom in body.outvars])
            if results:  # what a body does not use, or hands on as it is, it does not consume
                outs = [_join(tags) for tags in zip(*results, strict=True)]
            if not results or eqn.primitive.name in _CONTROL_FLOW:
                for name in sorted(_join([out for out in outs if not isinstance(out, _Data)])):
                    merged = _join([tag for tag in on_params if name in tag and not isinstance(tag, _Number)])
                    yield _Use(rank, name, sources, merged, name not in whole)
                outs = [out if isinstance(out, _Data) else _Data(out or sources) for out in outs]
        tags.update(zip(eqn.outvars, outs, strict=True))


def _join(tags: Sequence[frozenset[str]]) -> frozenset[str]:
    kind = _Data if any(isinstance(tag, _Data) for tag in tags) else frozenset
    return kind(frozenset[str]().union(*tags))


def _bodies(eqn: Eqn) -> Iterator[_Inner]:
    """Jaxprs that an equation runs, each with the positions of the equation's inputs that are its arguments."""
    every = list(range(len(eqn.invars)))
    params = eqn.params
    match eqn.primitive.name:
        case "while":
            n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
            yield params["body_jaxpr"].jaxpr, every[n_cond : n_cond + n_body] + every[n_cond + n_body :]
        case "cond":
            for branch in params["branches"]:
                yield branch.jaxpr, every[1:]
        case _:
            inner = params.get("jaxpr", params.get("call_jaxpr"))
            body = inner.jaxpr if isinstance(inner, jex.ClosedJaxpr) else inner
            sizes = len(every), len(eqn.outvars)
            if hasattr(body, "eqns") and (len(body.invars), len(body.outvars)) == sizes:
                yield body, every
