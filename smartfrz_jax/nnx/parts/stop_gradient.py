"""A loss of NNX modules through which no derivative passes to the frozen parts of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.freezing.transform import stopped
from smartfrz_jax.nnx.hold import hold
from smartfrz_jax.pytrees.types import PyTree


def call_stopped(
    loss_fn: Callable[..., Any],
    frozen: Frozen,
    wrt: nnx.filterlib.Filter,
    argnum: int,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
) -> Any:
    """Calls a loss of which parts of parameters are frozen; modules among the arguments are then as it leaves them.

    Args:
        loss_fn: The loss.
        frozen: The frozen set.
        wrt: Filter of the variables that train.
        argnum: Which positional argument is the model.
        arguments: The arguments of the call.
    """
    leaves, structure = jax.tree.flatten(arguments, is_leaf=_has_variables)
    at = [position for position, leaf in enumerate(leaves) if _has_variables(leaf)]
    nodes = [leaves[position] for position in at]
    graphdef, variables = nnx.split(nodes, graph=True)

    def run(params: PyTree) -> tuple[Any, PyTree]:
        copies = nnx.merge(graphdef, variables, copy=True)
        args, kwargs = jax.tree.unflatten(structure, _with(leaves, at, copies))
        nnx.update(args[argnum], params)
        with hold(args[argnum], frozen):
            out = loss_fn(*args, **kwargs)
        return out, nnx.state(copies, graph=True)

    params = nnx.as_pure(nnx.state(arguments[0][argnum], wrt))
    out, new = stopped(run, frozen)(params)
    nnx.update(nodes, new)
    return out


def _has_variables(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable) or nnx.graphlib.is_graph_node(leaf)


def _with(leaves: list[Any], at: list[int], new: list[Any]) -> list[Any]:
    """The leaves, with new ones at some places."""
    replaced = dict(zip(at, new, strict=True))
    return [replaced.get(position, leaf) for position, leaf in enumerate(leaves)]
