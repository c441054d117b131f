"""Where a forward function consumes its parameters, read off its jaxpr.

The jaxpr of ``forward(params, *inputs)`` answers two questions for any model, whatever library wrote it: in which order
are the parameters used (:func:`consumption`), and what does each layer put out (:func:`tapped`)? Both look for the
equations in which a value that depends on parameters alone meets one that depends on the data. Casts, reshapes and
re-parameterisations of the weights themselves are therefore looked through.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from smartfrz_jax import example_axis, inlining, paths
from smartfrz_jax.example_rules import Axis

PyTree = Any
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
        between: Parameters that are used on the way from the first use of another to its last, and neither before nor
            after, by name of the other: for an embedding that is the classifier too, all the rest.
    """

    uses: dict[str, list[tuple[int, ...]]]
    sources: dict[str, frozenset[str]]
    between: dict[str, frozenset[str]]

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


def consumption(forward: Callable[..., Any], params: PyTree, *inputs: Any) -> Consumption:
    """Finds where ``forward(params, *inputs)`` consumes each parameter. Nothing is computed, only traced.

    Args:
        forward: A JAX-traceable function of ``(params, *inputs)``.
        params: Parameter pytree; arrays or ``jax.ShapeDtypeStruct``.
        *inputs: The data. If none are given, every array that ``forward`` closes over counts as data.

    Returns:
        The consuming equations; parameters which the output does not depend on are missing from it.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}
        >>> used = consumption(lambda p, x: x @ p["b"] @ p["a"], params, jnp.ones((2, 3)))
        >>> sorted(used.first, key=used.first.get)
        ['b', 'a']
    """
    return _consumption(*_trace(forward, params, inputs), data_is_closed_over=not inputs)


def tapped(
    forward: Callable[..., Any], groups: Mapping[str, Iterable[str]], params: PyTree, *inputs: Any
) -> Callable[..., dict[str, jax.Array]]:
    """A function of ``(params, *inputs)`` that returns the output of each group of parameters (of each layer).

    The output of a group is that of the last equation that combines one of its parameters with data: after the bias,
    and after the normalisation where that belongs to the group. Of a group that is used again behind others, as an
    embedding that is the classifier too, it is the output of its first use. Which axis of it counts the examples is
    followed from the inputs, and put in front. Only what the outputs need is computed.

    Args:
        forward: A JAX-traceable function of ``(params, *inputs)``; the first axis of its first input that has one
            counts the examples, in the other inputs the first axis does if it is as long.
        groups: Names of the parameters of each group, by group name.
        params: Parameter pytree, arrays or ``jax.ShapeDtypeStruct``.
        *inputs: Data, or ``jax.ShapeDtypeStruct``, of the shapes with which the function will be called.

    Returns:
        A traceable function that gives, by group name, an array of shape ``(examples, ...)``. It is specialised on the
        shapes of ``params`` and ``inputs``.

    Raises:
        ValueError: If a group's parameters are never combined with data, no axis of its output, or of what follows
            from it, counts the examples, or no input is given.

    Example:
        >>> import jax.numpy as jnp
        >>> params, x = {"w": jnp.ones((8, 3))}, jnp.ones((4, 3))
        >>> tapped(lambda p, x: p["w"] @ x.T, {"w": ["w"]}, params, x)(params, x)["w"].shape
        (4, 8)
    """
    if not inputs:
        raise ValueError("inputs: got none; layer outputs belong to a batch, so pass forward's inputs after params")
    jaxpr, names = _trace(forward, params, inputs)
    used = _consumption(jaxpr, names, data_is_closed_over=False)
    examples = example_axis.count(inputs)
    known = _axes(jaxpr.jaxpr, len(names), examples)
    outvars, axes = [], []
    for group, members in groups.items():
        members = [member for member in members if member in used.uses]
        if not members:
            raise ValueError(f"forward: does not use any parameter of layer {group!r}, so that layer has no output")
        outvar, axis = _output(jaxpr.jaxpr, _end(used, members), known, group, examples)
        outvars.append(outvar)
        axes.append(axis)
    kept = inlining.needed(jaxpr.jaxpr, outvars)
    run = _as_function(jaxpr, kept, outvars)

    def outputs(params: PyTree, *inputs: Any) -> dict[str, jax.Array]:
        values = run(*jax.tree.leaves((params, inputs)))
        in_front = [jnp.moveaxis(value, axis.position, 0) for value, axis in zip(values, axes, strict=True)]
        return {
            group: value.reshape((examples, -1)) if value.shape[0] != examples else value
            for group, value in zip(groups, in_front, strict=True)
        }

    return outputs


def _trace(forward: Callable[..., Any], params: PyTree, inputs: Sequence[Any]) -> tuple[Any, list[str]]:
    closed = jax.make_jaxpr(forward)(params, *inputs)
    names = list(paths.flatten(params))
    data = closed.jaxpr.invars[len(names) :] if inputs else closed.jaxpr.constvars
    return inlining.inline(closed, closed.jaxpr.invars[: len(names)], data), names


def _consumption(closed: Any, names: Sequence[str], *, data_is_closed_over: bool) -> Consumption:
    jaxpr = closed.jaxpr
    tags: dict[Any, frozenset[str]] = {}
    tags.update(dict.fromkeys(jaxpr.constvars, _Data() if data_is_closed_over else frozenset()))
    tags.update(zip(jaxpr.invars, [frozenset({name}) for name in names], strict=False))
    tags.update(dict.fromkeys(jaxpr.invars[len(names) :], _Data()))
    uses: dict[str, list[tuple[int, ...]]] = {}
    first_sources: dict[str, frozenset[str]] = {}
    for rank, name, sources, is_number in _uses(jaxpr, tags):
        if name not in uses or not (is_number or _is_backward(jaxpr.eqns[rank[0]])):
            uses.setdefault(name, []).append(rank)
            first_sources.setdefault(name, sources)
    return Consumption(uses, first_sources, _between(jaxpr, uses))


def _is_backward(eqn: Any) -> bool:
    return "transpose(" in str(eqn.source_info.name_stack)


def _between(jaxpr: Any, uses: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, frozenset[str]]:
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


def _way(eqns: Sequence[Any], first: int, last: int) -> set[int]:
    """Indices of the equations that depend on one equation and that another depends on."""
    after, before = set(eqns[first].outvars), set(_variables(eqns[last]))
    reached = []
    for index in range(first + 1, last):
        if any(var in after for var in _variables(eqns[index])):
            after.update(eqns[index].outvars)
            reached.append(index)
    way = set()
    for index in reversed(reached):
        if any(var in before for var in eqns[index].outvars):
            before.update(_variables(eqns[index]))
            way.add(index)
    return way


def _variables(eqn: Any) -> Iterator[Any]:
    return (atom for atom in eqn.invars if not isinstance(atom, jex.Literal))


class _Use(NamedTuple):
    """An equation that combines a parameter, or a number made of it, with data."""

    rank: tuple[int, ...]
    name: str
    sources: frozenset[str]
    is_number: bool


def _uses(jaxpr: Any, tags: dict[Any, frozenset[str]]) -> Iterator[_Use]:
    """Yields every use, in the order of execution; extends ``tags``."""
    for index, eqn in enumerate(jaxpr.eqns):
        ins = [_tag(tags, atom) for atom in eqn.invars]
        data = [tag for tag in ins if isinstance(tag, _Data)]
        on_params = [tag for tag in ins if not isinstance(tag, _Data)]
        weights, sources = _join(on_params), _join(data)
        whole = _join([tag for tag in on_params if not isinstance(tag, _Number)])
        outs = [weights] * len(eqn.outvars)
        if not data:
            reduces = any(var.aval.shape for var in _variables(eqn))
            is_number = [not whole or (reduces and not var.aval.shape) for var in eqn.outvars]
            outs = [_Number(weights) if number else weights for number in is_number]
        else:
            rank, results = (index,), []
            for body, args in _bodies(eqn):
                inner = {var: ins[arg] for var, arg in zip(body.invars, args, strict=True)}
                for use in _uses(body, inner):
                    yield use._replace(rank=(index, *use.rank))
                rank = (index, len(body.eqns))
                results.append([_tag(inner, atom) for atom in body.outvars])
            if results:  # what a body does not use, or hands on as it is, it does not consume
                outs = [_join(tags) for tags in zip(*results, strict=True)]
            if not results or eqn.primitive.name in _CONTROL_FLOW:
                for name in sorted(_join([out for out in outs if not isinstance(out, _Data)])):
                    yield _Use(rank, name, sources, name not in whole)
                outs = [out if isinstance(out, _Data) else _Data(out or sources) for out in outs]
        tags.update(zip(eqn.outvars, outs, strict=True))


def _tag(tags: dict[Any, frozenset[str]], atom: Any) -> frozenset[str]:
    return frozenset() if isinstance(atom, jex.Literal) else tags.get(atom, frozenset())


def _join(tags: Sequence[frozenset[str]]) -> frozenset[str]:
    kind = _Data if any(isinstance(tag, _Data) for tag in tags) else frozenset
    return kind(frozenset[str]().union(*tags))


def _bodies(eqn: Any) -> Iterator[_Inner]:
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


def _end(used: Consumption, members: Sequence[str]) -> int:
    """Index of the equation with which a group ends: the last use before those that are for another time."""
    again = used.used_again(members).values()
    until = min((used.first[other] for between in again for other in between), default=None)
    ranks = [rank for member in members for rank in used.uses[member]]
    return max(rank for rank in ranks if until is None or rank < until)[0]


def _axes(jaxpr: Any, n_params: int, examples: int) -> dict[Any, Axis | str]:
    """The axis of the examples, or why there is none, of every value that depends on the batch."""
    if examples == 1:
        values = [*jaxpr.invars[n_params:], *(var for eqn in jaxpr.eqns for var in eqn.outvars)]
        return {var: Axis(0) for var in values if var.aval.shape}
    batch = [var for var in jaxpr.invars[n_params:] if var.aval.shape[:1] == (examples,)]
    # An input may be as long by chance. What depends on the first goes by the first.
    known: dict[Any, Axis | str] = {}
    for counting in (batch, batch[:1]):
        given = [Axis(0) if var in counting else None for var in jaxpr.invars]
        found = example_axis.axes(jaxpr, given)
        known |= {var: axis for var, axis in found.items() if isinstance(axis, Axis) or var not in known}
    return known


def _output(jaxpr: Any, index: int, known: Mapping[Any, Axis | str], group: str, examples: int) -> tuple[Any, Axis]:
    """First value at or after equation ``index``, and depending on it, with an axis that counts the examples."""
    follow: set[Any] = set()
    for eqn in jaxpr.eqns[index:]:
        if not follow or any(var in follow for var in _variables(eqn)):
            for var in eqn.outvars:
                axis = known.get(var)
                if isinstance(axis, Axis):
                    return var, axis
            follow.update(eqn.outvars)
    why = next((known[var] for var in jaxpr.eqns[index].outvars if var in known), "it depends on no example")
    raise ValueError(
        f"inputs: the batch has {examples} examples, but no axis of the output of layer {group!r}, or of what follows "
        f"from it, counts them ({why}); pass a forward function that gives a result for each example, and let the "
        "first axis of the first input count them"
    )


def _as_function(closed: Any, eqns: Sequence[Any], outvars: Sequence[Any]) -> Callable[..., list[Any]]:
    jaxpr = closed.jaxpr
    info = jex.DebugInfo(jaxpr.debug_info.traced_for, jaxpr.debug_info.func_src_info, None, None)
    jaxpr = jaxpr.replace(eqns=list(eqns), outvars=list(outvars), debug_info=info)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, closed.consts))
