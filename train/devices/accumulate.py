"""Steps that take their batch in parts, one after the other, and update once: for batches that memory cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree
from train.devices.mesh import AXES


def accumulating_step(
    loss_fn: Callable[..., jax.Array],
    prepare: Callable[..., PyTree],
    parts: int,
    mesh: Mesh | None = None,
    *,
    weigh: Callable[..., Any] = lambda *examples: 1.0,
) -> Callable[..., jax.Array]:
    """A step with the mean of the gradients of several parts of a batch, which are computed in one loop.

    The batch is prepared as a whole, so that it is augmented as without parts. Gradients of active layers only are
    added up: for frozen ones there is neither memory nor work.

    Args:
        loss_fn: A function of ``(model, *examples)`` to the mean loss of some examples, a scalar.
        prepare: From the step's inputs to the examples of the batch, arrays with these along their first axis.
        parts: Number of parts of one size. Part ``i`` has the examples ``i``, ``i + parts``, ...: of each device its
            own.
        mesh: The mesh over which the examples are split.
        weigh: From the examples of a part to what its loss is the mean over: the number of tokens that count, where
            these are not as many in every part.

    Returns:
        A step of ``(model, optimizer, *inputs)`` that returns the mean loss. Statistics of BatchNorms are those of the
        parts, one after the other.
    """

    def train_step(model: nnx.Module, optimizer: sfj.nnx.Optimizer, *inputs: Any) -> jax.Array:
        graphdef, params, others = nnx.split(model, optimizer.wrt, ...)
        active = optimizer.frozen.active_leaves(nnx.as_pure(params))

        def of_part(carry: Any, examples: Any) -> tuple[Any, None]:
            others, loss, sums, weights = carry
            # A copy: the loop's values must not be those that the model goes on with.
            inner = nnx.merge(graphdef, params, others, copy=True)
            of_this, grads = optimizer.value_and_grad(loss_fn)(inner, *examples)
            leaves, weight = optimizer.frozen.active_leaves(nnx.as_pure(grads)), jnp.float32(weigh(*examples))
            sums = {name: total + leaves[name] * weight.astype(total.dtype) for name, total in sums.items()}
            return (nnx.state(inner, nnx.Not(optimizer.wrt)), loss + of_this * weight, sums, weights + weight), None

        split = jax.tree.map(lambda leaf: _in_parts(leaf, parts, mesh), prepare(*inputs))
        zero = jnp.zeros((), jnp.float32)
        start = others, zero, {name: jnp.zeros_like(leaf) for name, leaf in active.items()}, zero
        (others, loss, sums, weights), _ = jax.lax.scan(of_part, start, split)
        weights = jnp.maximum(weights, 1e-30)
        nnx.update(model, others)

        def mean(name: str, leaf: jax.Array) -> jax.Array:
            return sums[name] / weights.astype(leaf.dtype) if name in sums else jnp.zeros_like(leaf)

        optimizer.update(model, paths.tree_map(mean, params))
        return loss / weights

    return train_step


def _in_parts(leaf: jax.Array, parts: int, mesh: Mesh | None) -> jax.Array:
    """Examples as ``(parts, examples of a part, ...)``, without moving any to another device."""
    split = jnp.swapaxes(leaf.reshape(-1, parts, *leaf.shape[1:]), 0, 1)
    if mesh is None:
        return split
    return jax.lax.with_sharding_constraint(split, NamedSharding(mesh, PartitionSpec(None, AXES)))
