"""Some rows of an array, taken and put back by static slices alone, which XLA sees through."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def runs(indices: Collection[int]) -> list[range]:
    """Numbers among some that are consecutive, or three or more of them equally far apart, in order.

    Example:
        >>> runs([0, 1, 4, 5, 6])
        [range(0, 2), range(4, 7)]
        >>> runs([1, 3, 5, 7, 10])
        [range(1, 8, 2), range(10, 11)]
    """
    rest, found = sorted(indices), []
    while rest:
        step = rest[1] - rest[0] if len(rest) > 1 else 1
        count = 1
        while count < len(rest) and rest[count] - rest[count - 1] == step:
            count += 1
        if step > 1 and count < 3:
            step, count = 1, 1
        found.append(range(rest[0], rest[count - 1] + 1, step))
        rest = rest[count:]
    return found


def take(array: jax.Array, indices: Sequence[int], axis: int) -> jax.Array:
    """Some rows of an array; where devices had shares of the rows, they have shares of what is taken."""
    parts = [jax.lax.slice_in_dim(array, run.start, run.stop, run.step, axis) for run in runs(indices)]
    taken = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)
    sharding = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.spec[axis : axis + 1] not in ((), (None,)):
        return jax.device_put(taken, _of_shares(sharding, taken.shape, axis))
    return taken


def put(array: jax.Array, part: jax.Array, indices: Sequence[int], axis: int) -> jax.Array:
    """An array with some of its rows replaced; XLA does so in place where the array is donated."""
    start = 0
    for run in runs(indices):
        piece = jax.lax.slice_in_dim(part, start, start + len(run), axis=axis).astype(array.dtype)
        if run.step == 1:
            array = jax.lax.dynamic_update_slice_in_dim(array, piece, run.start, axis=axis)
        else:
            place = functools.partial(_apart, run=run, axis=axis, end=array.shape[axis])
            array = jax.lax.select(place(jnp.ones_like(piece, bool)), place(piece), array)
        start += len(run)
    return array


def spread(part: jax.Array, indices: Sequence[int], length: int, axis: int) -> jax.Array:
    """Rows at their places among ``length``, zeros elsewhere."""
    pieces, start, at = [], 0, 0
    for run in runs(indices):
        pieces += [_zeros(part, run.start - at, axis)] * (run.start > at)
        piece = jax.lax.slice_in_dim(part, start, start + len(run), axis=axis)
        pieces.append(piece if run.step == 1 else _apart(piece, range(0, run.stop - run.start, run.step), axis))
        start, at = start + len(run), run.stop
    pieces += [_zeros(part, length - at, axis)] * (length > at)
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis)


def _apart(part: jax.Array, run: range, axis: int, end: int | None = None) -> jax.Array:
    """Rows as far apart as numbers are, zeros between, before and, up to ``end``, behind them."""
    config = [(0, 0, 0)] * part.ndim
    config[axis] = run.start, 0 if end is None else end - run[-1] - 1, run.step - 1
    return jax.lax.pad(part, jnp.zeros((), part.dtype), config)


def _zeros(like: jax.Array, rows: int, axis: int) -> jax.Array:
    sharding = jax.typeof(like).sharding
    explicit = sharding if AxisType.Explicit in sharding.mesh.axis_types else None
    return jnp.zeros((*like.shape[:axis], rows, *like.shape[axis + 1 :]), like.dtype, out_sharding=explicit)


def _of_shares(sharding: NamedSharding, shape: tuple[int, ...], axis: int) -> NamedSharding:
    """A sharding of rows for fewer of them: along the first axis that can be divided, and that is not."""
    spec = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    names, spec[axis] = spec[axis], None
    shares = math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
    for at in (axis, *range(len(shape))):
        if spec[at] is None and shape[at] % shares == 0:
            spec[at] = names
            break
    while spec and spec[-1] is None:  # as JAX writes it, for jax.jit compares
        spec.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
