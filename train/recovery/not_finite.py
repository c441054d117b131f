"""Steps whose outcome is not finite are left out: the model and what the optimizer holds of it stay as they were."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import smartfrz_jax as sfj


def skip_not_finite(train_step: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A train step that changes nothing where its loss, or anything that it would change, is infinite or not a number.

    As with ``optax.apply_if_finite`` the optimizer's own counts stand still then, and a schedule with them; what the
    model holds beside its weights, such as statistics of BatchNorm, stays too.

    Args:
        train_step: A plain step of ``(model, optimizer, *inputs)`` that returns the loss.

    Returns:
        The same, which returns NaN as the loss of a step that was left out, so that policies leave it out as well.

    Example:
        >>> import optax
        >>> from train.loop import make_step
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> layers = sfj.nnx.find_layers(model, jnp.ones((1, 2)))
        >>> optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=layers)
        >>> step = nnx.jit(skip_not_finite(make_step(lambda model, x: model(x).mean())))
        >>> float(step(model, optimizer, jnp.full((1, 2), jnp.nan)))
        nan
        >>> bool(jnp.isfinite(model.kernel[...]).all())
        True
    """

    @functools.wraps(train_step)
    def step(model: nnx.Module, optimizer: sfj.nnx.Optimizer, *inputs: Any) -> jax.Array:
        before = nnx.as_pure((nnx.state(model), nnx.state(optimizer.opt_state)))
        loss = train_step(model, optimizer, *inputs)
        after = nnx.as_pure((nnx.state(model), nnx.state(optimizer.opt_state)))
        old, new, structure = *map(jax.tree.leaves, (before, after)), jax.tree.structure(after)
        changed = [one for one, other in zip(new, old, strict=True) if one is not other]
        inexact = [leaf for leaf in changed if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        is_finite = functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in (loss, *inexact)])
        kept = [one if one is other else jnp.where(is_finite, one, other) for one, other in zip(new, old, strict=True)]
        state, opt_state = jax.tree.unflatten(structure, kept)
        nnx.update(model, state)
        nnx.update(optimizer.opt_state, opt_state)
        return jnp.where(is_finite, loss, jnp.full_like(loss, jnp.nan))

    return step
