"""Which layers are frozen: a static argument of the train step.

A mask known only at run time would save nothing, for the program must then be able to do the full work.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from smartfrz_jax.freezing.table import Table
from smartfrz_jax.layers.layers import Layers, check_layers
from smartfrz_jax.layers.select import Selectors, select
from smartfrz_jax.pytrees import checks, paths, rows
from smartfrz_jax.pytrees.types import PyTree

ACTIVE = "train"
FROZEN = "frozen"


@dataclasses.dataclass(frozen=True, eq=False, init=False, repr=False)
class Frozen:
    """Which layers of a network are frozen: immutable and hashable, to be a static argument of the train step.

    ``print`` shows a table, and so does ``rich.print``.

    Args:
        layers: The layers of the network.
        names: The frozen ones: names, globs, regular expressions, predicates or NNX filters; see
            :func:`smartfrz_jax.layers.select.select`.

    Attributes:
        layers: The layers of the network.
        names: Names of the frozen ones.

    Raises:
        TypeError: If ``layers`` are no :class:`~smartfrz_jax.Layers`, or ``names`` select none.
        ValueError: If one of ``names`` is not a layer of the network.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> Frozen(layers).add("a").active
        ('b',)
    """

    layers: Layers
    names: frozenset[str]

    def __init__(self, layers: Layers, names: Selectors = ()):
        check_layers(layers)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "names", frozenset(select(layers, names)))

    @classmethod
    def of_mask(cls, layers: Layers, mask: np.ndarray) -> Frozen:
        """The frozen set of a boolean mask of shape ``(layers,)``, true where frozen.

        Raises:
            TypeError: If ``layers`` are no :class:`~smartfrz_jax.Layers`, or it is of no booleans.
            ValueError: If it has another shape.
        """
        check_layers(layers)
        if np.shape(mask) != (len(layers),):
            raise ValueError(f"mask: got shape {np.shape(mask)}, expected {(len(layers),)}, a boolean for each layer")
        checks.booleans(np.asarray(mask), "mask", "an array of bool, a boolean for each layer")
        return cls(layers, frozenset(name for name, frozen in zip(layers.names, mask, strict=True) if frozen))

    def add(self, names: Selectors) -> Frozen:
        """This set and the layers that ``names`` select, as in ``Frozen(layers, names)``."""
        return Frozen(self.layers, self.names.union(select(self.layers, names)))

    def changed(self, frozen: Frozen | Selectors) -> Frozen:
        """The frozen set of a network that is to change.

        Args:
            frozen: The new frozen set, or the layers to add to this one, as in ``Frozen(layers, names)``.

        Raises:
            TypeError: If it is neither.
            ValueError: If a layer is not one of the network's, or the set is of another network.
        """
        if not isinstance(frozen, Frozen):
            return Frozen(self.layers, self.names.union(select(self.layers, frozen, "frozen")))
        if frozen.layers.owner.keys() != self.layers.owner.keys():  # else it groups the same parameters otherwise
            check_frozen(frozen, self.layers)
        return frozen

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the layers that train, front to back."""
        return tuple(name for name in self.layers.names if name not in self.names)

    @property
    def mask(self) -> np.ndarray:
        """Boolean array of shape ``(layers,)``, true where frozen."""
        return np.array([name in self.names for name in self.layers.names], bool)

    @functools.cached_property
    def params(self) -> frozenset[str]:
        """Names of the frozen parameters: of rows and lookups, too; of arrays that have these, if wholly frozen."""
        params = {param for layer in self.layers if layer.name in self.names for param in layer.params}
        return frozenset(filter(self.is_frozen, params.union(self.layers.stacks)))

    @functools.cached_property
    def rows(self) -> Mapping[str, tuple[int, ...]]:
        """The rows that train of stacked parameters, and other stacked arrays, of which some do and others do not."""
        found = {}
        for name, stack in self.layers.stacks.items():
            training = tuple(row for row, layer in enumerate(stack.layers) if layer not in self.names)
            if 0 < len(training) < len(stack.layers):
                found[name] = training
        return found

    @property
    def reads_rows(self) -> bool:
        """Whether something is frozen, and stacked blocks train of which rows are layers: scans over them are split."""
        return bool(self.names) and any(not self.is_frozen(name) for name in self.layers.stacks)

    @functools.cached_property
    def lookups(self) -> Mapping[str, bool]:
        """The tables whose lookups are frozen and not the rest, or the other way round; whether it is the lookups."""
        looked_up = {table: layer in self.names for table, layer in self.layers.lookups.items()}
        return {
            table: is_frozen
            for table, is_frozen in looked_up.items()
            if is_frozen != (self.layers.owner[table] in self.names)
        }

    def labels(self, params: PyTree) -> PyTree:
        """``'frozen'`` or ``'train'`` for every leaf of ``params``: labels for ``optax.multi_transform``.

        A stacked leaf of which some rows train is ``'train'``.
        """
        return paths.tree_map(lambda name, _: FROZEN if self.is_frozen(name) else ACTIVE, params)

    def stop_gradient(self, params: PyTree) -> PyTree:
        """``params`` with ``jax.lax.stop_gradient`` on the frozen leaves, and on the frozen rows of stacked ones."""

        def stopped(name: str, leaf: Any) -> Any:
            if self.is_frozen(name):
                return jax.lax.stop_gradient(leaf)
            return _stopped_rows(leaf, self.rows[name], self.layers.stacks[name].axis) if name in self.rows else leaf

        return paths.tree_map(stopped, params)

    def active_leaves(self, tree: PyTree) -> dict[str, Any]:
        """Leaves, and parts of them, of the layers that train, by name, of a tree shaped like the parameters."""
        leaves = paths.flatten(self.layers.unstacked(tree))
        return {name: leaf for name, leaf in leaves.items() if self.layers.holding(name) not in self.names}

    def is_frozen(self, param: str) -> bool:
        """Whether a parameter is frozen, or a part of it; of one that has parts in several layers, all of it."""
        if param in self.layers.stacks:  # of the state, too
            return self.names.issuperset(self.layers.stacks[param].layers)
        if param in self.layers.arrays:
            return self.names.issuperset(self.layers.arrays[param])
        return self.layers.holding(param) in self.names

    def held(self, layers: Iterable[tuple[str, ...]]) -> bool | tuple[bool, ...]:
        """Whether what belongs to several layers is frozen: if all of them are; or in which rows of a stack it is.

        Args:
            layers: The layers: tuples of one, or of those of each row.
        """
        rows = max(map(len, layers := list(layers)), default=1)
        of_row = [[each[row] for row in range(rows)] if len(each) == rows else each for each in layers]
        whole = all(self.names.issuperset(each) for each in layers if len(each) != rows)
        frozen = tuple(
            whole and all(each[row] in self.names for each in of_row if len(each) == rows) for row in range(rows)
        )
        return frozen if any(frozen) and not all(frozen) else all(frozen)

    @property
    def table(self) -> Table:
        """The layers, front to back, and which are frozen."""
        rows = (
            (layer.name, f"{len(layer.params)}", "yes" if layer.name in self.names else "") for layer in self.layers
        )
        title = f"Frozen: {len(self.names)} of {len(self.layers)} layers."
        return Table(title, ("layer", "arrays", "frozen"), tuple(rows))

    def __repr__(self) -> str:
        names = [name for name in self.layers.names if name in self.names]
        shown = ", ".join([*map(repr, names[:3]), *(["..."] if len(names) > 3 else [])])
        return f"<Frozen: {len(names)} of {len(self.layers)} layers{': ' if names else ''}{shown}>"

    def __str__(self) -> str:
        return str(self.table)

    def __rich__(self) -> Table:
        return self.table

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.layers, self.names))

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "names": self.names}  # not what is cached, as of Layers

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Frozen) and self.names == other.names and self.layers == other.layers
        )


def _stopped_rows(array: Any, training: tuple[int, ...], axis: int) -> Any:
    """An array through which derivatives pass in some rows only; no value is copied for that."""
    length = array.shape[axis]

    @jax.custom_jvp
    def same(array: jax.Array) -> jax.Array:
        return array

    @same.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return primals[0], rows.spread(rows.take(tangents[0], training, axis), training, length, axis)

    return same(array)


def check_frozen(frozen: Any, layers: Layers | None = None) -> None:
    """Checks that a frozen set is one, and of a network.

    Args:
        frozen: The frozen set.
        layers: The layers of the network; ``None`` for any.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is of a network with other layers.
    """
    checks.instance(frozen, Frozen, "frozen", "a smartfrz_jax.Frozen; make it with Frozen(layers, names)")
    if layers is not None and frozen.layers != layers:
        raise ValueError(
            f"frozen: got a set of a network of {len(frozen.layers)} layers ({', '.join(frozen.layers.names[:2])}, "
            f"...), expected one of the {len(layers)} layers of this network ({', '.join(layers.names[:2])}, ...); "
            "make it with Frozen(layers, names)"
        )
