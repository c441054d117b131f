"""Rows of arrays whose first axis is divided among the devices of a mesh: read, written and brought where they belong.

Every row has a home, one block of the first axis. Reading, each block gives the rows that it has and zeros for the
others, and the sum of all is scattered over the devices. Bits are added up as whole numbers, so that they stay what
they are, the sign of a zero too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from smartfrz_jax.pytrees.types import PyTree


def rows_sharding(tree: PyTree) -> NamedSharding | None:
    """How the first axis of a batch is divided among devices; ``None`` if it is not.

    Args:
        tree: Arrays or ``jax.ShapeDtypeStruct``; the first one that has an axis counts.

    Example:
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> batch = jax.device_put(np.ones((4, 2)), NamedSharding(mesh, PartitionSpec("data")))
        >>> rows_sharding(batch) is None  # on one device
        True
    """
    first = next((leaf for leaf in jax.tree.leaves(tree) if getattr(leaf, "shape", ())), None)
    sharding = getattr(first, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    found = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    return found if blocks(found) > 1 else None


def blocks(sharding: NamedSharding | None) -> int:
    """Into how many blocks the first axis is divided."""
    axes = () if sharding is None else _axes(sharding)
    return 1 if sharding is None else math.prod(sharding.mesh.shape[axis] for axis in axes)


def local_blocks(sharding: NamedSharding) -> list[int]:
    """Which of the blocks lie on devices of this process, in order."""
    total = blocks(sharding)
    places = sharding.addressable_devices_indices_map((total,)).values()
    return sorted({index[0].indices(total)[0] for index in places if index})


def divided(sharding: NamedSharding | None, rows: int) -> NamedSharding | None:
    """The sharding if so many rows can be divided equally, else that of copies on all devices."""
    if sharding is None or rows % blocks(sharding) == 0:
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec())


def zeros(shapes: Sequence[jax.ShapeDtypeStruct], sharding: NamedSharding) -> list[jax.Array]:
    """Arrays of these shapes, each device with its block."""
    make = jax.jit(lambda: [jnp.zeros(shape.shape, shape.dtype) for shape in shapes], out_shardings=sharding)
    return make()


def some_rows(array: Any, rows: np.ndarray) -> Any:
    """Some rows of an array, divided among the devices as all are."""
    sharding = getattr(array, "sharding", None)
    if rows_sharding(array) is None or len(rows) % blocks(rows_sharding(array)):
        return array[rows]
    return _some_rows(array, rows, sharding)


@functools.partial(jax.jit, static_argnums=2)
def _some_rows(array: jax.Array, rows: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(array[rows], sharding)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def scattered(
    stored: list[jax.Array], rows: jax.Array, new: list[jax.Array], sharding: NamedSharding
) -> list[jax.Array]:
    """The arrays with some rows replaced, each device in its block."""

    def local(stored: list[jax.Array], rows: jax.Array, new: list[jax.Array]) -> list[jax.Array]:
        at, here = _places(rows, len(stored[0]), sharding)
        at = jnp.where(here, at, len(stored[0]))  # beyond the end: dropped
        return [old.at[at].set(values, mode="drop") for old, values in zip(stored, new, strict=True)]

    return _on_blocks(local, sharding, [True, False, False], True)(stored, rows, new)


@functools.partial(jax.jit, static_argnums=2)
def gathered(stored: list[jax.Array], rows: jax.Array, sharding: NamedSharding) -> list[jax.Array]:
    """Some rows of arrays that are divided among devices; divided likewise, if their number can be."""
    total = len(rows)

    def local(stored: list[jax.Array], rows: jax.Array) -> list[jax.Array]:
        at, here = _places(rows, len(stored[0]), sharding)
        taken = (jnp.take(values, at, axis=0, mode="clip") for values in stored)
        given = [
            jnp.where(jnp.expand_dims(here, range(1, rows.ndim)), rows, jnp.zeros((), rows.dtype)) for rows in taken
        ]
        return [_sum(values, total, sharding) for values in given]

    return _on_blocks(local, sharding, [True, False], divided(sharding, total) is sharding)(stored, rows)


@functools.partial(jax.jit, static_argnums=(2, 3))
def placed(given: list[jax.Array], places: jax.Array, total: int, sharding: NamedSharding) -> list[jax.Array]:
    """Arrays of ``total`` rows, of which each device gives some.

    Args:
        given: Rows, of each device as many; those of which the place is beyond the end are left out.
        places: Which rows of the result they are.
        total: Rows of the result.
        sharding: Divides ``given`` and ``places`` among the devices, and the result, if its rows can be.
    """

    def local(given: list[jax.Array], places: jax.Array) -> list[jax.Array]:
        empty = (jnp.zeros((total, *values.shape[1:]), values.dtype) for values in given)
        whole = [rows.at[places].set(values, mode="drop") for rows, values in zip(empty, given, strict=True)]
        return [_sum(values, total, sharding) for values in whole]

    return _on_blocks(local, sharding, [True, True], divided(sharding, total) is sharding)(given, places)


def _axes(sharding: NamedSharding) -> tuple[str, ...]:
    axes = sharding.spec[0]
    return axes if isinstance(axes, tuple) else (axes,)


def _on_blocks(local: Any, sharding: NamedSharding, divides: Sequence[bool], divides_result: bool) -> Any:
    """A function of blocks as one of whole arrays; of some arguments every device has all."""
    spec = {True: sharding.spec, False: PartitionSpec()}
    in_specs = tuple(spec[one] for one in divides)
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=in_specs, out_specs=spec[divides_result], check_vma=False)


def _places(rows: jax.Array, size: int, sharding: NamedSharding) -> tuple[jax.Array, jax.Array]:
    """Where rows are in the block of a device, and whether they are there."""
    at = rows - jax.lax.axis_index(_axes(sharding)).astype(rows.dtype) * size
    return at, (at >= 0) & (at < size)


def _sum(values: jax.Array, total: int, sharding: NamedSharding) -> jax.Array:
    """Adds up what the devices give, of which but one gives zeros for each row."""
    dtype, axes = values.dtype, _axes(sharding)
    if dtype == jnp.bool_:
        values = values.astype(jnp.uint8)
    elif jnp.issubdtype(dtype, jnp.floating):
        values = jax.lax.bitcast_convert_type(values, jnp.dtype(f"uint{8 * dtype.itemsize}"))
    if total % blocks(sharding):
        summed = jax.lax.psum(values, axes)
    else:
        summed = jax.lax.psum_scatter(values, axes, scatter_dimension=0, tiled=True)
    if jnp.issubdtype(dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(summed, dtype)
    return summed.astype(dtype)
