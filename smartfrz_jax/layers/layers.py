"""The layers of a network, the unit in which training is frozen.

Every parameter is in exactly one layer, and layers are in forward order.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp

from smartfrz_jax.layers.lookups import Lookup, apart
from smartfrz_jax.layers.rows import Row, Stack, stacked, unstacked
from smartfrz_jax.pytrees import checks, paths
from smartfrz_jax.pytrees.types import PyTree


@dataclasses.dataclass(frozen=True)
class Layer:
    """A group of parameters that freezes as one.

    Attributes:
        name: Name, unique in the network; usually the path of the module that holds the kernel.
        params: Names of its parameters (see :mod:`smartfrz_jax.pytrees.paths`).
        kernels: Those of them whose weights stand for the layer where it is sampled; never empty.
        state: Names of the variables beside the parameters that belong to it (NNX only): the statistics of its
            BatchNorm, the random streams of the dropout behind it (of one behind several layers, in each of them).
        rows: Those of its parameters, and of its state, that are rows of stacked arrays. In ``params``, ``kernels`` and
            ``state`` they have names such as ``blocks/up/kernel[3]``.
        lookups: The lookups in a table that belongs to another layer. In ``params`` and ``kernels`` the table has the
            name ``embed/embedding[lookup]``.
    """

    name: str
    params: tuple[str, ...]
    kernels: tuple[str, ...]
    state: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    lookups: tuple[Lookup, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Layers(Sequence[Layer]):
    """The layers of a network, front to back: an immutable, hashable sequence of :class:`Layer`.

    A layer that is used again behind others, such as an embedding that is the classifier too, comes where it is used
    last, so policies that go by depth freeze it late, and keep it if it is the head. The layers in between save less
    then: gradients pass through them, frozen or not, to its first use. To have it freeze early, freeze it by name. To
    freeze the first use alone, find the layers with ``lookups=True``: the lookup is a layer of its own then, the layers
    behind it save all that they could, and the table goes on training as the head.

    Example:
        >>> from smartfrz_jax import Frozen, account, find_layers
        >>> params, tokens = {"embed": jnp.ones((9, 8)), "body": jnp.ones((8, 8))}, jnp.arange(4)
        >>> def loss(params, tokens):
        ...     return (params["embed"][tokens] @ params["body"] @ params["embed"].T).mean()
        >>> whole, apart = (find_layers(params, loss, tokens, lookups=lookups) for lookups in (False, True))
        >>> whole.names, apart.names
        (('body', 'embed'), ('embed/lookup', 'body', 'embed'))
        >>> for layers in (whole, apart):
        ...     step = account(params, layers, loss, tokens).flops(Frozen(layers, layers.names[:-1]))
        ...     print(step.by_layer["body"].activation_gradients)
        512.0
        0.0
    """

    entries: tuple[Layer, ...]

    def __post_init__(self) -> None:
        expected = "a tuple of smartfrz_jax.Layer"
        checks.instance(self.entries, tuple, "entries", expected)
        for layer in self.entries:
            checks.instance(layer, Layer, "entries", expected)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Layer names, front to back."""
        return tuple(layer.name for layer in self.entries)

    @functools.cached_property
    def owner(self) -> Mapping[str, str]:
        """Name of the layer that holds a parameter, by parameter name."""
        return {param: layer.name for layer in self.entries for param in layer.params}

    @functools.cached_property
    def stacks(self) -> Mapping[str, Stack]:
        """Arrays whose rows are in layers of their own, by name: parameters, and state."""
        owners: dict[tuple[str, int], dict[int, str]] = {}
        for layer in self.entries:
            for row in layer.rows:
                owners.setdefault((row.array, row.axis), {})[row.position] = layer.name
        return {
            name: Stack(axis, tuple(of_row[position] for position in sorted(of_row)))
            for (name, axis), of_row in owners.items()
        }

    @functools.cached_property
    def arrays(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the layers that hold a parameter or a part of it, by the name that it has among the parameters."""
        found: dict[str, tuple[str, ...]] = {}
        for param, layer in self.owner.items():
            array = self.array_of.get(param, param)
            if array in self.stacks:
                found[array] = self.stacks[array].layers
            else:
                found[array] = (*found.get(array, ()), layer)
        return found

    @functools.cached_property
    def array_of(self) -> Mapping[str, str]:
        """Names of the arrays that rows, and what lookups read, are of, by the names that these have in layers."""
        parts = ((*layer.rows, *layer.lookups) for layer in self.entries)
        return {part.name: part.array for of_layer in parts for part in of_layer}

    @functools.cached_property
    def lookups(self) -> Mapping[str, str]:
        """Names of the layers of lookups, by that of the table, which is a parameter of another layer."""
        return {lookup.array: layer.name for layer in self.entries for lookup in layer.lookups}

    @functools.cached_property
    def of_parts(self) -> Layers:
        """The layers of what :meth:`unstacked` gives: there a row, or what a lookup reads, is a parameter as others."""
        if not self.array_of:
            return self
        return Layers(tuple(dataclasses.replace(layer, rows=(), lookups=()) for layer in self.entries))

    def unstacked(self, tree: PyTree) -> PyTree:
        """A tree named as the parameters are, with a leaf for each row, and each lookup, in a layer of its own.

        The leaf of a lookup is that of the table. Where there is none of either, it is the tree itself; else a
        dictionary by name.
        """
        if not self.lookups:
            return unstacked(tree, self.stacks)
        leaves = paths.flatten(tree)
        looked_up = {Lookup(table).name: leaves[table] for table in self.lookups if table in leaves}
        return {**paths.flatten(unstacked(tree, self.stacks)), **looked_up}

    def of_unstacked(self, function: Callable[..., Any], like: PyTree) -> Callable[..., Any]:
        """A function of what :meth:`unstacked` gives, and of further arguments, from one of parameters.

        Args:
            function: A JAX-traceable function of ``(params, *args)``.
            like: A tree with the structure of ``params``.
        """
        if not self.array_of:
            return function
        run = apart(function, self.lookups) if self.lookups else lambda params, _, *args: function(params, *args)

        def of_unstacked(parts: PyTree, *args: Any) -> Any:
            of_lookups = {table: parts[Lookup(table).name] for table in self.lookups}
            return run(stacked(parts, like, self.stacks), of_lookups, *args)

        return of_unstacked

    @property
    def head(self) -> str:
        """Name of the layer that is used last; its weights are the classifier, even if they are an embedding too."""
        return self.names[-1]

    def holding(self, param: str) -> str:
        """Name of the layer that holds a parameter.

        Raises:
            ValueError: If none does.
        """
        checks.instance(param, str, "param", "the name of a parameter, a string")
        if param not in self.owner:
            raise ValueError(
                f"params: {param!r} belongs to no layer, expected parameters that the layers were found for "
                f"({', '.join(list(self.owner)[:3])}, ...); call find_layers on the parameters that train, "
                "with the wrt of the optimizer"
            )
        return self.owner[param]

    def check(self, names: Iterable[str], argument: str) -> tuple[str, ...]:
        """Returns the layer names in forward order.

        Args:
            names: Layer names.
            argument: What to call ``names`` in the error.

        Raises:
            TypeError: If they are no names.
            ValueError: If one of them is not a layer of this network.
        """
        wanted = set(checks.names(names, argument))
        for unknown in sorted(wanted.difference(self.names)):
            raise ValueError(f"{argument}: no layer is called {unknown!r}; {self.hint(unknown)}")
        return tuple(name for name in self.names if name in wanted)

    def hint(self, unknown: str, others: Iterable[str] = ()) -> str:
        """What someone may have meant who named a layer that is none, for an error.

        Args:
            unknown: The name.
            others: Guesses that come first.
        """
        near = difflib.get_close_matches(unknown, self.names, n=3, cutoff=0.4) or self.names[:3]
        return (
            f"did you mean {' or '.join(map(repr, (*others, *near)))}? "
            f"The network's {len(self)} layers are in its Layers' `names`"
        )

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Layer, ...]: ...
    def __getitem__(self, index: int | slice) -> Layer | tuple[Layer, ...]:
        return self.entries[index]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.entries)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.entries)

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {"entries": self.entries}  # not what is cached: another process hashes strings to other numbers

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layers) and self.entries == other.entries)


def check_layers(layers: Any, argument: str = "layers") -> None:
    """Raises ``TypeError`` unless ``layers`` are :class:`Layers`."""
    checks.instance(
        layers,
        Layers,
        argument,
        "a smartfrz_jax.Layers; find them with find_layers, of smartfrz_jax, smartfrz_jax.nnx or smartfrz_jax.linen",
    )


def check_leaves(tree: PyTree, argument: str) -> dict[str, Any]:
    """Leaves of a pytree of arrays by name.

    Raises:
        TypeError: If one is no array.
        ValueError: If there are none.
    """
    leaves = paths.flatten(tree)
    if not leaves:
        raise ValueError(f"{argument}: got a pytree without leaves ({jax.tree.structure(tree)}), expected arrays")
    for name, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"{argument}: leaf {name!r} is {type(leaf).__name__}, expected an array")
    return leaves


def check_of_layers(found: Mapping[str, Any], layers: Layers) -> None:
    """Raises ``ValueError`` unless what is found of a network, by name, has the parameters of all layers."""
    for name, of_layers in layers.arrays.items():
        if name not in found:
            raise ValueError(
                f"params: got {len(found)} without {name!r} of layer {of_layers[0]!r}, expected those that the "
                "layers were found for"
            )


def check_params(params: PyTree) -> dict[str, Any]:
    """Leaves of a parameter pytree by name.

    Raises:
        ValueError: If there are none, or one has no name.
        TypeError: If a leaf is not an array of floating-point, or complex, numbers.
    """
    leaves = paths.flatten(params)
    if not leaves:
        raise ValueError(
            f"params: got a pytree without leaves ({jax.tree.structure(params)}), expected the network's parameters, "
            "for example variables['params'] of a Linen model"
        )
    for name, leaf in leaves.items():
        if not hasattr(leaf, "shape"):
            raise TypeError(
                f"params: leaf {name!r} is {type(leaf).__name__}, expected an array; leave out what does not train"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"params: leaf {name!r} is {leaf.dtype}{list(leaf.shape)}, expected floating-point numbers: JAX "
                "differentiates nothing else, frozen or not; let the function close over it, or make it an input (in "
                "NNX, an nnx.Variable that is no nnx.Param)"
            )
    if "" in leaves:
        raise ValueError(
            f"params: got {checks.got(leaves[''])} without a name, expected one for each array; put it in a dict"
        )
    return leaves
