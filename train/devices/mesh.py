"""The mesh of ``--mesh``, and where arrays lie on it.

Examples are split over both axes. Parameters and the optimizer's state are on every device of ``data``; over ``fsdp``
each is split along its largest side that divides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from smartfrz_jax.pytrees.types import PyTree

AXES: tuple[str, ...] = ("data", "fsdp")
# Entries; gathering less takes as long as gathering nothing.
SMALL = 2**12

T = TypeVar("T")


def axes_of(text: str) -> dict[str, int]:
    """The sizes of the axes in an argument of ``--mesh``.

    Args:
        text: Such as ``data=8`` or ``data=4,fsdp=2``.

    Returns:
        The sizes of all axes by name; 1 of those that are not named.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> axes_of("data=4,fsdp=2")
        {'data': 4, 'fsdp': 2}
    """
    axes = dict.fromkeys(AXES, 1)
    named: set[str] = set()
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or name in named or not (size.isascii() and size.isdecimal()) or int(size) < 1:
            raise ValueError(
                f"--mesh: got {text!r}, expected numbers of devices for the axes {' and '.join(AXES)}, each at most "
                "once, such as data=8, or data=4,fsdp=2 to split parameters over two devices"
            )
        named.add(name)
        axes[name] = int(size)
    return axes


def make_mesh(text: str | None, *, batch_size: int, accumulate: int = 1) -> Mesh | None:
    """The mesh that a run trains on.

    Args:
        text: The argument of ``--mesh``; all devices on ``data`` without one.
        batch_size: Examples of a step.
        accumulate: Parts in which a step takes them.

    Returns:
        A mesh of the axes ``data`` and ``fsdp``; None for one device, where nothing needs to be placed.

    Raises:
        ValueError: If the mesh does not have as many devices as there are, unless it has one, or the batch cannot be
            split over them.
    """
    count = jax.device_count()
    axes = {"data": count, "fsdp": 1} if text is None else axes_of(text)
    size = math.prod(axes.values())
    alone = size == 1 and jax.process_count() == 1
    if size != count and not alone:
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        raise ValueError(
            f"--mesh: got {text}, which is {size} devices, expected {count}, which are there{processes}; make the "
            f"sizes multiply to that, such as data={count}, or hide devices from JAX (CUDA_VISIBLE_DEVICES)"
        )
    if rest := batch_size % (size * accumulate):
        by_default = " (all that are there, as there is no --mesh)" if text is None else ""
        parts = f" times the {accumulate} of --accumulate" if accumulate > 1 else ""
        named = ",".join(f"{name}={n}" for name, n in axes.items() if n > 1) or "data=1"
        near = [near for near in (batch_size - rest, batch_size - rest + size * accumulate) if near]
        or_one = "" if size == 1 or jax.process_count() > 1 else ", or --mesh data=1, which trains on one device"
        raise ValueError(
            f"--batch-size: got {batch_size}, expected a multiple of {size * accumulate}, the {size} devices of --mesh "
            f"{named}{by_default}{parts}; take --batch-size {' or '.join(map(str, near))}{or_one}"
        )
    if alone:
        return None
    return jax.make_mesh(tuple(axes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sharding_of(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where a parameter lies, or what the optimizer keeps of it.

    Args:
        shape: Its shape.
        mesh: The mesh.

    Returns:
        Split along its largest side that the size of ``fsdp`` divides; whole on every device if none is or it is small.
    """
    size = mesh.shape["fsdp"]
    sides = [side for side in shape if side % size == 0]
    if size == 1 or not sides or math.prod(shape) < SMALL:
        return NamedSharding(mesh, PartitionSpec())
    axis = shape.index(max(sides))
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))


def by_example(mesh: Mesh) -> NamedSharding:
    """Where what has the examples along its first axis lies."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def put(array: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, or that lies on the devices of all, on these as the sharding says."""
    is_spread = isinstance(array, jax.Array) and not array.is_fully_addressable
    if jax.process_count() == 1 or is_spread:
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        key: jax.Array = array  # pyright: ignore[reportAssignmentType]
        data = put(jax.random.key_data(key), NamedSharding(sharding.mesh, PartitionSpec()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def replicate(tree: T, mesh: Mesh) -> T:
    """The arrays of a pytree, whole on every device."""
    return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """The arrays of a pytree as :func:`sharding_of` says.

    Args:
        tree: Pytree of arrays, the same in every process.
        mesh: The mesh.
    """
    return jax.tree.map(lambda leaf: put(leaf, sharding_of(leaf.shape, mesh)), tree)


def place_module(module: nnx.Pytree, mesh: Mesh) -> None:
    """Puts all variables of a network or of an optimizer where :func:`sharding_of` says."""
    nnx.update(module, place(nnx.state(module), mesh))


def pinned(step: Callable[..., T], mesh: Mesh | None) -> Callable[..., T]:
    """A train step after which all arrays lie as they did before it; the step itself without a mesh.

    Else XLA chooses, and what it has moved is another program.

    Args:
        step: A step of ``(model, optimizer, *inputs)``.
        mesh: The mesh.
    """
    if mesh is None:
        return step

    def train_step(model: nnx.Module, optimizer: nnx.Optimizer, *inputs: Any) -> T:
        before = {id(variable): variable.get_raw_value() for variable in _variables(model, optimizer)}
        out = step(model, optimizer, *inputs)
        for variable in _variables(model, optimizer):
            value = variable.get_raw_value()
            if value is not before.get(id(variable)):
                variable.set_raw_value(jax.lax.with_sharding_constraint(value, sharding_of(value.shape, mesh)))
        return out

    return train_step


def _variables(*modules: nnx.Pytree) -> list[nnx.Variable[Any]]:
    return [variable for module in modules for _, variable in nnx.to_flat_state(nnx.state(module))]
