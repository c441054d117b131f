"""Where a forward function consumes its parameters, read off its jaxpr.

The jaxpr of ``forward(params, *inputs)`` answers two questions for any model, whatever library wrote it: in which order
are the parameters used (:func:`consumption`), and what does each layer put out (:func:`tapped`)? Both look for the
equations in which a value that depends on parameters alone meets one that depends on the data. Casts, reshapes and
re-parameterisations of the weights themselves are therefore looked through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from smartfrz_jax import inlining, paths

PyTree = Any
_Inner = tuple[Any, list[Any]]

# What comes out of these depends on the data that go in, though the body run once may not show it.
_CONTROL_FLOW = frozenset({"cond", "scan", "while"})


class _Data(frozenset[str]):
    """Tag of a value that depends on the data: the parameters combined with it last, along each way it came.

    A value that depends on parameters alone is tagged with a plain frozenset of their names.
    """


@dataclasses.dataclass(frozen=True)
class Consumption:
    """The equations that consume each parameter.

    Attributes:
        first: Rank of the first equation that combines the parameter with data, by parameter name. Ranks are tuples,
            compared lexicographically; an equation inside a loop ranks below the loop.
        last: Index, in the inlined jaxpr, of the last such equation.
        sources: Parameters combined last with the data that reach the first such equation, by parameter name: those of
            the layer or layers just before.
    """

    first: dict[str, tuple[int, ...]]
    last: dict[str, int]
    sources: dict[str, frozenset[str]]


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
    and after the normalisation where that belongs to the group. Only what the outputs need is computed.

    Args:
        forward: A JAX-traceable function of ``(params, *inputs)``; the first axis of its first input counts examples.
        groups: Names of the parameters of each group, by group name.
        params: Parameter pytree, arrays or ``jax.ShapeDtypeStruct``.
        *inputs: Data, or ``jax.ShapeDtypeStruct``, of the shapes with which the function will be called.

    Returns:
        A traceable function that gives, by group name, an array of shape ``(examples, ...)``. It is specialised on the
        shapes of ``params`` and ``inputs``.

    Raises:
        ValueError: If a group's parameters are never combined with data, or no input is given.
    """
    if not inputs:
        raise ValueError("inputs: got none; layer outputs belong to a batch, so pass forward's inputs after params")
    jaxpr, names = _trace(forward, params, inputs)
    used = _consumption(jaxpr, names, data_is_closed_over=False)
    examples = jax.tree.leaves(inputs)[0].shape[0]
    outvars = []
    for group, members in groups.items():
        last = [used.last[member] for member in members if member in used.last]
        if not last:
            raise ValueError(f"forward: does not use any parameter of layer {group!r}, so that layer has no output")
        outvars.append(_batched_output(jaxpr, max(last), examples))
    kept = inlining.needed(jaxpr.jaxpr, outvars)
    run = _as_function(jaxpr, kept, outvars)

    def outputs(params: PyTree, *inputs: Any) -> dict[str, jax.Array]:
        values = run(*jax.tree.leaves((params, inputs)))
        return {
            group: value.reshape((examples, -1)) if value.shape[0] != examples else value
            for group, value in zip(groups, values, strict=True)
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
    used = Consumption({}, {}, {})
    for rank, name, sources in _uses(jaxpr, tags):
        used.first.setdefault(name, rank)
        used.sources.setdefault(name, sources)
        used.last[name] = rank[0]
    return used


def _uses(jaxpr: Any, tags: dict[Any, frozenset[str]]) -> Iterator[tuple[tuple[int, ...], str, frozenset[str]]]:
    """Yields (rank, parameter name, sources) for every use, in the order of execution; extends ``tags``."""
    for index, eqn in enumerate(jaxpr.eqns):
        ins = [_tag(tags, atom) for atom in eqn.invars]
        data = [tag for tag in ins if isinstance(tag, _Data)]
        weights, sources = _join([tag for tag in ins if not isinstance(tag, _Data)]), _join(data)
        outs = [weights] * len(eqn.outvars)
        if data:
            rank, results = (index,), []
            for body, args in _bodies(eqn):
                inner = {var: ins[arg] for var, arg in zip(body.invars, args, strict=True)}
                for inner_rank, name, inner_sources in _uses(body, inner):
                    yield (index, *inner_rank), name, inner_sources
                rank = (index, len(body.eqns))
                results.append([_tag(inner, atom) for atom in body.outvars])
            if results:  # what a body does not use, or hands on as it is, it does not consume
                outs = [_join(tags) for tags in zip(*results, strict=True)]
            if not results or eqn.primitive.name in _CONTROL_FLOW:
                for name in sorted(_join([out for out in outs if not isinstance(out, _Data)])):
                    yield rank, name, sources
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


def _batched_output(closed: Any, index: int, examples: int) -> Any:
    """First value at or after equation ``index``, and depending on it, whose leading axis runs over the examples."""
    follow: set[Any] = set()
    for eqn in closed.jaxpr.eqns[index:]:
        if not follow or any(var in follow for var in eqn.invars if not isinstance(var, jex.Literal)):
            for var in eqn.outvars:
                shape = var.aval.shape
                if shape and shape[0] > 0 and shape[0] % examples == 0:
                    return var
            follow.update(eqn.outvars)
    raise ValueError(
        f"inputs: the batch has {examples} examples, but no value that follows from equation {index} "
        f"({closed.jaxpr.eqns[index].primitive}) has a leading axis that is a multiple of it; "
        "let the first axis of the first input count the examples"
    )


def _as_function(closed: Any, eqns: Sequence[Any], outvars: Sequence[Any]) -> Callable[..., list[Any]]:
    jaxpr = closed.jaxpr
    info = jex.DebugInfo(jaxpr.debug_info.traced_for, jaxpr.debug_info.func_src_info, None, None)
    jaxpr = jaxpr.replace(eqns=list(eqns), outvars=list(outvars), debug_info=info)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, closed.consts))
