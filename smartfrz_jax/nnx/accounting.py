"""The cost account of an NNX model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from smartfrz_jax.cost.account import Account, assemble
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.layers.layers import Layers, check_layers
from smartfrz_jax.nnx.hold import hold
from smartfrz_jax.nnx.layers import check_model
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree


def account(
    model: nnx.Module,
    layers: Layers,
    loss_fn: Callable[..., Any],
    *inputs: Any,
    tx: optax.GradientTransformation | None = None,
    wrt: nnx.filterlib.Filter = nnx.Param,
    backend: str | None = None,
) -> Account:
    """Predicts what a train step of an NNX model costs, for any frozen set; see :func:`smartfrz_jax.account`.

    Args:
        model: The model, in the mode in which it trains; arrays or ``jax.ShapeDtypeStruct``.
        layers: Its layers.
        loss_fn: A function of ``(model, *inputs)`` to a scalar, or to ``(scalar, aux)``. It is only traced.
        *inputs: An example batch; arrays or ``jax.ShapeDtypeStruct``.
        tx: The optimizer; without it, updates are not counted.
        wrt: Filter of the variables that train.
        backend: Platform that the step will run on; JAX's default.

    Returns:
        The account.

    Raises:
        ValueError: If there are no inputs, or the loss is not a scalar or depends on no parameter.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax.nnx import find_layers
        >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
        >>> x = jnp.ones((32, 8))
        >>> costs = account(model, find_layers(model, x), lambda model, x: model(x).sum(), x)
        >>> costs.macs["linear"] == 32 * (8 * 8 + 8 * 4)
        True
    """
    check_model(model)
    check_layers(layers)
    checks.function(loss_fn, "loss_fn", "a function of (model, *inputs) to a scalar loss")
    graphdef, variables = nnx.split(model)

    def run(frozen: Frozen, variables: PyTree, *inputs: Any) -> Any:
        module = nnx.merge(graphdef, variables, copy=True)
        with hold(module, frozen):
            out = loss_fn(module, *inputs)
        return out, nnx.as_pure(nnx.state(module))

    return assemble(
        layers,
        lambda frozen: functools.partial(run, frozen),
        nnx.as_pure(variables),
        nnx.as_pure(nnx.state(model, wrt)),
        inputs,
        tx,
        backend or jax.default_backend(),
    )
