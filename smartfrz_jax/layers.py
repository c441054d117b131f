"""From a parameter pytree to its ordered layers, the unit in which training is frozen.

A layer is a kernel (of a convolution, a linear map, an embedding) with its bias and the normalisation that belongs to
it, as in the paper (section 4.1). Every parameter is in exactly one layer, and layers are in forward order.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from smartfrz_jax import dataflow, paths
from smartfrz_jax.blocks import blocks

PyTree = Any
Granularity = Literal["layer", "block"] | Callable[[str], str]

# Leaves with these names are never kernels, whatever their rank (stacked blocks have biases of rank 2).
_VECTOR_NAMES = frozenset({"bias", "scale", "gamma", "beta"})

# Rank of a parameter that the forward pass does not use: before all others, for it never trains.
_UNUSED = (-1,)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A group of parameters that freezes as one.

    Attributes:
        name: Name, unique in the network; usually the path of the module that holds the kernel.
        params: Names of its parameters (see :mod:`smartfrz_jax.paths`).
        kernels: Those of them whose weights stand for the layer where it is sampled; never empty.
        state: Names of the variables beside the parameters that belong to it (NNX only): the statistics of its
            BatchNorm, the random streams of the dropout behind it (of one behind several layers, in each of them).
    """

    name: str
    params: tuple[str, ...]
    kernels: tuple[str, ...]
    state: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Layers(Sequence[Layer]):
    """The layers of a network, front to back: an immutable, hashable sequence of :class:`Layer`.

    A layer that is used again behind others, such as an embedding that is the classifier too, comes where it is used
    last, so policies that go by depth freeze it late, and keep it if it is the head. The layers in between save less
    then: gradients pass through them, frozen or not, to its first use. To have it freeze early, freeze it by name.
    """

    entries: tuple[Layer, ...]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Layer names, front to back."""
        return tuple(layer.name for layer in self.entries)

    @functools.cached_property
    def owner(self) -> Mapping[str, str]:
        """Name of the layer that holds a parameter, by parameter name."""
        return {param: layer.name for layer in self.entries for param in layer.params}

    @property
    def head(self) -> str:
        """Name of the layer that is used last; its weights are the classifier, even if they are an embedding too."""
        return self.names[-1]

    def holding(self, param: str) -> str:
        """Name of the layer that holds a parameter.

        Raises:
            ValueError: If none does.
        """
        if param not in self.owner:
            raise ValueError(
                f"params: {param!r} belongs to no layer; the layers were found for other parameters "
                f"({', '.join(list(self.owner)[:3])}, ...). Call find_layers on the parameters that train"
            )
        return self.owner[param]

    def check(self, names: Iterable[str], argument: str) -> tuple[str, ...]:
        """Returns the layer names in forward order.

        Args:
            names: Layer names.
            argument: What to call ``names`` in the error.

        Raises:
            ValueError: If one of them is not a layer of this network.
        """
        wanted = {names} if isinstance(names, str) else set(names)
        for unknown in sorted(wanted.difference(self.names), key=str):
            near = difflib.get_close_matches(str(unknown), self.names, n=3, cutoff=0.4) or self.names[:3]
            raise ValueError(
                f"{argument}: no layer is called {unknown!r}; did you mean {' or '.join(map(repr, near))}? "
                f"The network's {len(self)} layers are in its Layers' `names`"
            )
        return tuple(name for name in self.names if name in wanted)

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


def find_layers(
    params: PyTree, forward: Callable[..., Any], *inputs: Any, granularity: Granularity = "layer"
) -> Layers:
    """Layers of a parameter pytree, in the order in which a forward pass uses them.

    A normalisation (or any other group of vectors) joins the kernel whose output it works on; where several kernels
    feed it, as behind a residual connection, it joins the kernel just before or just after it in forward order,
    whichever is closer by name, the one before if both are. Layers of which ``forward`` uses no parameter come first:
    they never train. One that is used again behind others, as an embedding that is the classifier too, comes where it
    is used last.

    Args:
        params: Parameter pytree; arrays or ``jax.ShapeDtypeStruct``.
        forward: A JAX-traceable function of ``(params, *inputs)``. It is only traced.
        *inputs: An example batch, or ``jax.ShapeDtypeStruct`` of its shape.
        granularity: ``"layer"``, or ``"block"`` for one layer per residual or transformer block (the modules of a list,
            ``blocks/3``, or numbered by name beside others, ``encoderblock_3``), or a function from a parameter's name
            to the name of its layer.

    Returns:
        The layers, front to back.

    Raises:
        ValueError: If ``params`` has no leaves, or ``granularity`` is not one of the above.
        TypeError: If a leaf of ``params`` is not an array of floating-point numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"z": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}, "a": {"kernel": jnp.ones((8, 2))}}
        >>> def forward(p, x):
        ...     return (x @ p["z"]["kernel"] + p["z"]["bias"]) @ p["a"]["kernel"]
        >>> find_layers(params, forward, jnp.ones((1, 4))).names
        ('z', 'a')
    """
    return group(check_params(params), dataflow.consumption(forward, params, *inputs), granularity)


def check_params(params: PyTree) -> dict[str, Any]:
    """Leaves of a parameter pytree by name.

    Raises:
        ValueError: If there are none.
        TypeError: If a leaf is not an array of floating-point, or complex, numbers.
    """
    leaves = paths.flatten(params)
    if not leaves:
        raise ValueError(
            f"params: got a pytree without leaves ({jax.tree.structure(params)}); pass the network's parameters, "
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
    return leaves


def group(
    leaves: Mapping[str, Any],
    used: dataflow.Consumption,
    granularity: Granularity,
    state: Collection[str] = (),
) -> Layers:
    """Layers from the order in which parameters are used.

    Args:
        leaves: Parameters by name.
        used: Where they, and the variables of ``state``, are consumed.
        granularity: As in :func:`find_layers`.
        state: Names of variables that do not train but belong to layers.

    Returns:
        The layers, front to back.

    Raises:
        ValueError: If ``granularity`` is unknown.
    """
    if not callable(granularity) and granularity not in ("layer", "block"):
        raise ValueError(
            f"granularity: got {granularity!r}, expected 'layer', 'block' or a function of a parameter's name"
        )
    rank = {name: used.first.get(name, _UNUSED) for name in (*leaves, *state)}
    attached = _attach(_modules(leaves, state), leaves, rank, used.sources)
    block_of = blocks(attached) if granularity == "block" else {}
    members: dict[str, list[str]] = {}
    for host, names in attached.items():
        kernel = next((name for name in names if name in leaves), host)
        for name in names:
            if callable(granularity):
                layer = granularity(name if name in leaves else kernel)
            else:
                layer = block_of.get(host, host)
            members.setdefault(layer, []).append(name)
    entries = []
    for layer, names in members.items():
        params = tuple(name for name in names if name in leaves)
        kernels = tuple(name for name in params if _is_kernel(name, leaves[name]))
        entries.append(Layer(layer, params, kernels or params, tuple(name for name in names if name not in leaves)))

    def position(layer: Layer) -> tuple[int, ...]:
        again = used.used_again((*layer.params, *layer.state)).keys() & set(layer.params)
        return max((used.uses[name][-1] for name in again), default=_first_use(layer.params, rank))

    return Layers(tuple(sorted(entries, key=position)))


def _first_use(names: Iterable[str], rank: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return min((rank[name] for name in names if rank[name] != _UNUSED), default=_UNUSED)


def _modules(leaves: Mapping[str, Any], state: Collection[str]) -> dict[str, list[str]]:
    """Variables by the module that holds them; parameters beside submodules, or at the root, stand alone."""
    parents = {name: name.rpartition(paths.SEPARATOR)[0] for name in leaves}
    with_children = {""}
    for parent in parents.values():
        while parent:
            parent = parent.rpartition(paths.SEPARATOR)[0]
            with_children.add(parent)
    modules: dict[str, list[str]] = {}
    for name, parent in parents.items():
        modules.setdefault(name if parent in with_children else parent, []).append(name)
    for name in state:
        modules.setdefault(name.rpartition(paths.SEPARATOR)[0] or name, []).append(name)
    return modules


def _is_kernel(name: str, leaf: Any) -> bool:
    return len(leaf.shape) >= 2 and name.rpartition(paths.SEPARATOR)[2] not in _VECTOR_NAMES


def _attach(
    modules: dict[str, list[str]],
    leaves: Mapping[str, Any],
    rank: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, frozenset[str]],
) -> dict[str, list[str]]:
    """Joins modules without a kernel to one that has a kernel."""
    order = sorted(modules, key=lambda module: _first_use(modules[module], rank))
    with_params = [module for module in order if any(name in leaves for name in modules[module])]
    with_kernel = [
        m for m in with_params if any(name in leaves and _is_kernel(name, leaves[name]) for name in modules[m])
    ]
    hosts = with_kernel or with_params
    module_of = {param: module for module in order for param in modules[module]}
    host_of = {host: host for host in hosts}
    before: str | None = None
    for position, module in enumerate(order):
        if module in host_of:
            before = module
            continue
        source_hosts = {
            host_of.get(module_of[s])
            for name in modules[module]
            for s in sources.get(name, ())
            if module_of[s] != module
        }
        after = next((m for m in order[position:] if m in host_of), None)
        if len(source_hosts) == 1 and None not in source_hosts:
            (host,) = source_hosts
        elif before is None or (after is not None and _shared(module, after) > _shared(module, before)):
            host = after
        else:
            host = before
        assert host is not None
        host_of[module] = host
    members: dict[str, list[str]] = {host: [] for host in hosts}
    for module in [*hosts, *order]:
        if not members[host_of[module]] or module not in hosts:
            members[host_of[module]].extend(modules[module])
    return members


def _shared(first: str, second: str) -> int:
    """Number of leading path components in common."""
    pairs = zip(first.split(paths.SEPARATOR), second.split(paths.SEPARATOR), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(first.count("/"), second.count("/")) + 1)
