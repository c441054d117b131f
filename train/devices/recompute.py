"""Losses whose blocks keep less for the backward pass: they are computed again, and what is split is gathered again.

Each block of a network, a module of a list of modules, is one call of ``jax.checkpoint``. One that is wholly in the
frozen front has no backward pass: nothing of it is computed, or gathered, a second time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smartfrz_jax.pytrees.types import PyTree
from train.devices.mesh import sharding_of

Loss = Callable[..., jax.Array]


class _How(NamedTuple):
    """What is done in a block: whether it is computed again, and the mesh over which its parameters are split."""

    remat: bool
    mesh: Mesh | None


def recomputed(loss_fn: Loss, *, remat: bool, mesh: Mesh | None = None) -> Loss:
    """A loss of the same value and gradients.

    Args:
        loss_fn: A function of ``(model, *inputs)`` to a scalar.
        remat: Whether to keep only the inputs of blocks for the backward pass, and to compute the rest again.
        mesh: The mesh. Where parameters are split over ``fsdp``, those of a block are gathered for its forward pass and
            again for its backward pass, so that no device holds more than some blocks whole. Of the gradients each
            keeps its part.

    Returns:
        ``loss_fn`` itself where there is nothing to do.
    """
    how = _How(remat, mesh if mesh is not None and mesh.shape["fsdp"] > 1 else None)
    if how == _How(False, None):
        return loss_fn

    def loss_of(model: nnx.Module, *inputs: Any) -> jax.Array:
        inner = nnx.merge(*nnx.split(model))  # to be changed
        blocks = list(_blocks(inner))
        of_blocks = {id(variable) for block in blocks for variable in _variables(block).values()}
        for variable in _variables(inner).values():
            if isinstance(variable, nnx.Param) and id(variable) not in of_blocks:
                variable.set_raw_value(_gather(variable.get_raw_value(), how.mesh))
        for block in blocks:
            block.__class__ = _recomputing(type(block), how)
        before = _values(inner)
        loss = loss_fn(inner, *inputs)
        _set_changed(model, before, _values(inner))
        return loss

    return loss_of


def _blocks(model: nnx.Module) -> Iterator[nnx.Module]:
    """The outermost modules in lists that have parameters."""
    inside: set[int] = set()
    for _, module in nnx.iter_modules(model, graph=True):
        if isinstance(module, nnx.List):
            for block in module:
                if isinstance(block, nnx.Module) and not isinstance(block, nnx.List) and id(block) not in inside:
                    inside |= {id(part) for _, part in nnx.iter_modules(block, graph=True)}
                    if jax.tree.leaves(nnx.state(block, nnx.Param)):
                        yield block


@functools.cache
def _recomputing(kind: type[nnx.Module], how: _How) -> type[nnx.Module]:
    """The class of a block that is computed again: a class, so that such blocks go through a scan as before."""
    plain: Callable[..., Any] = kind.__call__  # pyright: ignore[reportAttributeAccessIssue]

    def call(self: nnx.Module, *inputs: Any, **options: Any) -> Any:
        graphdef, state = nnx.split(self)
        values = nnx.as_pure(state)

        def of_arrays(values: PyTree, *inputs: Any) -> Any:
            block = nnx.merge(graphdef, values, copy=True)
            for variable in _variables(block).values():
                if isinstance(variable, nnx.Param):
                    variable.set_raw_value(_gather(variable.get_raw_value(), how.mesh))
            before = _values(block)
            out = plain(block, *inputs, **options)
            # No more than what changed: statistics of frozen layers must stay the very arrays that they are.
            return out, {path: now for path, now in _values(block).items() if now is not before[path]}

        policy = jax.checkpoint_policies.nothing_saveable if how.remat else _all_but_gathered
        out, changed = jax.checkpoint(of_arrays, policy=policy)(values, *inputs)
        for path, value in changed.items():
            _variables(self)[path].set_raw_value(value)
        return out

    return type(kind.__name__, (kind,), {"__call__": call})


def _variables(module: nnx.Module) -> dict[Any, nnx.Variable[Any]]:
    return dict(nnx.to_flat_state(nnx.state(module, graph=True)))


def _values(module: nnx.Module) -> dict[Any, Any]:
    """Arrays of what is no parameter."""
    return {path: v.get_raw_value() for path, v in _variables(module).items() if not isinstance(v, nnx.Param)}


def _set_changed(module: nnx.Module, before: dict[Any, Any], after: dict[Any, Any]) -> None:
    variables = _variables(module)
    for path, value in after.items():
        if value is not before[path]:
            variables[path].set_raw_value(value)


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    return primitive.name != "sharding_constraint"


def _gather(leaf: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The leaf whole on every device; of its gradient each keeps its part."""
    if mesh is None or sharding_of(leaf.shape, mesh).is_fully_replicated:
        return leaf
    # The transpose of both, in reverse: a gradient that is summed over all, and then split.
    split = jax.lax.with_sharding_constraint(leaf, sharding_of(leaf.shape, mesh))
    return jax.lax.with_sharding_constraint(split, NamedSharding(mesh, PartitionSpec()))
