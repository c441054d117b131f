"""Outputs of layers, read off the jaxpr of a forward function; see :mod:`smartfrz_jax.layers.dataflow`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from smartfrz_jax.jaxprs import example_axis, inline
from smartfrz_jax.jaxprs.example_axis_rules import Axis
from smartfrz_jax.jaxprs.parts import Jaxpr, as_function, variables
from smartfrz_jax.layers import dataflow
from smartfrz_jax.layers.layers import Layers, check_params
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree


def layer_outputs(
    params: PyTree, groups: Layers | Mapping[str, Iterable[str]], forward: Callable[..., Any], *inputs: Any
) -> Callable[..., dict[str, jax.Array]]:
    """A function of ``(params, *inputs)`` that returns the output of each group of parameters (of each layer).

    The output of a group is that of the last equation that combines one of its parameters with data: after the bias,
    and after the normalisation where that belongs to the group. Of a group that is used again behind others, as an
    embedding that is the classifier too, it is the output of its first use. Which axis of it counts the examples is
    followed from the inputs, and put in front. Only what the outputs need is computed.

    Args:
        params: Parameter pytree, arrays or ``jax.ShapeDtypeStruct``.
        groups: The layers, or names of the parameters of each group, by group name.
        forward: A JAX-traceable function of ``(params, *inputs)``; the first axis of its first input that has one
            counts the examples, in the other inputs the first axis does if it is as long.
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
        >>> layer_outputs(params, {"w": ["w"]}, lambda p, x: p["w"] @ x.T, x)(params, x)["w"].shape
        (4, 8)
    """
    checks.function(forward, "forward", "a function of (params, *inputs)")
    if isinstance(groups, Layers) and groups.array_of:
        return _of_parts(params, groups, forward, *inputs)
    if isinstance(groups, Layers):
        groups = {layer.name: layer.params for layer in groups}
    checks.by_name(groups, "groups", "a dict from the name of each group to the names of its parameters")
    known = check_params(params)
    groups = {group: _members(group, members, known) for group, members in groups.items()}
    if not inputs:
        raise ValueError("inputs: got none; layer outputs belong to a batch, so pass forward's inputs after forward")
    jaxpr, names = dataflow.trace(forward, params, inputs)
    used = dataflow.consumed(jaxpr, names, data_is_closed_over=False)
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
    kept = inline.needed(jaxpr.jaxpr, outvars)
    run = as_function(jaxpr, kept, jaxpr.jaxpr.invars, outvars)

    def outputs(params: PyTree, *inputs: Any) -> dict[str, jax.Array]:
        values = run(*jax.tree.leaves((params, inputs)))
        in_front = [jnp.moveaxis(value, axis.position, 0) for value, axis in zip(values, axes, strict=True)]
        return {
            group: value.reshape((examples, -1)) if value.shape[0] != examples else value
            for group, value in zip(groups, in_front, strict=True)
        }

    return outputs


def _of_parts(
    params: PyTree, layers: Layers, forward: Callable[..., Any], *inputs: Any
) -> Callable[..., dict[str, jax.Array]]:
    """As :func:`layer_outputs`, where rows of stacked parameters, or lookups, are layers."""
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    outputs = layer_outputs(layers.unstacked(like), layers.of_parts, layers.of_unstacked(forward, like), *inputs)
    return lambda params, *inputs: outputs(layers.unstacked(params), *inputs)


def _members(group: str, members: Any, known: Mapping[str, Any]) -> tuple[str, ...]:
    if isinstance(members, str):
        raise TypeError(f"groups: got {checks.got(members)}, expected a sequence of names of parameters for {group!r}")
    found = checks.names(members, "groups", of="parameters")
    for member in found:
        if member not in known:
            raise ValueError(
                f"groups: got {member!r} in {group!r}, expected names of parameters, such as {next(iter(known))!r}"
            )
    return found


def _end(used: dataflow.Consumption, members: Sequence[str]) -> int:
    """Index of the equation with which a group ends: the last use before those that are for another time."""
    again = used.used_again(members).values()
    until = min((used.first[other] for between in again for other in between), default=None)
    ranks = [rank for member in members for rank in used.uses[member]]
    return max(rank for rank in ranks if until is None or rank < until)[0]


def _axes(jaxpr: Jaxpr, n_params: int, examples: int) -> dict[Any, Axis | str]:
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


def _output(jaxpr: Jaxpr, index: int, known: Mapping[Any, Axis | str], group: str, examples: int) -> tuple[Any, Axis]:
    """First value at or after equation ``index``, and depending on it, with an axis that counts the examples."""
    follow: set[Any] = set()
    for eqn in jaxpr.eqns[index:]:
        if not follow or any(var in follow for var in variables(eqn.invars)):
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
