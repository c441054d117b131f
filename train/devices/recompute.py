"""Losses that keep less for the backward pass: what is cheap is computed again, what is split over devices gathered.

Both are what ``jax.checkpoint`` leaves out of what it keeps. A frozen front has no backward pass: nothing of it is
computed, or gathered, a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.devices.mesh import sharding_of

Loss = Callable[..., jax.Array]


def recomputed(loss_fn: Loss, *, remat: bool, mesh: Mesh | None = None) -> Loss:
    """A loss of the same value and gradients.

    Args:
        loss_fn: A function of ``(model, *inputs)`` to a scalar.
        remat: Whether to keep products of activations and weights only, of matrices and convolutions, for the backward
            pass, and to compute all else again: normalisations, activation functions, attention.
        mesh: The mesh. Where parameters are split over ``fsdp``, each is gathered for the forward pass and again for
            the backward pass; each device then keeps its part of the gradient.

    Returns:
        ``loss_fn`` itself where there is nothing to do.
    """
    is_split = mesh is not None and mesh.shape["fsdp"] > 1
    if not remat and not is_split:
        return loss_fn

    def loss_of(model: nnx.Module, *inputs: Any) -> jax.Array:
        graphdef, params, others = nnx.split(model, nnx.Param, ...)

        def of_arrays(params: nnx.State, others: nnx.State, *inputs: Any) -> tuple[jax.Array, dict[Any, Any]]:
            whole = jax.tree.map(lambda leaf: _gather(leaf, mesh), params) if is_split else params
            inner = nnx.merge(graphdef, whole, others)
            before = _values(others)
            loss = loss_fn(inner, *inputs)
            after = _values(nnx.state(inner, nnx.Not(nnx.Param)))
            # No more than that: statistics of frozen layers must stay the very arrays that they are.
            return loss, {path: value for path, value in after.items() if value is not before[path]}

        policy = _products if remat else _all_but_gathered
        loss, changed = jax.checkpoint(of_arrays, policy=policy)(params, others, *inputs)
        variables = dict(nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Param))))
        for path, value in changed.items():
            variables[path].set_raw_value(value)
        return loss

    return loss_of


def _values(state: nnx.State) -> dict[Any, Any]:
    return {path: variable.get_raw_value() for path, variable in nnx.to_flat_state(state)}


def _products(primitive: Any, *args: Any, **params: Any) -> Any:
    if primitive.name == "conv_general_dilated":
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    return primitive.name != "sharding_constraint"


def _gather(leaf: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The leaf whole on every device; of its gradient each keeps its part."""
    assert mesh is not None
    split, everywhere = sharding_of(leaf.shape, mesh), NamedSharding(mesh, PartitionSpec())
    if split.is_fully_replicated:
        return leaf

    @jax.custom_vjp
    def gather(leaf: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(leaf, everywhere)

    def forward(leaf: jax.Array) -> tuple[jax.Array, None]:
        return gather(leaf), None

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        return (jax.lax.with_sharding_constraint(gradient, split),)

    gather.defvjp(forward, backward)
    return gather(leaf)
