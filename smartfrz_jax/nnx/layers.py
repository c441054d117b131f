"""Layers of an NNX model, and their outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from smartfrz_jax.jaxprs import inline, named_axes
from smartfrz_jax.jaxprs.parts import variables as variables_of
from smartfrz_jax.layers import dataflow
from smartfrz_jax.layers.find import Granularity, group
from smartfrz_jax.layers.layers import Layers, check_layers, check_params
from smartfrz_jax.layers.outputs import layer_outputs
from smartfrz_jax.pytrees import checks, paths
from smartfrz_jax.pytrees.types import PyTree


def check_model(model: Any, argument: str = "model") -> None:
    """Raises ``TypeError`` unless ``model`` is an NNX module, or a container with one."""
    if next(nnx.iter_modules(model), None) is None:
        raise TypeError(f"{argument}: got {checks.got(model)}, expected an nnx.Module")


def find_layers(
    model: nnx.Module,
    *inputs: Any,
    forward: Callable[..., Any] | None = None,
    granularity: Granularity = "layer",
    rows: bool = False,
    lookups: bool = False,
    wrt: nnx.filterlib.Filter = nnx.Param,
) -> Layers:
    """Layers of an NNX model, in forward order; see :func:`smartfrz_jax.find_layers`.

    Variables that do not train are assigned too: what is combined with weights, such as the vectors of a SpectralNorm,
    to the layer of these weights; other statistics, such as those of a BatchNorm, and the random streams of dropouts,
    to the layer whose output they work on or are made of; the stream of one dropout that is called in several places,
    to all the layers that it follows; what neither meets weights nor data, such as a counter of calls, to all the
    layers of the module that it is in. A dropout without a random stream of its own, one that is called with ``rngs``,
    belongs to no layer.

    Args:
        model: The model. It is only traced, in training mode.
        *inputs: An example batch; arrays or ``jax.ShapeDtypeStruct``.
        forward: A function of ``(model, *inputs)``; ``model(*inputs)`` by default. Pass it where the loss reads
            parameters that this does not, such as a head of its own: they would come first, and be frozen first.
        granularity: ``"layer"``, ``"block"`` or a function from a parameter's name to its layer's name.
        rows: Whether the blocks of an ``nnx.scan`` are layers of their own; see :func:`smartfrz_jax.find_layers`.
        lookups: Whether lookups in a table that is the head too are a layer of their own; see there.
        wrt: Filter of the variables that train.

    Returns:
        The layers, front to back.

    Raises:
        ValueError: If there are no inputs, the model has no such variables, or ``granularity`` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
        >>> find_layers(model, jnp.ones((1, 2))).names
        ('layers/0', 'layers/1')
    """
    check_model(model)
    if forward is not None:
        checks.function(forward, "forward", "a function of (model, *inputs)")
    if not inputs:
        raise ValueError("inputs: got none; the forward order is traced, so pass an example batch after the model")
    leaves = check_params(nnx.as_pure(nnx.state(model, wrt)))
    graphdef, variables = nnx.split(model)

    def run(variables: PyTree, *inputs: Any) -> Any:
        module = nnx.merge(graphdef, variables, copy=True)
        module.train()
        output, new = _call(module, forward, inputs), paths.flatten(nnx.state(module))
        return output, paths.tree_map(lambda name, leaf: new.get(name, leaf), variables)

    checks.flag(lookups, "lookups")
    tables = leaves if lookups else ()
    used = dataflow.consumption(run, nnx.as_pure(variables), *inputs, writes=True, tables=tables)
    state = [name for name in paths.flatten(variables) if name not in leaves]
    again = list(_drawn_again(model, used))
    if not again:
        return group(leaves, used, granularity, state, rows=rows)
    before = _before(run, leaves, nnx.as_pure(variables), *inputs)
    shared = [names for names in again if len({params for name in names for params in before[name]}) > 1]
    # What works on the output of a shared dropout would seem to follow all layers that the dropout follows.
    follows = {name: frozenset[str]().union(*before[name]) for names in shared for name in names}
    sources = {name: of if of.isdisjoint(follows) else before[name][0] for name, of in used.sources.items()}
    found = group(leaves, dataclasses.replace(used, sources=sources), granularity, state, rows=rows)
    return _with_shared(found, follows)


def features(
    model: nnx.Module,
    layers: Layers,
    *inputs: Any,
    forward: Callable[..., Any] | None = None,
    wrt: nnx.filterlib.Filter = nnx.Param,
) -> Callable[..., dict[str, jax.Array]]:
    """A jitted function of ``(model, *inputs)`` that returns every layer's output on a batch, in evaluation mode.

    Args:
        model: The model; its structure and that of the inputs are fixed by this call.
        layers: Its layers.
        *inputs: An example batch; the first axis of the first input counts the examples.
        forward: A function of ``(model, *inputs)``; ``model(*inputs)`` by default.
        wrt: Filter of the variables that train, as for :func:`find_layers`.

    Returns:
        A function that gives, by layer name, an array of shape ``(examples, ...)``.

    Raises:
        ValueError: If the layers are of other variables than those of ``wrt``, or there are no inputs.
    """
    check_model(model)
    check_layers(layers)
    if forward is not None:
        checks.function(forward, "forward", "a function of (model, *inputs)")
    trained = paths.flatten(nnx.state(model, wrt))
    foreign = next((param for param in layers.arrays if param not in trained), None)
    if foreign is not None:
        raise ValueError(
            f"wrt: got {wrt!r}, which leaves out {foreign!r} of layer {layers.arrays[foreign][0]!r}, expected the "
            "filter that the layers were found with; pass find_layers and features the same wrt, and the same model"
        )
    evaluated = nnx.merge(*nnx.split(model), copy=True)
    evaluated.eval()
    graphdef = nnx.graphdef(evaluated)

    def outputs(params: PyTree, rest: PyTree, *inputs: Any) -> dict[str, jax.Array]:
        def run(params: PyTree, *inputs: Any) -> Any:
            module = nnx.merge(graphdef, params, rest, copy=True)
            return _call(module, forward, inputs)

        return layer_outputs(params, layers, run, *inputs)(params, *inputs)

    jitted = jax.jit(outputs)

    def of_model(model: nnx.Module, *inputs: Any) -> dict[str, jax.Array]:
        _, params, rest = nnx.split(model, wrt, ...)
        by_name = jitted(params, rest, *inputs)
        return {name: by_name[name] for name in layers.names}

    return of_model


def _drawn_again(model: nnx.Module, used: dataflow.Consumption) -> Iterator[list[str]]:
    """Random streams, as the names of their variables, of each dropout that draws more than once."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Dropout):
            stream = paths.flatten(nnx.state(module, nnx.RngState))
            names = [paths.SEPARATOR.join((*map(str, path), name)) for name in stream]
            if any(name in used.first and used.first[name] != (used.last[name],) for name in names):
                yield names


def _before(
    run: Callable[..., Any], leaves: Collection[str], state: PyTree, *inputs: Any
) -> dict[str, list[frozenset[str]]]:
    """For every use of a variable, the parameters (``leaves``) that were combined last with the data that it meets.

    As ``sources`` of :func:`dataflow.consumption`, but of every use, and through dropouts: these do not count.
    """
    closed = named_axes.make_jaxpr(run)(state, *inputs)
    names = list(paths.flatten(state))
    params, data = closed.jaxpr.invars[: len(names)], closed.jaxpr.invars[len(names) :]
    carried = dict(zip(params, [frozenset({name}) for name in names], strict=True))  # by values without data
    behind: dict[Any, frozenset[str]] = dict.fromkeys(data, frozenset())  # by values that depend on the data
    before: dict[str, list[frozenset[str]]] = {name: [] for name in names}
    for eqn in inline.inline(closed, params, data).jaxpr.eqns:
        ins = variables_of(eqn.invars)
        weights = frozenset[str]().union(*(carried.get(var, ()) for var in ins))
        if not any(var in behind for var in ins):
            carried.update(dict.fromkeys(eqn.outvars, weights))
            continue
        last = frozenset[str]().union(*(behind.get(var, ()) for var in ins))
        for name in weights:
            before[name].append(last)
        behind.update(dict.fromkeys(eqn.outvars, weights.intersection(leaves) or last))
    return before


def _with_shared(layers: Layers, follows: Mapping[str, frozenset[str]]) -> Layers:
    """The layers, each with the variables that follow (``follows``) one of its parameters."""
    entries = []
    for layer in layers:
        more = [n for n, params in follows.items() if n not in layer.state and not params.isdisjoint(layer.params)]
        entries.append(dataclasses.replace(layer, state=(*layer.state, *more)))
    return Layers(tuple(entries))


def _call(module: nnx.Module, forward: Callable[..., Any] | None, inputs: tuple[Any, ...]) -> Any:
    return forward(module, *inputs) if forward else module(*inputs)  # pyright: ignore[reportCallIssue]
