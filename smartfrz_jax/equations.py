"""The equations of a loss, each with the layer that it belongs to and the layers that it depends on."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from smartfrz_jax import flops, inlining, named_axes, operations, paths
from smartfrz_jax.layers import Layers

PyTree = Any


class Input(NamedTuple):
    """An input of an equation.

    Attributes:
        position: Where it stands.
        is_weight: Whether it depends on parameters alone.
        ancestors: The layers that it depends on, as a bit mask.
        added: Its size, if another equation before uses it too: their derivatives are added. 0 if not.
    """

    position: int
    is_weight: bool
    ancestors: int
    added: int


@dataclasses.dataclass(eq=False)
class Equation:
    """An equation of the loss.

    Attributes:
        eqn: The equation.
        kind: Kind of operation.
        owner: Index of its layer; -1 if it is in none.
        forward: Price of running it.
        inputs: The inputs that a derivative could be taken for; none if the loss does not depend on the equation.
    """

    eqn: Any
    kind: str
    owner: int
    forward: flops.Flops
    inputs: tuple[Input, ...]

    @functools.cached_property
    def signature(self) -> Any:
        """Equal for equations of the same price."""
        return flops.signature(self.eqn)


class Trace(NamedTuple):
    """What to trace.

    Attributes:
        loss_fn: The loss.
        variables: Its first argument: a pytree of the parameters and, maybe, other variables of layers.
        inputs: Its other arguments.
    """

    loss_fn: Callable[..., Any]
    variables: PyTree
    inputs: tuple[Any, ...]


def equations(trace: Trace, layers: Layers, backend: str) -> Iterator[Equation]:
    """The equations that a loss, or what is returned with it, depends on.

    Args:
        trace: The loss.
        layers: The layers of its network.
        backend: Platform that it will run on.

    Yields:
        The equations, in order. One belongs to the layer whose parameters it consumes; if it consumes none, to the one
        whose parameters were combined last with what it works on.

    Raises:
        ValueError: If the loss is not a scalar, or depends on no parameter of the layers.
    """
    closed, structure = named_axes.make_jaxpr(trace.loss_fn, return_shape=True)(trace.variables, *trace.inputs)
    outputs = jax.tree.leaves(structure)
    if not outputs or outputs[0].shape != ():
        raise ValueError(
            f"loss_fn: the first value that it returns has shape {outputs[0].shape if outputs else None}, expected a "
            "scalar; average the loss over the batch"
        )
    index = {name: i for i, layer in enumerate(layers) for name in (*layer.params, *layer.state)}
    invars = closed.jaxpr.invars
    named = dict(zip(invars, paths.flatten(trace.variables), strict=False))
    params = {var: 1 << index[name] for var, name in named.items() if name in layers.owner}
    data = [var for var in invars if var not in params]
    # Layers last combined with a value on its way here, as bit masks; and whether it depends on the data.
    sources = params | {var: 1 << index[name] for var, name in named.items() if name in index}
    on_data = set(data)
    ancestors = dict(params)
    flat = inlining.inline(closed, params, data).jaxpr
    eqns = inlining.needed(flat, flat.outvars)
    owners, kinds = [], []
    last = 0
    for i, eqn in enumerate(eqns):
        ins = [(0, False) if isinstance(v, jex.Literal) else (sources.get(v, 0), v in on_data) for v in eqn.invars]
        weights = functools.reduce(int.__or__, (mask for mask, is_data in ins if not is_data), 0)
        before = functools.reduce(int.__or__, (mask for mask, is_data in ins if is_data), 0)
        is_data = any(is_data for _, is_data in ins)
        if is_data and weights:
            last = i
        owners.append((weights or before).bit_length() - 1)
        kinds.append(operations.kind_of(eqn, [m > 0 and not d for m, d in ins], [d for _, d in ins]))
        reached = functools.reduce(int.__or__, (ancestors.get(v, 0) for v in _variables(eqn)), 0)
        for var in eqn.outvars:
            sources[var] = weights or before
            if is_data:
                on_data.add(var)
            if reached and flops.is_differentiable(eqn) and jnp.issubdtype(var.aval.dtype, jnp.inexact):
                ancestors[var] = reached
    if flat.outvars[0] not in ancestors:
        raise ValueError(
            "loss_fn: the loss depends on no parameter of the layers, so nothing is trained; pass the layers and the "
            "parameters of the network that the loss is computed from"
        )
    live = _live(eqns, flat.outvars[0], ancestors)
    used = set[Any]()
    for i, (eqn, owner, kind) in enumerate(zip(eqns, owners, kinds, strict=True)):
        inputs = []
        for at, var in enumerate(eqn.invars):
            if i in live and not isinstance(var, jex.Literal) and var in ancestors:
                added = math.prod(var.aval.shape) if var in used else 0
                inputs.append(Input(at, var not in on_data, ancestors[var], added))
                used.add(var)
        kind = operations.LOSS if i > last else kind
        yield Equation(eqn, kind, owner, flops.of_equation(eqn, backend), tuple(inputs))


def _live(eqns: list[Any], loss: Any, ancestors: Mapping[Any, int]) -> set[int]:
    """Equations through which derivatives of the loss pass."""
    live, reached = set[int](), {loss}
    for i in reversed(range(len(eqns))):
        if any(var in reached for var in eqns[i].outvars if var in ancestors):
            live.add(i)
            reached.update(var for var in _variables(eqns[i]) if var in ancestors)
    return live


def _variables(eqn: Any) -> Iterator[Any]:
    return (var for var in eqn.invars if not isinstance(var, jex.Literal))
