"""The training loss on a batch apart, for parameters that are not the model's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from smartfrz_jax.nnx.layers import check_model
from smartfrz_jax.predictor.probe import Probe
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree


def probe(model: nnx.Module, loss_fn: Callable[..., Any], *batch: Any, wrt: nnx.filterlib.Filter = nnx.Param) -> Probe:
    """A function from parameters to ``loss_fn(model, *batch)``, which leaves the model as it is.

    Dropout draws the same numbers every time, and statistics of BatchNorms are not updated.

    Args:
        model: The model; its mode and all that are no parameters are taken as they are at each call.
        loss_fn: From the model and a batch to a scalar, as in the train step.
        *batch: The batch. One or two hundred examples do.
        wrt: What the optimizer trains.

    Returns:
        The function, for ``smartfrz(..., probe=...)``; parameters come as ``nnx.state(model, wrt)`` has them, others
        are a ``ValueError``.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
        >>> loss = probe(model, lambda model, x: jnp.mean(model(x) ** 2), jnp.ones((4, 2)))
        >>> float(loss({"kernel": jnp.full((2, 1), 0.5)}))
        1.0
    """
    check_model(model)
    checks.function(loss_fn, "loss_fn", "a function of (model, *batch) to a scalar loss")

    def loss(params: PyTree) -> jax.Array:
        graphdef, own, rest = nnx.split(model, wrt, ...)
        checks.same_leaves(params, nnx.as_pure(own), "params")
        return _loss(graphdef, loss_fn, params, nnx.as_pure(rest), batch)

    return loss


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss(
    graphdef: nnx.GraphDef[nnx.Module],
    loss_fn: Callable[..., Any],
    params: PyTree,
    rest: PyTree,
    batch: tuple[Any, ...],
) -> jax.Array:
    return loss_fn(nnx.merge(graphdef, params, rest, copy=True), *batch)
