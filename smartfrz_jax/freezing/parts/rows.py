"""Stacked parameters of which some rows train: the optimizer sees these rows, together in one array.

State that it holds of them is as long. The parameters, their gradients and their updates keep their shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.pytrees import paths, rows
from smartfrz_jax.pytrees.types import PyTree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TrainingRows:
    """Which rows of stacked parameters an optimizer's state is of; part of that state, without arrays.

    Attributes:
        rows: The rows that train, of each parameter of which others do not, by name.
    """

    rows: tuple[tuple[str, tuple[int, ...]], ...]


def hold_still(frozen: Frozen) -> optax.GradientTransformation:
    """``optax.set_to_zero()`` for what is frozen; its state says which rows of stacked parameters train."""
    if not frozen.rows:
        return optax.set_to_zero()
    state: Any = TrainingRows(tuple(sorted(frozen.rows.items())))
    return optax.GradientTransformation(lambda params: state, optax.set_to_zero().update)


def of_state(opt_state: Any) -> dict[str, tuple[int, ...]]:
    """Which rows of stacked parameters the state of ``freeze(tx, frozen)`` is of, where it is not of all."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, TrainingRows))
    return next((dict(node.rows) for node in nodes if isinstance(node, TrainingRows)), {})


def active(tree: PyTree, frozen: Frozen, params: PyTree | None = None) -> PyTree:
    """A tree like the parameters, with the rows that train in place of stacked arrays.

    Args:
        tree: The tree; its arrays may have further axes in front.
        frozen: The frozen set.
        params: The parameters; without them, there are no further axes.
    """
    if not frozen.rows:
        return tree
    ranks = {} if params is None else {name: np.ndim(leaf) for name, leaf in paths.flatten(params).items()}

    def taken(name: str, leaf: Any) -> Any:
        if name not in frozen.rows:
            return leaf
        axis = frozen.layers.stacks[name].axis + np.ndim(leaf) - ranks.get(name, np.ndim(leaf))
        take = functools.partial(rows.take, indices=frozen.rows[name], axis=axis)
        return jax.eval_shape(take, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else take(leaf)

    return paths.tree_map(taken, tree)


def spread(tree: PyTree, frozen: Frozen) -> PyTree:
    """What :func:`active` made smaller, with zeros for the rows that do not train."""
    stacks = frozen.layers.stacks

    def whole(name: str, leaf: Any) -> Any:
        if name not in frozen.rows:
            return leaf
        return rows.spread(leaf, frozen.rows[name], len(stacks[name].layers), stacks[name].axis)

    return paths.tree_map(whole, tree) if frozen.rows else tree


def put(params: PyTree, new: Mapping[str, Any], frozen: Frozen) -> PyTree:
    """The parameters with new values by name; for stacked ones, of the rows that train."""

    def replaced(name: str, leaf: Any) -> Any:
        if name not in new or name not in frozen.rows:
            return new.get(name, leaf)
        return rows.put(leaf, new[name], frozen.rows[name], frozen.layers.stacks[name].axis)

    return paths.tree_map(replaced, params)


class Move(NamedTuple):
    """How an array of state, of the rows that train, comes to be of others.

    Attributes:
        axis: Along which it has the rows.
        before: The rows before; none, if there was no such state.
        after: The rows after; none, if there is to be no such state.
    """

    axis: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def returning(self) -> list[int]:
        """Rows that it is of after, and was not of before."""
        return [row for row in self.after if row not in self.before]

    def shape(self, leaf: Any) -> jax.ShapeDtypeStruct:
        """The shape after; as it was, if it was not of the rows before."""
        shape = list(np.shape(leaf))
        if shape[self.axis : self.axis + 1] == [len(self.before)]:
            shape[self.axis] = len(self.after)
        return jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(leaf))

    def __call__(self, leaf: Any, fresh: Any) -> Any:
        """The array after, from that before and, where rows return, one with what they begin with."""
        if self.before == self.after:
            return leaf
        staying = [row for row in self.after if row in self.before]
        if not staying:
            return fresh
        old = rows.take(leaf, [self.before.index(row) for row in staying], self.axis)
        at = [self.after.index(row) for row in staying]
        return old if len(staying) == len(self.after) else rows.put(fresh.astype(leaf.dtype), old, at, self.axis)

    def leaving(self, path: str, leaf: Any) -> dict[str, Any]:
        """The rows of an array that it is of before and not after, by path."""
        return {f"{path}[{row}]": self.part(leaf, at) for at, row in enumerate(self.before) if row not in self.after}

    def part(self, leaf: Any, at: int) -> jax.Array:
        """What stands in an array at a row's place."""
        return jax.lax.index_in_dim(leaf, at, self.axis, keepdims=False)

    def with_row(self, leaf: Any, at: int, part: jax.Array) -> jax.Array:
        """An array with another row in that place."""
        return rows.put(leaf, jnp.expand_dims(part, self.axis), [at], self.axis)
