"""Rows of arrays that a scan reads one by one, as parameters of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree


class Row(NamedTuple):
    """One row of a stacked array.

    Attributes:
        array: Name of the array.
        axis: The axis along which the rows are stacked.
        position: Which row it is.
    """

    array: str
    axis: int
    position: int

    @property
    def name(self) -> str:
        """The name under which it is a parameter, as NumPy indexes it.

        Example:
            >>> Row("blocks/up/kernel", 0, 3).name, Row("blocks/up/kernel", 1, 3).name
            ('blocks/up/kernel[3]', 'blocks/up/kernel[:,3]')
        """
        return f"{self.array}[{':,' * self.axis}{self.position}]"

    def of(self, array: Any) -> Any:
        """The row of an array; of a ``jax.ShapeDtypeStruct`` its shape."""
        if isinstance(array, jax.ShapeDtypeStruct):
            shape = (*array.shape[: self.axis], *array.shape[self.axis + 1 :])
            return jax.ShapeDtypeStruct(shape, array.dtype)
        return array[(slice(None),) * self.axis + (self.position,)]


class Stack(NamedTuple):
    """An array whose rows belong to layers of their own.

    Attributes:
        axis: The axis along which they are stacked.
        layers: Name of the layer of each row.
    """

    axis: int
    layers: tuple[str, ...]

    def rows(self, array: str) -> Iterator[Row]:
        """Its rows, in order."""
        return (Row(array, self.axis, position) for position in range(len(self.layers)))


def unstacked(tree: PyTree, stacks: Mapping[str, Stack]) -> PyTree:
    """A tree with a leaf for every row, by name; the tree itself if nothing is stacked.

    Args:
        tree: Pytree of arrays, named as the parameters are.
        stacks: The stacked ones, by name.

    Example:
        >>> list(unstacked({"up": jnp.ones((2, 3)), "head": jnp.ones(3)}, {"up": Stack(0, ("up/0", "up/1"))}))
        ['head', 'up[0]', 'up[1]']
    """
    if not stacks:
        return tree
    found: dict[str, Any] = {}
    for name, leaf in paths.flatten(tree).items():
        if name not in stacks:
            found[name] = leaf
        elif isinstance(leaf, jax.Array):  # the derivative of one split is one array, not a sum for all rows
            axis, rows = stacks[name].axis, stacks[name].rows(name)
            parts = jax.lax.split(leaf, (1,) * leaf.shape[axis], axis)
            found |= {row.name: jax.lax.squeeze(part, (axis,)) for row, part in zip(rows, parts, strict=True)}
        else:
            found |= {row.name: row.of(leaf) for row in stacks[name].rows(name)}
    return found


def stacked(rows: Mapping[str, Any], like: PyTree, stacks: Mapping[str, Stack]) -> PyTree:
    """The tree of which :func:`unstacked` made ``rows``.

    Args:
        rows: Leaves and rows by name.
        like: A tree of the structure wanted.
        stacks: The stacked arrays, by name.
    """

    def whole(name: str, leaf: Any) -> Any:
        if name not in stacks:
            return rows.get(name, leaf)
        parts = [rows[row.name] for row in stacks[name].rows(name)]
        return jnp.stack(parts, stacks[name].axis)

    return paths.tree_map(whole, like)
