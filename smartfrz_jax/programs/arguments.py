"""Arguments of a step: taken apart, and with shapes in place of arrays, which is what it is compiled for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Key:
    """What a program is for.

    Attributes:
        modules: Graph definition of the modules, with the optimizers and their frozen sets. Their static attributes,
            which need not be hashable, are told apart by equality; by identity if they cannot be compared.
        rest: Structure of the other arguments.
        batch: Structure, shapes and dtypes of what is neither a module nor a ``TrainState``.
    """

    modules: Any
    rest: Any
    batch: Any

    @functools.cached_property
    def _hash(self) -> int:
        # JAX leaves what is static out of a structure's hash.
        return hash((jax.tree.structure(self.modules), self.rest, self.batch))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return False
        try:
            alike = self.batch == other.batch and self.rest == other.rest
        except (TypeError, ValueError):  # what is static is another object and cannot be compared
            return False
        return alike and _are_same(self.modules, other.modules)


def _are_same(one: Any, other: Any) -> bool:
    """Whether two values are equal; parts of dataclasses and sequences that cannot be compared, if they are identical.

    Up to Python 3.12, ``==`` of dataclasses looks at the identity of their fields first by itself.
    """
    if one is other:
        return True
    try:
        return bool(one == other)
    except (TypeError, ValueError):
        pass
    if type(one) is not type(other):
        return False
    if dataclasses.is_dataclass(one):
        fields = [field.name for field in dataclasses.fields(one) if field.compare]
        return all(_are_same(getattr(one, name), getattr(other, name)) for name in fields)
    is_sequence = isinstance(one, list | tuple)
    return is_sequence and len(one) == len(other) and all(map(_are_same, one, other))


class Arguments:
    """Arguments of a step, taken apart.

    Args:
        args: The arguments.

    Attributes:
        args: The arguments.
        nodes: The modules and lone variables, in order, which the step changes in place.
        rest: What it only reads, in order: arrays, and every ``TrainState`` as a whole.
        owners: What has a frozen set, in order.
    """

    def __init__(self, args: tuple[Any, ...]):
        self.args = args
        self._leaves, self._structure = jax.tree.flatten(args, is_leaf=_is_whole)
        self.nodes = [leaf for leaf in self._leaves if is_node(leaf)]
        self.rest = [leaf for leaf in self._leaves if not is_node(leaf)]

    @functools.cached_property
    def owners(self) -> list[Any]:
        """What has a frozen set, each once.

        Raises:
            TypeError: If nothing has.
        """
        owners = list({id(leaf): leaf for leaf in self._leaves if has_frozen(leaf)}.values())
        if not owners:
            raise TypeError(
                f"args: none of {', '.join(type(arg).__name__ for arg in self.args)} has a frozen set; pass the "
                "TrainState of smartfrz_jax.linen or the Optimizer of smartfrz_jax.nnx"
            )
        return owners

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        """The frozen sets of the owners."""
        return tuple(owner.frozen for owner in self.owners)

    @functools.cached_property
    def batch(self) -> Any:
        """As of :class:`Key`."""
        return self._structure, tuple(_shape_and_type(leaf) for leaf in self._leaves)

    @property
    def call(self) -> Any:
        """Equal for calls with a batch of the same shapes and the very same modules."""
        return self.batch, tuple(map(id, self.nodes))

    @functools.cached_property
    def key(self) -> Key:
        """Equal for calls with the same program."""
        # The optimizer and the frozen set are static in their owner; those of equal ones are equal.
        return Key(nnx.graphdef(self.nodes), jax.tree.structure(self.rest), self.batch)

    @property
    def placement(self) -> list[Any]:
        """Shape, dtype and devices of all arrays."""
        return [
            (np.shape(leaf), getattr(leaf, "dtype", None), getattr(leaf, "sharding", None))
            for leaf in jax.tree.leaves((nnx.state(self.nodes), self.rest))
        ]

    def put(self, nodes: Iterable[Any], rest: Iterable[Any]) -> tuple[Any, ...]:
        """The arguments with others in place of ``nodes`` and ``rest``."""
        nodes, rest = iter(nodes), iter(rest)
        return jax.tree.unflatten(self._structure, [next(nodes if is_node(leaf) else rest) for leaf in self._leaves])

    def replace_owners(self, others: dict[int, Any]) -> tuple[Any, ...]:
        """The arguments with others in place of some owners, given by their place among ``owners``."""
        new = {id(self.owners[place]): other for place, other in others.items()}
        return jax.tree.unflatten(self._structure, [new.get(id(leaf), leaf) for leaf in self._leaves])


def is_node(value: Any) -> bool:
    """Whether a step changes it in place: a module, or a variable by itself."""
    return isinstance(value, nnx.Pytree | nnx.Variable)


def has_frozen(arg: Any) -> bool:
    """Whether it is a ``TrainState`` or an ``Optimizer`` with a frozen set."""
    return isinstance(getattr(arg, "frozen", None), Frozen)


def _is_whole(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable | jax.Array | np.ndarray) or has_frozen(value)


def _shape_and_type(leaf: Any) -> Any:
    if is_node(leaf) or has_frozen(leaf):
        return type(leaf)
    return np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))


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
