"""Layers of an NNX model, and their outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from smartfrz_jax import dataflow, paths
from smartfrz_jax.layers import Granularity, Layers, check_params, group

PyTree = Any


def find_layers(
    model: nnx.Module,
    *inputs: Any,
    forward: Callable[..., Any] | None = None,
    granularity: Granularity = "layer",
    wrt: nnx.filterlib.Filter = nnx.Param,
) -> Layers:
    """Layers of an NNX model, in forward order; see :func:`smartfrz_jax.find_layers`.

    The statistics of BatchNorms and the random streams of dropouts are assigned too, to the layer whose output they
    work on.

    Args:
        model: The model. It is only traced, in training mode.
        *inputs: An example batch; arrays or ``jax.ShapeDtypeStruct``.
        forward: A function of ``(model, *inputs)``; ``model(*inputs)`` by default.
        granularity: ``"layer"``, ``"block"`` or a function from a parameter's name to its layer's name.
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
    if not inputs:
        raise ValueError("inputs: got none; the forward order is traced, so pass an example batch after the model")
    leaves = check_params(nnx.as_pure(nnx.state(model, wrt)))
    graphdef, variables = nnx.split(model)

    def run(variables: PyTree, *inputs: Any) -> Any:
        module = nnx.merge(graphdef, variables, copy=True)
        module.train()
        return _call(module, forward, inputs)

    used = dataflow.consumption(run, nnx.as_pure(variables), *inputs)
    state = [name for name in paths.flatten(variables) if name not in leaves]
    return group(leaves, used, granularity, state)


def features(
    model: nnx.Module, layers: Layers, *inputs: Any, forward: Callable[..., Any] | None = None
) -> Callable[..., dict[str, jax.Array]]:
    """A jitted function of ``(model, *inputs)`` that returns every layer's output on a batch, in evaluation mode.

    Args:
        model: The model; its structure and that of the inputs are fixed by this call.
        layers: Its layers.
        *inputs: An example batch; the first axis of the first input counts the examples.
        forward: A function of ``(model, *inputs)``; ``model(*inputs)`` by default.

    Returns:
        A function that gives, by layer name, an array of shape ``(examples, ...)``.
    """
    evaluated = nnx.merge(*nnx.split(model), copy=True)
    evaluated.eval()
    wrt = nnx.Param
    graphdef = nnx.graphdef(evaluated)

    def outputs(params: PyTree, rest: PyTree, *inputs: Any) -> dict[str, jax.Array]:
        def run(params: PyTree, *inputs: Any) -> Any:
            module = nnx.merge(graphdef, params, rest, copy=True)
            return _call(module, forward, inputs)

        groups = {layer.name: layer.params for layer in layers}
        return dataflow.tapped(run, groups, params, *inputs)(params, *inputs)

    jitted = jax.jit(outputs)

    def of_model(model: nnx.Module, *inputs: Any) -> dict[str, jax.Array]:
        _, params, rest = nnx.split(model, wrt, ...)
        by_name = jitted(params, rest, *inputs)
        return {name: by_name[name] for name in layers.names}

    return of_model


def _call(module: nnx.Module, forward: Callable[..., Any] | None, inputs: tuple[Any, ...]) -> Any:
    return forward(module, *inputs) if forward else module(*inputs)  # pyright: ignore[reportCallIssue]
