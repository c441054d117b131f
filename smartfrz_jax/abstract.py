"""Arguments of a step: taken apart, and with shapes in place of arrays, which is what it is compiled for."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from smartfrz_jax import paths
from smartfrz_jax.freezing import Frozen

PyTree = Any

_LEAF = jax.tree.structure(0)


class Key(NamedTuple):
    """What a program is for.

    Attributes:
        structure: Of all arguments, with the optimizer and its frozen set.
        batch: Structure, shapes and dtypes of what is neither a module nor the owner of the frozen set.
    """

    structure: Any
    batch: Any


class Arguments:
    """Arguments of a step, taken apart into what ``nnx.jit`` writes into and what it only reads.

    Args:
        args: The arguments.
        nested: Whether to look for modules inside of dicts, lists and other pytrees too, as ``nnx.jit`` does.

    Attributes:
        args: The arguments.
        nodes: The modules and lone variables, in order.
        rest: What else each argument holds, with ``None`` in place of nodes.
    """

    def __init__(self, args: tuple[Any, ...], *, nested: bool = True):
        self.args = args
        self.nodes: list[Any] = []
        self.rest: list[Any] = []
        self._structure: list[Any] = []
        for arg in args:
            leaves, structure = [arg], _LEAF
            if nested and not isinstance(arg, jax.Array | np.ndarray | nnx.Pytree):
                leaves, structure = jax.tree.flatten(arg, is_leaf=is_node)
            self.nodes += filter(is_node, leaves)
            self.rest.append([None if is_node(leaf) else leaf for leaf in leaves])
            self._structure.append(structure)

    @property
    def owner(self) -> Any:
        """The argument that has the frozen set.

        Raises:
            TypeError: If there is none.
        """
        owner = next(filter(has_frozen, self.args), None)
        if owner is None:
            raise TypeError(
                f"args: none of {', '.join(type(arg).__name__ for arg in self.args)} has a frozen set; pass the "
                "TrainState of smartfrz_jax.linen or the Optimizer of smartfrz_jax.nnx"
            )
        return owner

    @functools.cached_property
    def batch(self) -> Any:
        """As of :class:`Key`."""
        owner = self.owner
        parts = [
            ([], _LEAF) if arg is owner else part
            for arg, *part in zip(self.args, self.rest, self._structure, strict=True)
        ]
        leaves, structure = jax.tree.flatten([rest for rest, _ in parts])
        shapes = tuple((np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves)
        return structure, tuple(tree for _, tree in parts), shapes

    @property
    def call(self) -> Any:
        """Equal for calls with a batch of the same shapes and the very same modules."""
        return self.batch, tuple(map(id, self.nodes))

    @functools.cached_property
    def key(self) -> Key:
        """Equal for calls with the same program."""
        # The optimizer and the frozen set are static in their owner; those of equal ones are equal.
        structure = nnx.graphdef(tuple(self.nodes)), jax.tree.structure(self.rest), tuple(self._structure)
        return Key(structure, self.batch)

    @property
    def placement(self) -> list[Any]:
        """Shape, dtype and devices of all arrays."""
        return [
            (np.shape(leaf), getattr(leaf, "dtype", None), getattr(leaf, "sharding", None))
            for leaf in jax.tree.leaves((nnx.state(tuple(self.nodes)), self.rest))
        ]


def is_node(value: Any) -> bool:
    """Whether ``nnx.jit`` writes back into it what the step changes: a module, or a variable by itself."""
    return isinstance(value, nnx.Pytree | nnx.Variable)


def has_frozen(arg: Any) -> bool:
    """Whether it is a ``TrainState`` or an ``Optimizer`` with a frozen set."""
    return isinstance(getattr(arg, "frozen", None), Frozen)


def of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with ``jax.ShapeDtypeStruct`` in place of their arrays: modules, and pytrees with or without such.

    Modules that share variables still do.
    """
    leaves, structure = jax.tree.flatten(args, is_leaf=is_node)
    graphdef, state = nnx.split([leaf for leaf in leaves if is_node(leaf)])
    nodes = iter(nnx.merge(graphdef, jax.tree.map(_shape, state)))
    return jax.tree.unflatten(structure, [next(nodes) if is_node(leaf) else _shape(leaf) for leaf in leaves])


def _shape(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        weak_type = getattr(leaf, "weak_type", False)  # random keys have none
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding, weak_type=weak_type)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, np.ndarray) else leaf


def placed(shapes: PyTree, before: PyTree, params: PyTree) -> PyTree:
    """Shapes with the devices of the arrays that they will be.

    Args:
        shapes: Pytree of ``jax.ShapeDtypeStruct``, such as a state of an optimizer.
        before: Pytree of arrays; those of the same name stay where they are.
        params: The parameters; what is new lies where the parameter does that its name ends with, whole keys of it.
    """
    known = paths.flatten(before)
    # The longest first: the name of one parameter may itself end with that of another.
    endings = {paths.SEPARATOR + param: leaf for param, leaf in paths.flatten(params).items()}
    longest_first = sorted(endings, key=len, reverse=True)

    def place(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        like = known.get(name)
        if like is None:
            like = next((endings[end] for end in longest_first if (paths.SEPARATOR + name).endswith(end)), None)
        # State that is not shaped like its parameter, such as Adafactor's rows and columns, starts anywhere.
        sharding = getattr(like, "sharding", None) if like is not None and like.shape == leaf.shape else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)

    return paths.tree_map(place, shapes)
