"""The equations of a loss, each with the layer that it belongs to and the layers that it depends on."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from smartfrz_jax.cost.kinds import LOSS
from smartfrz_jax.cost.operations import Operation, Source, follow
from smartfrz_jax.jaxprs import flops, inline, named_axes
from smartfrz_jax.jaxprs.parts import Eqn, lookup, variables
from smartfrz_jax.layers import dataflow
from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree


class Input(NamedTuple):
    """An input of an equation.

    Attributes:
        position: Where it stands.
        is_weight: Whether it depends on parameters alone.
        ancestors: The layers that it depends on, as a bit mask. On those that are used again behind others, by way of
            their first use, it depends with a bit of its own, higher by the number of layers.
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
        operations: What it consists of.
        owner: Index of its layer, the last one of several; -1 if it is in none.
        inputs: The inputs that a derivative could be taken for; none if the loss does not depend on the equation.
    """

    eqn: Eqn
    operations: list[Operation]
    owner: int
    inputs: tuple[Input, ...]

    @functools.cached_property
    def signature(self) -> Any:
        """Equal for equations of the same price."""
        return flops.signature(self.eqn)


class Equations(NamedTuple):
    """The equations of a loss.

    Attributes:
        all: Them, in order.
        scans: The layers that one scan runs together whose weights are stacked in the step, as bit masks.
    """

    all: list[Equation]
    scans: list[int]


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


def equations(trace: Trace, layers: Layers, backend: str) -> Equations:
    """The equations that a loss, or what is returned with it, depends on.

    One belongs to the layer whose parameters it consumes; if it consumes none, to the one whose parameters were
    combined last with what it works on.

    Args:
        trace: The loss.
        layers: The layers of its network.
        backend: Platform that it will run on.

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
    named = dict(zip(closed.jaxpr.invars, paths.flatten(trace.variables), strict=False))
    params = {var: 1 << index[name] for var, name in named.items() if name in layers.owner}
    data = [var for var in closed.jaxpr.invars if var not in params]
    sources = {var: Source(1 << index[name]) for var, name in named.items() if name in index}
    sources |= {var: Source(lookup(sources, var, Source()).layers, is_data=True) for var in data}
    inlined, loops = inline.inline_with_loops(closed, params, data)
    flat = inlined.jaxpr
    eqns = inline.needed(flat, flat.outvars)
    operations = follow(eqns, sources, backend)
    on_data = {var for var, source in sources.items() if source.is_data}
    last = max((i for i, each in enumerate(operations) if any(op.takes_weights for op in each)), default=0)
    first_uses = _first_uses(inlined, list(named.values()), layers)
    ancestors, reached = _ancestors(eqns, params, on_data, loops, first_uses, len(layers))
    if flat.outvars[0] not in ancestors:
        raise ValueError(
            "loss_fn: the loss depends on no parameter of the layers, so nothing is trained; pass the layers and the "
            "parameters of the network that the loss is computed from"
        )
    live = _live(eqns, flat.outvars[0], ancestors)
    used, found = set[Any](), []
    for i, (eqn, each, masks) in enumerate(zip(eqns, operations, reached, strict=True)):
        inputs = []
        for at, (var, mask) in enumerate(zip(eqn.invars, masks, strict=True)):
            if i in live and mask:
                added = math.prod(var.aval.shape) if var in used else 0
                inputs.append(Input(at, var not in on_data, mask, added))
                used.add(var)
        each = [op._replace(kind=LOSS) for op in each] if i > last else each
        found.append(Equation(eqn, each, sources[eqn.outvars[0]].layers.bit_length() - 1, tuple(inputs)))
    weights = {
        id(eqn): [mask for var, mask in zip(eqn.invars, masks, strict=True) if mask and var not in on_data]
        for eqn, masks in zip(eqns, reached, strict=True)
    }
    scans = [[mask for eqn in loop.equations for mask in weights.get(id(eqn), ())] for loop in loops if loop.is_stacked]
    return Equations(found, [functools.reduce(int.__or__, masks, 0) for masks in scans])


def _first_uses(inlined: Any, names: Sequence[str], layers: Layers) -> dict[int, int]:
    """Layers that are used again behind others, as a bit mask, by the identity of each equation before these."""
    used = dataflow.consumed(inlined, names, data_is_closed_over=False)
    found: dict[int, int] = {}
    for i, layer in enumerate(layers):
        for name, between in used.used_again((*layer.params, *layer.state)).items():
            behind = min(used.first[other] for other in between)
            for rank in used.uses[name] if name in layers.owner else ():
                if rank < behind:
                    eqn = id(inlined.jaxpr.eqns[rank[0]])
                    found[eqn] = found.get(eqn, 0) | 1 << i
    return found


def _ancestors(
    eqns: Sequence[Eqn],
    params: Mapping[Any, int],
    on_data: Collection[Any],
    loops: Sequence[inline.Loop],
    first_uses: Mapping[int, int],
    n_layers: int,
) -> tuple[dict[Any, int], list[list[int]]]:
    """Layers that every value depends on, if any, and those that every input of every equation depends on.

    The weights that a scan runs over are stacked before the step, as a rule. It then computes the gradient of what goes
    into its first iteration as soon as it does of the others, whether anything wants it or not.
    """
    carried = [(loop, first, last) for loop in loops if not loop.is_stacked for first, last in loop.carried]
    inside: dict[tuple[int, Any], int] = {}
    while True:
        ancestors, reached = dict(params), []
        for eqn in eqns:
            masks = []
            for var in eqn.invars:
                mask = 0 if isinstance(var, jex.Literal) else ancestors.get(var, 0) | inside.get((id(eqn), var), 0)
                if mask and var not in on_data and any(out in on_data for out in eqn.outvars):
                    again = mask & first_uses.get(id(eqn), 0)
                    mask = mask & ~again | again << n_layers
                masks.append(mask)
            reached.append(masks)
            mask = functools.reduce(int.__or__, masks, 0)
            for var in eqn.outvars if mask and flops.is_differentiable(eqn) else ():
                if jnp.issubdtype(var.aval.dtype, jnp.inexact):
                    ancestors[var] = mask
        known, inside = inside, {}
        for loop, first, last in carried:
            mask = ancestors.get(last, 0) if isinstance(last, jex.Var) and last is not first else 0
            if mask:
                reads = [id(eqn) for eqn in loop.equations if any(var is first for var in eqn.invars)]
                inside.update({(eqn, first): inside.get((eqn, first), 0) | mask for eqn in reads})
        if inside == known:
            return ancestors, reached


def _live(eqns: list[Eqn], loss: Any, ancestors: Mapping[Any, int]) -> set[int]:
    """Equations through which derivatives of the loss pass."""
    live, reached = set[int](), {loss}
    for i in reversed(range(len(eqns))):
        if any(var in reached for var in eqns[i].outvars if var in ancestors):
            live.add(i)
            reached.update(var for var in variables(eqns[i].invars) if var in ancestors)
    return live
