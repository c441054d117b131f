"""Gradients that an optimizer accumulates over several steps, for layers that return amid them.

``optax.MultiSteps`` averages over a window whose clock is the run's: a layer that returns after ``m`` of ``k`` steps
would get its ``k - m`` gradients divided by ``k``. Here its average is over its own. Sums of gradients, as those of
``optax.apply_every``, need nothing of the kind: each gradient counts once. Nor can an average be told from a sum where
``MultiSteps`` is a link of a chain: each gradient counts for ``1 / k`` there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_leaves_with_path

from smartfrz_jax.layers.rows import Stack
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree


class WindowState(NamedTuple):
    """State of an averaging ``optax.MultiSteps`` whose parameters may return amid a window.

    Attributes:
        inner_state: Its own state.
        missed: For each parameter the steps of the present window before it returned, int32 of shape ``()``; for the
            rows of a stacked one those of each, of shape ``(rows, 1, ...)``.
    """

    inner_state: optax.MultiStepsState
    missed: PyTree


def with_own_windows(tx: Any, stacks: Mapping[str, Stack]) -> optax.GradientTransformation:
    """``tx``; if it is an averaging ``optax.MultiSteps``, with averages over the steps in which a layer trains.

    Its state is then a :class:`WindowState`; where no layer returns amid a window, every number is that of ``tx``.

    Args:
        tx: Any optax transformation.
        stacks: Parameters whose rows are in layers of their own.
    """
    if not averages(tx):
        return tx

    def init(params: PyTree) -> WindowState:
        return start_windows(tx.init(params), params, stacks)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any) -> Any:
        done, means = state.inner_state.mini_step, state.inner_state.acc_grads
        updates = jax.tree.map(functools.partial(_weighted, done), updates, means, state.missed)
        updates, inner = tx.update(updates, state.inner_state, params, **extra_args)
        missed = jax.tree.map(lambda missed: jnp.where(inner.mini_step == 0, 0, missed), state.missed)
        return updates, WindowState(inner, missed)

    return optax.GradientTransformationExtraArgs(init, update)


def averages(tx: Any) -> bool:
    """Whether ``tx`` is an ``optax.MultiSteps`` that averages, or the transformation of one."""
    multi_steps = tx if isinstance(tx, optax.MultiSteps) else getattr(tx.init, "__self__", None)
    return isinstance(multi_steps, optax.MultiSteps) and multi_steps._use_grad_mean


def start_windows(state: optax.MultiStepsState, params: PyTree, stacks: Mapping[str, Stack]) -> WindowState:
    """The state with parameters that have missed nothing."""

    def nothing(name: str, leaf: jax.Array) -> jax.Array:
        shape = [size if at == stacks[name].axis else 1 for at, size in enumerate(leaf.shape)] if name in stacks else ()
        return jnp.zeros(shape, jnp.int32)

    return WindowState(state, paths.tree_map(nothing, params))


def clock_of(path: str) -> str | None:
    """Where the clock is from which a returning parameter starts, for the path of its own entry in the state."""
    state, found, _ = path.partition(".missed")
    return f"{state}.inner_state.mini_step" if found else None


def partial_sums(state: PyTree, prefix: str = "") -> Iterator[str]:
    """Paths at which a state holds gradients that were accumulated for an update to come."""
    for path, node in tree_leaves_with_path(state, is_leaf=_accumulates):
        here = prefix + keystr(path)
        if isinstance(node, optax.ApplyEvery):
            yield f"{here}.grad_acc"
        if isinstance(node, optax.MultiStepsState):
            yield f"{here}.acc_grads"
            yield from partial_sums(node.inner_opt_state, f"{here}.inner_opt_state")


def _accumulates(node: Any) -> bool:
    return isinstance(node, optax.ApplyEvery | optax.MultiStepsState)


def _weighted(done: jax.Array, grad: jax.Array, mean: jax.Array, missed: jax.Array) -> jax.Array:
    """What to give as gradient so that ``mean + (gradient - mean) / (done + 1)`` is the mean over the own steps."""
    weight = ((done + 1) / (done - missed + 1)).astype(mean.dtype)
    return jnp.where(missed == 0, grad, (mean + (grad.astype(mean.dtype) - mean) * weight).astype(grad.dtype))
