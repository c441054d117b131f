"""From a parameter pytree to its layers: which parameters belong together, and in which order they are used.

A layer is a kernel (of a convolution, a linear map, an embedding) with its bias and the normalisation that belongs to
it, as in the paper (section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from smartfrz_jax.layers import dataflow, stacks
from smartfrz_jax.layers.blocks import blocks
from smartfrz_jax.layers.layers import Layer, Layers, check_params
from smartfrz_jax.layers.lookups import Lookup
from smartfrz_jax.layers.overwritten import homes
from smartfrz_jax.layers.row_layers import by_row
from smartfrz_jax.pytrees import checks, paths
from smartfrz_jax.pytrees.types import PyTree

Granularity = Literal["layer", "block"] | Callable[[str], str]

# Leaves with these names are never kernels, whatever their rank (stacked blocks have biases of rank 2).
_VECTOR_NAMES = frozenset({"bias", "scale", "offset", "gamma", "beta"})

# Rank of a parameter that the forward pass does not use: before all others, for the last layer is the head.
_UNUSED = (-1,)


def find_layers(
    params: PyTree,
    forward: Callable[..., Any],
    *inputs: Any,
    granularity: Granularity = "layer",
    rows: bool = False,
    lookups: bool = False,
) -> Layers:
    """Layers of a parameter pytree, in the order in which a forward pass uses them.

    A normalisation (or any other group of vectors) joins the kernel whose output it works on; where several kernels
    feed it, as behind a residual connection, it joins the kernel just before or just after it in forward order,
    whichever is closer by name, the one before if both are. Layers of which ``forward`` uses no parameter come first,
    and vectors that it does not use join the first layer. So pass as ``forward`` all that the loss computes: a head or
    a temperature that only the loss reads would be frozen before the layers in front of it. One that is used again
    behind others, as an embedding that is the classifier too, comes where it is used last. The stacked weights of a
    block that a scan runs many times, each time with the next row, are one layer, named by the module that holds them;
    with ``rows``, each row of them is one, ``blocks/0``, ``blocks/1``, ... The lookups in a table that the network
    reads otherwise too, as its head, are a layer before it with ``lookups``, ``embed/lookup``.

    Args:
        params: Parameter pytree; arrays or ``jax.ShapeDtypeStruct``.
        forward: A JAX-traceable function of ``(params, *inputs)`` that reads all parameters that the loss does. It is
            only traced, outside of ``jax.pmap`` too: axes that it names are there for the trace.
        *inputs: An example batch, or ``jax.ShapeDtypeStruct`` of its shape; flags (``True``, ``False``, texts) too.
        granularity: ``"layer"``, or ``"block"`` for one layer per residual or transformer block (the modules of a list,
            ``blocks/3``, or numbered by name beside others, ``encoderblock_3``), or a function from a parameter's name
            to the name of its layer.
        rows: Whether the blocks that a ``jax.lax.scan``, ``nn.scan`` or ``nnx.scan`` runs with one row of their stacked
            weights after the other are layers of their own, in that order. What reads rows in another way, such as a
            loop that indexes its weights, and tables of vectors, stay whole.
        lookups: Whether lookups (``table[tokens]``, ``jnp.take``, ``nnx.Embed``) in a table that is used again behind
            them are a layer of their own. Where it is frozen, no gradient passes by way of the lookups; the table goes
            on training by way of its other uses, and what the lookups give goes on changing. A product with one-hot
            vectors is no lookup.

    Returns:
        The layers, front to back.

    Raises:
        ValueError: If ``params`` has no leaves, or one without a name, ``forward`` closes over them, or
            ``granularity`` is not one of the above.
        TypeError: If a leaf of ``params`` is not an array of floating-point numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"z": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}, "a": {"kernel": jnp.ones((8, 2))}}
        >>> def forward(p, x):
        ...     return (x @ p["z"]["kernel"] + p["z"]["bias"]) @ p["a"]["kernel"]
        >>> find_layers(params, forward, jnp.ones((1, 4))).names
        ('z', 'a')
    """
    checks.function(forward, "forward", "a function of (params, *inputs)")
    leaves = check_params(params)
    checks.flag(lookups, "lookups")
    used = dataflow.consumption(forward, params, *inputs, tables=leaves if lookups else ())
    return group(leaves, used, granularity, rows=rows)


def group(
    leaves: Mapping[str, Any],
    used: dataflow.Consumption,
    granularity: Granularity,
    state: Collection[str] = (),
    *,
    rows: bool = False,
) -> Layers:
    """Layers from the order in which parameters are used.

    Args:
        leaves: Parameters by name.
        used: Where they, and the variables of ``state``, are consumed.
        granularity: As in :func:`find_layers`.
        state: Names of variables that do not train but belong to layers.
        rows: As in :func:`find_layers`.

    Returns:
        The layers, front to back.

    Raises:
        ValueError: If ``granularity`` is unknown.
    """
    checks.flag(rows, "rows")
    if not callable(granularity) and (not isinstance(granularity, str) or granularity not in ("layer", "block")):
        raise ValueError(
            f"granularity: got {granularity!r}, expected 'layer', 'block' or a function of a parameter's name"
        )
    leaves = {**leaves, **{lookup.name: leaves[lookup.array] for lookup in used.lookups}}
    rank = {name: used.first.get(name, _UNUSED) for name in (*leaves, *state)}
    modules = _with_stacks(_with_lookups(_modules(leaves, state), used.lookups), rank, used.stacks)
    attached = _attach(modules, leaves, rank, used)
    block_of = blocks(attached) if granularity == "block" else {}
    members: dict[str, dict[str, None]] = {}
    for host, names in attached.items():
        kernel = next((name for name in names if name in leaves), host)
        for name in names:
            if callable(granularity):
                layer = granularity(name if name in leaves else kernel)
                if not isinstance(layer, str):
                    raise TypeError(
                        f"granularity: got {checks.got(layer)} for {name!r}, expected a string, the name of its layer"
                    )
            else:
                layer = block_of.get(host, host)
            members.setdefault(layer, {})[name] = None
    entries = []
    for layer, names in members.items():
        params = tuple(name for name in names if name in leaves)
        kernels = tuple(name for name in params if _is_kernel(name, leaves[name]))
        of_state = tuple(name for name in names if name not in leaves)
        looked_up = tuple(lookup for lookup in used.lookups if lookup.name in params)
        entries.append(Layer(layer, params, kernels or params, of_state, lookups=looked_up))

    def position(layer: Layer) -> tuple[int, ...]:
        again = used.used_again((*layer.params, *layer.state)).keys() & set(layer.params)
        return max((used.uses[name][-1] for name in again), default=_first_use(layer.params, rank))

    layers = Layers(tuple(sorted(entries, key=position)))
    return by_row(layers, leaves, used.scans, _is_kernel, rank) if rows else layers


def _first_use(names: Iterable[str], rank: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return min((rank[name] for name in names if rank[name] != _UNUSED), default=_UNUSED)


def _modules(leaves: Mapping[str, Any], state: Collection[str]) -> dict[str, list[str]]:
    """Variables by the module that holds them; parameters beside submodules, or at the root, stand alone.

    So do variables that do not train, where the module has no parameters.
    """
    parents = homes(leaves)
    with_children = {""}
    for parent in parents.values():
        while parent:
            parent = parent.rpartition(paths.SEPARATOR)[0]
            with_children.add(parent)
    modules: dict[str, list[str]] = {}
    for name, parent in parents.items():
        modules.setdefault(name if parent in with_children else parent, []).append(name)
    for name in state:
        parent = name.rpartition(paths.SEPARATOR)[0]
        modules.setdefault(parent if parent in modules else name, []).append(name)
    return modules


def _with_lookups(modules: dict[str, list[str]], lookups: Iterable[Lookup]) -> dict[str, list[str]]:
    """The modules, with one for the lookups in each table."""
    module_of = {name: module for module, names in modules.items() for name in names}
    looked_up = {lookup.name: module_of[lookup.array] for lookup in lookups}
    rest = {module: [name for name in names if name not in looked_up] for module, names in modules.items()}
    own = {f"{module}{paths.SEPARATOR}lookup": [name] for name, module in looked_up.items()}
    return {module: names for module, names in rest.items() if names} | own


def _is_kernel(name: str, leaf: Any) -> bool:
    return len(leaf.shape) >= 2 and name.rpartition(paths.SEPARATOR)[2] not in _VECTOR_NAMES


def _attach(
    modules: dict[str, list[str]],
    leaves: Mapping[str, Any],
    rank: Mapping[str, tuple[int, ...]],
    used: dataflow.Consumption,
) -> dict[str, list[str]]:
    """Joins modules without a kernel to one that has a kernel; those that nothing connects to one, to several."""
    with_kernel = [m for m in modules if any(name in leaves and _is_kernel(name, leaves[name]) for name in modules[m])]
    modules = _with_merged(modules, with_kernel, used.merged)
    order = sorted(modules, key=lambda module: _first_use(modules[module], rank))
    with_params = [module for module in order if any(name in leaves for name in modules[module])]
    hosts = [module for module in order if module in with_kernel] or with_params
    module_of = {param: module for module in order for param in modules[module]}
    host_of = {host: host for host in hosts}
    several: dict[str, list[str]] = {}
    before: str | None = None
    for position, module in enumerate(order):
        if module in host_of:
            before = module
            continue
        if module not in with_params and _first_use(modules[module], rank) == _UNUSED:
            several[module] = _around(module, hosts)
            continue
        source_hosts = {
            host_of.get(module_of[s])
            for name in modules[module]
            for s in used.sources.get(name, ())
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
    members: dict[str, list[str]] = {host: list(modules[host]) for host in hosts}
    for module in order:
        for host in several.get(module, [host_of.get(module, module)]):
            if host != module:
                members[host].extend(modules[module])
    return members


def _with_stacks(
    modules: dict[str, list[str]], rank: Mapping[str, tuple[int, ...]], stacked: Iterable[Collection[str]]
) -> dict[str, list[str]]:
    """The modules, where those of a block whose rows one loop reads are one."""
    for stack in stacked:
        module_of = {name: module for module, names in modules.items() for name in names}
        known = sorted((name for name in module_of if name in stack), key=lambda name: rank[name])
        if len({module_of[name] for name in known}) < 2:
            continue
        rest = {module: [name for name in names if name not in stack] for module, names in modules.items()}
        name = stacks.name_of(known, module_of.keys() - stack)
        modules = {module: names for module, names in rest.items() if names} | {name: known}
    return modules


def _with_merged(
    modules: dict[str, list[str]], with_kernel: Sequence[str], merged: Mapping[str, frozenset[str]]
) -> dict[str, list[str]]:
    """The modules; what is combined with the weights of one kernel before any data is in the kernel's module."""
    host_of = {name: module for module in with_kernel for name in modules[module]}
    joined: dict[str, list[str]] = {module: [] for module in modules}
    for module, names in modules.items():
        for name in names:
            hosts = {host_of[other] for other in merged.get(name, ()) if other in host_of and name not in host_of}
            joined[hosts.pop() if len(hosts) == 1 else module].append(name)
    return {module: names for module, names in joined.items() if names}


def _around(module: str, hosts: Sequence[str]) -> list[str]:
    """The hosts in the innermost module around one that holds any."""
    inside: list[str] = []
    while not inside:
        inside = [host for host in hosts if not module or f"{host}/".startswith(f"{module}/")]
        module = module.rpartition(paths.SEPARATOR)[0]
    return inside


def _shared(first: str, second: str) -> int:
    """Number of leading path components in common."""
    pairs = zip(first.split(paths.SEPARATOR), second.split(paths.SEPARATOR), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(first.count("/"), second.count("/")) + 1)
