"""What is frozen, since when, and what that saves: layer by layer, for people."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from smartfrz_jax.freezing import overwritten
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.freezing.table import Row, Table
from smartfrz_jax.freezing.transform import freeze
from smartfrz_jax.layers.lookups import Lookup
from smartfrz_jax.pytrees import checks, paths
from smartfrz_jax.pytrees.types import PyTree

# Where what belongs to no layer is counted.
REST = ""


class LayerSummary(NamedTuple):
    """A layer in a summary.

    Attributes:
        name: Its name; ``""`` stands for what belongs to no layer, such as the optimizer's count of steps.
        params: Number of its parameters.
        optimizer_bytes: Bytes of optimizer state for it; ``None`` if no optimizer is known.
        flops: Its share of the FLOPs that a step takes with nothing frozen; ``None`` without an account.
        saved: The share that it takes no longer; ``None`` without an account.
        since: After how many steps it froze; ``None`` if it trains.
    """

    name: str
    params: int
    optimizer_bytes: int | None
    flops: float | None
    saved: float | None
    since: int | None


class Summary(NamedTuple):
    """What is frozen and what that saves; ``print`` and ``rich.print`` show it as a table.

    Attributes:
        step: Number of train steps done.
        layers: What is known of each layer, front to back, and of the rest.
        optimizer_bytes_unfrozen: Bytes of optimizer state with nothing frozen; ``None`` if no optimizer is known.
        pending: What takes effect next: after how many steps, and how many layers are frozen then.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import Freezer, find_layers
        >>> from smartfrz_jax.policies import never
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> print(Freezer(never(), layers, params, frozen=Frozen(layers, "a")).summary(tx=optax.sgd(0.1, 0.9)))
        Frozen after step 0: 1 of 2 layers, 4 of 8 parameters.
        The optimizer holds 16 B, with nothing frozen 32 B.
        <BLANKLINE>
        layer  parameters  optimizer  frozen since
        a               4        0 B     the start
        b               4       16 B
        all             8       16 B
    """

    step: int
    layers: tuple[LayerSummary, ...]
    optimizer_bytes_unfrozen: int | None
    pending: tuple[int, int] | None

    @property
    def params(self) -> int:
        """Number of parameters."""
        return sum(layer.params for layer in self.layers)

    @property
    def frozen_params(self) -> int:
        """Number of those that are frozen."""
        return sum(layer.params for layer in self.layers if layer.since is not None)

    @property
    def optimizer_bytes(self) -> int | None:
        """Bytes of optimizer state; ``None`` if no optimizer is known."""
        return _sum(layer.optimizer_bytes for layer in self.layers)

    @property
    def saved(self) -> float | None:
        """Share of a step's FLOPs that freezing saves; ``None`` without an account."""
        return _sum(layer.saved for layer in self.layers)

    @property
    def table(self) -> Table:
        """The summary as a table."""
        head = ("layer", "parameters", "optimizer", "FLOPs", "saved", "frozen since")
        rows = [_row(layer) for layer in self.layers if layer.name or layer.optimizer_bytes or layer.flops]
        flops = _sum(layer.flops for layer in self.layers)
        total = ("all", f"{self.params:,}", _bytes(self.optimizer_bytes), _share(flops), _share(self.saved), "")
        known = [i for i, cell in enumerate(total) if cell or i == len(total) - 1]
        head, total, *rows = (tuple(row[i] for i in known) for row in (head, total, *rows))
        return Table(self._title, head, tuple(rows), total)

    @property
    def _title(self) -> str:
        layers = [layer for layer in self.layers if layer.name]
        frozen = sum(layer.since is not None for layer in layers)
        share = f"{self.frozen_params:,} of {self.params:,} parameters"
        sentences = [f"Frozen after step {self.step}: {frozen} of {len(layers)} layers, {share}."]
        if self.saved is not None:
            sentences.append(f"A step saves {_share(self.saved)} of its FLOPs.")
        if self.optimizer_bytes_unfrozen is not None:
            before = _bytes(self.optimizer_bytes_unfrozen)
            sentences.append(f"The optimizer holds {_bytes(self.optimizer_bytes)}, with nothing frozen {before}.")
        if self.pending is not None:
            sentences.append(f"Decided for step {self.pending[0]}: {self.pending[1]} of {len(layers)} layers.")
        return "\n".join(sentences)

    def __str__(self) -> str:
        return str(self.table)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield self.table


def summarise(
    frozen: Frozen,
    params: PyTree,
    *,
    tx: optax.GradientTransformation | None,
    account: Any,
    since: Mapping[str, int],
    step: int,
    pending: tuple[int, int] | None,
) -> Summary:
    """A summary of a run.

    Args:
        frozen: The frozen set.
        params: Parameter pytree; shapes are enough.
        tx: The optimizer, as it was given; ``None`` if it is unknown.
        account: A :class:`~smartfrz_jax.Account` of the train step, or ``None``.
        since: After how many steps each frozen layer froze.
        step: Number of train steps done.
        pending: As in :class:`Summary`.

    Raises:
        TypeError: If ``tx`` is no transformation, or ``account`` no account.
        ValueError: If the account is of another network.
    """
    nothing = Frozen(frozen.layers)
    states = {}
    if tx is not None:
        checks.transformation(tx)
        states = {of: _bytes_by_layer(tx, params, of) for of in (nothing, frozen)}
    whole = now = None
    if account is not None:
        if not callable(getattr(account, "flops", None)):
            expected = "a smartfrz_jax.Account of this network's train step, or None"
            raise TypeError(f"account: got {checks.got(account)}, expected {expected}")
        whole, now = account.flops(nothing), account.flops(frozen)
    sizes = {name: math.prod(np.shape(leaf)) for name, leaf in paths.flatten(frozen.layers.unstacked(params)).items()}
    sizes |= {Lookup(table).name: 0 for table in frozen.layers.lookups}  # the table is counted in its own layer

    def of_layer(name: str, params: Iterable[str]) -> LayerSummary:
        flops = saved = None
        if whole is not None and now is not None:
            flops = now.by_layer[name].total / whole.total
            saved = whole.by_layer[name].total / whole.total - flops
        size = states[frozen][name] if states else None
        return LayerSummary(name, sum(map(sizes.__getitem__, params)), size, flops, saved, since.get(name))

    rows = [of_layer(layer.name, layer.params) for layer in frozen.layers]
    total = sum(states[nothing].values()) if states else None
    return Summary(step, (*rows, of_layer(REST, ())), total, pending)


def _bytes_by_layer(tx: optax.GradientTransformation, params: PyTree, frozen: Frozen) -> collections.Counter[str]:
    """Bytes of optimizer state by layer: a leaf at a path with a parameter's in it belongs to that parameter."""
    params, frozen = overwritten.optimized(params), overwritten.optimized_frozen(frozen)
    owner = {_parts(path): _training(paths.name(path), frozen) for path, _ in _leaves(params)}
    lengths = sorted({len(parts) for parts in owner}, reverse=True)
    found = collections.Counter[str]()
    for path, leaf in _leaves(jax.eval_shape(freeze(tx, frozen).init, params)):
        parts = _parts(path)
        inside = (parts[i : i + length] for length in lengths for i in range(len(parts) - length, -1, -1))
        layers = next((owner[some] for some in inside if some in owner), (REST,))
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        for at, layer in enumerate(layers):  # rows have equal parts, the first what is of all of them
            found[layer] += size // len(layers) + (size % len(layers) if at == 0 else 0)
    return found


def _training(param: str, frozen: Frozen) -> tuple[str, ...]:
    """The layer of a parameter; of a stacked one those of the rows that train."""
    if param in frozen.layers.stacks:
        layers = frozen.layers.stacks[param].layers
        return tuple(layers[row] for row in frozen.rows[param]) if param in frozen.rows else layers
    is_by_lookups = not frozen.lookups.get(param, True)
    return (frozen.layers.lookups[param] if is_by_lookups else frozen.layers.holding(param),)


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _parts(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,)) for key in path)


def _row(layer: LayerSummary) -> Row:
    since = "" if layer.since is None else f"step {layer.since}" if layer.since else "the start"
    name = layer.name or "(no layer)"
    return name, f"{layer.params:,}", _bytes(layer.optimizer_bytes), _share(layer.flops), _share(layer.saved), since


def _sum(values: Iterable[Any]) -> Any:
    several = list(values)
    return None if None in several else sum(several)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _bytes(size: int | None) -> str:
    if size is None:
        return ""
    power = min(int(math.log(size, 1000)) if size else 0, 4)
    return f"{size} B" if power == 0 else f"{size / 1000**power:.1f} {' kMGT'[power]}B"
