"""Layer tailoring: a fixed random sample of each layer's weights, so that one predictor serves layers of any size.

Paper, section 3.2. The positions are drawn once per layer and kept; drawn anew each time, a history would be noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smartfrz_jax.layers.layers import Layers, check_layers, check_params
from smartfrz_jax.layers.rows import Row
from smartfrz_jax.pytrees import checks, paths
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Array, Float


_MOST = int(np.iinfo(np.int32).max)  # JAX draws below this, and has indices up to it


class Tailoring(struct.PyTreeNode):
    """Positions of the sampled weights of every layer; a pytree.

    Attributes:
        layers: The layers, front to back.
        size: Weights sampled per layer.
        leaf_positions: For each layer and each of its kernels, positions along each of its axes, int32 of shape
            ``(axes, positions)``.
        order: For each layer, where its samples go, int32 of shape ``(size,)``.
        shapes: Shape of each kernel, by name; of a stacked one, whose rows are in layers of their own, of all of it.

    Example:
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((40, 50))}, "b": {"kernel": jnp.zeros((50, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 40)))
        >>> Tailoring.create(layers, params, size=64)(params).shape
        (2, 64)
    """

    layers: Layers = struct.field(pytree_node=False)
    size: int = struct.field(pytree_node=False)
    leaf_positions: tuple[tuple[jax.Array, ...], ...]
    order: tuple[jax.Array, ...]
    shapes: Mapping[str, tuple[int, ...]] = struct.field(pytree_node=False)

    @classmethod
    def create(cls, layers: Layers, params: PyTree, *, size: int = 1024, seed: int = 0) -> Tailoring:
        """Draws the positions, without replacement where a layer has ``size`` weights or more.

        A layer with several kernels (a block) is sampled from all of them as if they were one. The draw depends on the
        seed, the layer's name and the number of its weights, and on nothing else.

        Args:
            layers: The network's layers.
            params: Its parameter pytree; arrays or ``jax.ShapeDtypeStruct``.
            size: Weights to sample per layer; 1024 in the paper.
            seed: Seed of the draw.

        Raises:
            TypeError: If ``layers`` are no :class:`~smartfrz_jax.Layers`, or ``size`` or ``seed`` is no number.
            ValueError: If ``size`` is not positive, ``params`` is empty or lacks a parameter of ``layers``, a layer has
                no weights, or a kernel has more positions along an axis than an int32 counts.
        """
        check_layers(layers)
        checks.count(size, "size")
        checks.seed(seed)
        shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in check_params(params).items()}
        leaves, arrays = layers.unstacked(shapes), {}
        leaf_positions, order = [], []
        for layer in layers:
            own = [layers.array_of.get(name, name) for name in layer.kernels]
            missing = [name for name in own if name not in shapes]
            if missing:
                raise ValueError(
                    f"params: {missing[0]!r} of layer {layer.name!r} is missing; pass those the layers were found for"
                )
            arrays |= {name: tuple(shapes[name].shape) for name in own}
            sizes = [int(np.prod(leaves[name].shape)) for name in layer.kernels]
            for name in layer.kernels:
                if max(leaves[name].shape, default=0) > _MOST:
                    raise ValueError(
                        f"params: {name!r} of layer {layer.name!r} has shape {leaves[name].shape}, expected at most "
                        f"{_MOST} positions along an axis, which is what JAX indexes; give it another axis"
                    )
            if not sum(sizes):
                raise ValueError(
                    f"params: layer {layer.name!r} has no weights to sample ({', '.join(layer.kernels)} of size 0); "
                    "leave empty arrays out of the parameters"
                )
            positions = _draw(
                jax.random.fold_in(jax.random.key(seed), zlib.crc32(layer.name.encode())), sum(sizes), size
            )
            leaf = np.searchsorted(np.cumsum(sizes), positions, side="right")
            starts = np.cumsum([0, *sizes[:-1]])
            leaf_positions.append(
                tuple(
                    _along_axes(positions[leaf == i] - starts[i], leaves[name].shape)
                    for i, name in enumerate(layer.kernels)
                )
            )
            order.append(jnp.asarray(np.argsort(np.argsort(leaf, kind="stable")), jnp.int32))
        return cls(layers, size, tuple(leaf_positions), tuple(order), FrozenDict(arrays))

    def __call__(self, params: PyTree) -> Float[Array, "layers size"]:
        """The sampled weights of all layers in one compiled call, float32, shape ``(layers, size)``.

        Raises:
            ValueError: If a parameter is missing, or has another shape than those the positions were drawn for.
        """
        leaves = paths.flatten(params)
        for name, shape in self.shapes.items():
            if np.shape(leaves.get(name, 0.0)) != shape or name not in leaves:
                has = f"shape {np.shape(leaves[name])}" if name in leaves else f"{len(leaves)} without it"
                raise ValueError(
                    f"params: got {has} for {name!r}, expected shape {shape}; pass the parameters of the network that "
                    "the tailoring was made for"
                )
        return _sample(self, leaves)


def _draw(key: jax.Array, n: int, size: int) -> np.ndarray:
    """``size`` positions below ``n``, int64; distinct if ``n`` is at least ``size``.

    The first distinct draws with replacement are a draw without, and unlike a permutation that is one program for all
    layers.
    """
    if n < size:
        return _repeated(key, n, size)
    distinct = np.zeros(0, np.int64)
    while len(distinct) < size:
        key, subkey = jax.random.split(key)
        drawn = np.concatenate([distinct, _repeated(subkey, n, 2 * size)])
        distinct = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return distinct[:size]


def _repeated(key: jax.Array, n: int, size: int) -> np.ndarray:
    if n <= _MOST:
        return np.asarray(jax.random.choice(key, n, (size,)), np.int64)
    # random_raw, as the streams of NumPy's generators may change.
    return (np.random.PCG64(np.asarray(jax.random.key_data(key))).random_raw(size) % np.uint64(n)).astype(np.int64)


def _along_axes(positions: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    # Here and not where the weights are taken: there it would be half of what is compiled.
    return jnp.asarray(np.stack(np.unravel_index(positions, shape or (1,))), jnp.int32)


@jax.jit
def _sample(tailoring: Tailoring, leaves: dict[str, jax.Array]) -> jax.Array:
    sampled = []
    for layer, positions, order in zip(tailoring.layers, tailoring.leaf_positions, tailoring.order, strict=True):
        rows = {row.name: row for row in layer.rows}
        parts = []
        for name, index in zip(layer.kernels, positions, strict=True):
            row = rows.get(name)
            leaf = leaves[tailoring.layers.array_of.get(name, name)]
            parts.append(_take(leaf, index) if row is None else _take_of_row(leaf, row, index))
        sampled.append(jnp.concatenate(parts)[order])
    return jnp.stack(sampled)


def _take_of_row(leaf: jax.Array, row: Row, positions: jax.Array) -> jax.Array:
    # The row is not cut out first: that would copy it, and gather a sharded one.
    index = [*positions][: leaf.ndim - 1]  # one number a row has no axis
    index.insert(row.axis, jnp.full(positions.shape[1], row.position, positions.dtype))
    return _take(leaf, index)


def _take(leaf: jax.Array, positions: Iterable[jax.Array]) -> jax.Array:
    # Not reshape(-1)[positions]: that would gather a sharded weight whole, and be refused on a mesh of explicit axes.
    mesh = jax.typeof(leaf).sharding.mesh
    replicated = NamedSharding(mesh, PartitionSpec()) if AxisType.Explicit in mesh.axis_types else None
    return jnp.atleast_1d(leaf).at[tuple(positions)].get(out_sharding=replicated).astype(jnp.float32)
