"""A store of activations by example, on the device, in host memory or on disk."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from smartfrz_jax.caching import exchange
from smartfrz_jax.caching.memory import OnDevice, OnDisk, OnHost, Store, empty_directory, free_bytes
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.file_paths import local_path

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int

Place = Literal["device", "host"] | Path


_NARROW = ("float32", "bfloat16", "float16")


def stored_shapes(
    frontier: Sequence[jax.ShapeDtypeStruct], rows: int, dtype: DTypeLike | None
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of the arrays that hold ``rows`` examples.

    Args:
        frontier: Shape and dtype of each value of one example.
        rows: Number of examples, times views.
        dtype: Type in which floating-point values wider than it are held; their own by default.

    Raises:
        TypeError: If ``dtype`` is no type of numbers.
        ValueError: If it is not one to store activations in.
    """
    expected = f"{', '.join(_NARROW)}, or None for what it is"
    try:
        name = None if dtype is None else jnp.dtype(dtype).name
    except TypeError as error:
        raise TypeError(f"dtype: got {checks.got(dtype)}, expected {expected}") from error
    if name not in (None, *_NARROW):
        raise ValueError(f"dtype: got {name}, expected {expected}")

    def narrow(own: Any) -> Any:
        wider = dtype is not None and jnp.issubdtype(own, jnp.floating) and own.itemsize > jnp.dtype(dtype).itemsize
        return jnp.dtype(dtype) if wider else own

    return tuple(jax.ShapeDtypeStruct((rows, *value.shape), narrow(value.dtype)) for value in frontier)


def check_room(examples: Any, views: Any, budget: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless these are numbers of what a store may hold."""
    for argument, number in (("examples", examples), ("views", views)):
        checks.count(number, argument, most=sys.maxsize)
    if budget is not None:
        checks.count(budget, "budget", least=0, most=sys.maxsize)


def check_views(views: int, *, augmented: bool) -> None:
    """Raises if no activations can be kept because an example looks different in every epoch."""
    checks.flag(augmented, "augmented")
    checks.count(views, "views")
    if augmented and views == 1:
        raise ValueError(
            "augmented: an example looks different in every epoch, so its activations are never the same; let the "
            "loader draw from a fixed number of augmented views of each example and pass that number (views), or "
            "augment nothing"
        )


def check_place(place: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless activations can be kept there, by its type."""
    if place not in ("device", "host"):
        local_path(place, "place")


def check_sharding(sharding: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless it divides the first axis of a batch among devices."""
    expected = "the NamedSharding of a batch whose first axis is divided, such as NamedSharding(mesh, P('data'))"
    if sharding is None:
        return
    checks.instance(sharding, NamedSharding, "sharding", expected)
    if len(sharding.spec) != 1 or sharding.spec[0] is None:
        raise ValueError(f"sharding: got {sharding.spec}, expected {expected}")


def check_indices(indices: Any, view: Any, examples: int, views: int) -> Int[np.ndarray, " n"]:
    """Which examples, as int64.

    Args:
        indices: What was given.
        view: Which view of them.
        examples: How many there are.
        views: Of each.

    Raises:
        TypeError: If the view is no number.
        ValueError: If an index is wrong, or there is no such view.
    """
    array = np.asarray(indices)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"indices: got {array.dtype}{list(array.shape)}, expected a vector of integers")
    if array.size and (array.min() < 0 or array.max() >= examples):
        raise ValueError(f"indices: got {array.min()} to {array.max()}, expected 0 to {examples - 1}")
    checks.count(view, "view", least=0)
    if view >= views:
        raise ValueError(f"view: got {view}, expected 0 to {views - 1}; say how many views there are (views)")
    return array.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where and how activations are kept; see :class:`ActivationCache`.

    Attributes:
        place: ``"device"``, ``"host"``, or a directory, where whoever takes this keeps files.
        dtype: Type to store wider floating-point values in, ``"bfloat16"`` for instance; their own by default.
        budget: Most bytes to use; what is free by default.

    Raises:
        TypeError: If one of them is of another type.
        ValueError: If ``dtype`` is not one to store activations in, or the budget is negative.
    """

    place: Place | str = "device"
    dtype: DTypeLike | None = None
    budget: int | None = None

    def __post_init__(self):
        check_place(self.place)
        stored_shapes((), 0, self.dtype)  # raises, if there is no such type
        check_room(1, 1, self.budget)


class ActivationCache:
    """Activations of every example of a data set, of which some, or all, may still be missing.

    Its size is predicted, and compared with what is free, before anything is allocated.

    Args:
        frontier: Shape and dtype of each value of one example.
        examples: Number of examples in the data set.
        place: ``"device"``, where looking up is a gather; ``"host"``, memory of the host; or a directory, new or
            empty, for files that are mapped into memory. The files stay when the run ends.
        dtype: Type in which wider floating-point values are held: ``"bfloat16"`` rounds them by at most 2^-8 of
            their size, ``"float16"`` by at most 2^-11 of it (and 2^-25), and refuses those beyond 65504. By default
            they are kept bit for bit.
        views: Number of augmented views of each example, each with a slot.
        budget: Most bytes to use, on each device or in each process; by default, what is free at the moment.
        sharding: How the first axis of a batch is divided among the devices of a mesh. So are the examples then, and
            what is looked up. By default there is one device, or every process holds all.

    Attributes:
        nbytes: Bytes that it takes, of all devices together.
        nbytes_here: Those of them that count against the budget: on one device, or in this process.
        filled: Boolean array of shape ``(examples, views)``, true where activations are stored.

    Raises:
        ValueError: If it would not fit, or ``place`` or ``dtype`` is unknown.
        FileExistsError: If the directory is not empty.
        NotADirectoryError: If it is a file.
        PermissionError: If nothing can be written there.

    Example:
        >>> cache = ActivationCache([jax.ShapeDtypeStruct((4,), jnp.float32)], examples=10)
        >>> cache.nbytes
        160
        >>> cache.put(np.array([3, 7]), [jnp.ones((2, 4))])
        >>> cache.has(np.array([3, 7])), cache.has(np.array([0, 3]))
        (True, False)
        >>> cache.take(np.array([7]))[0].shape
        (1, 4)
    """

    def __init__(
        self,
        frontier: Sequence[jax.ShapeDtypeStruct],
        examples: int,
        *,
        place: Place | str = "device",
        dtype: DTypeLike | None = None,
        views: int = 1,
        budget: int | None = None,
        sharding: NamedSharding | None = None,
    ):
        check_room(examples, views, budget)
        check_sharding(sharding)
        expected = "a sequence of jax.ShapeDtypeStruct, of the values of one example"
        checks.instance(frontier, Sequence, "frontier", expected)
        if not all(hasattr(value, "shape") and hasattr(value, "dtype") for value in frontier):
            raise TypeError(f"frontier: got {checks.got(frontier)}, expected {expected}")
        self.frontier = tuple(frontier)
        parts = exchange.blocks(sharding)
        self._shapes = stored_shapes(frontier, -(-examples * views // parts) * parts, dtype)
        self.nbytes = sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in self._shapes)
        make = {"device": OnDevice, "host": OnHost}.get(str(place))
        directory = None if make else empty_directory(local_path(place, "place"))
        free = free_bytes(directory, on_device=make is OnDevice) if budget is None else budget
        held = 1 if make is OnDevice or sharding is None else len(exchange.local_blocks(sharding))
        self.nbytes_here = self.nbytes * held // parts
        if free is not None and self.nbytes_here > free:
            share = f", {held} / {parts} of them here" if held < parts else ""
            raise ValueError(
                f"examples: {examples:,} of {views} view(s) with {self.nbytes // (examples * views):,} bytes each take "
                f"{self.nbytes:,} bytes{share}, but {'the budget is' if budget is not None else 'free are'} {free:,}; "
                "store them as bfloat16 (dtype), at another place, or freeze more layers first, where the frontier is "
                "smaller"
            )
        self.filled = np.zeros((examples, views), bool)
        self._store: Store = (
            OnDisk(self._shapes, directory, sharding) if directory else (make or OnHost)(self._shapes, sharding)
        )

    @property
    def values(self) -> tuple[Any, ...]:
        """The arrays that hold the activations, of shape ``(examples * views, ...)``, views of an example in a row.

        With a ``sharding`` there may be some more rows at the end, and in host memory only those of this process. Those
        on the device can be arguments of a jitted step that looks up its rows itself.
        """
        return tuple(self._store.values)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        return bool(self.filled.all())

    def has(self, indices: Int[np.ndarray, " n"], view: int = 0) -> bool:
        """Whether the activations of all these examples are stored."""
        return bool(self.stored(indices, view).all())

    def stored(self, indices: Int[np.ndarray, " n"], view: int = 0) -> Bool[np.ndarray, " n"]:
        """Of which of these examples activations are stored.

        Args:
            indices: Which examples.
            view: Which view of them.

        Raises:
            ValueError: If an index is wrong.
        """
        return self.filled[self._checked(indices, view), view]

    def put(self, indices: Int[np.ndarray, " n"], activations: Sequence[Array], view: int = 0) -> None:
        """Stores activations.

        Args:
            indices: Which examples they are of.
            activations: Arrays of shape ``(n, ...)``.
            view: Which view of the examples.

        Raises:
            ValueError: If an index or a shape is wrong, or a value is too large for float16.
        """
        indices = self._checked(indices, view)
        expected = [(len(indices), *shape.shape[1:]) for shape in self._shapes]
        checks.arrays(activations, "activations", f"arrays of shapes {expected}")
        got = [tuple(value.shape) for value in activations]
        if got != expected:
            raise ValueError(
                f"activations: got shapes {got}, expected {expected}; pass what PrefixCache.activations returns"
            )
        self._store.put(self._rows(indices, view), _cast(activations, [shape.dtype for shape in self._shapes]))
        self.filled[indices, view] = True

    def take(self, indices: Int[np.ndarray, " n"], view: int = 0) -> tuple[jax.Array, ...]:
        """Looks activations up.

        Args:
            indices: Which examples, each any number of times.
            view: Which view of them.

        Returns:
            Arrays of shape ``(n, ...)`` on the device, in the dtype in which they are stored.

        Raises:
            ValueError: If some are not stored.
        """
        indices = self._checked(indices, view)
        missing = indices[~self.filled[indices, view]]
        if len(missing):
            raise ValueError(
                f"indices: of view {view}, nothing is stored for {len(missing)} of {len(indices)} examples, such as "
                f"{missing[:3].tolist()}; compute their activations and put them first"
            )
        return tuple(self._store.take(self._rows(indices, view)))

    def clear(self) -> None:
        """Forgets everything that is stored; the space stays taken."""
        self.filled[:] = False

    def _rows(self, indices: np.ndarray, view: int) -> np.ndarray:
        return (indices * self.filled.shape[1] + view).astype(np.int32 if self.filled.size < 2**31 else np.int64)

    def _checked(self, indices: Any, view: int) -> np.ndarray:
        return check_indices(indices, view, *self.filled.shape)


def narrowed(activations: Sequence[jax.Array], dtype: DTypeLike | None) -> list[jax.Array]:
    """Activations in the dtypes in which they are stored.

    Args:
        activations: Arrays of shape ``(n, ...)``.
        dtype: As of :class:`ActivationCache`.

    Raises:
        ValueError: If a value is too large for float16.
    """
    values = [jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for value in activations]
    return _cast(activations, [shape.dtype for shape in stored_shapes(values, 1, dtype)])


def _cast(activations: Sequence[jax.Array], dtypes: Sequence[Any]) -> list[jax.Array]:
    cast, overflows = _cast_and_overflows(list(activations), tuple(dtypes))
    if overflows is not None and bool(overflows):
        raise ValueError("activations: some are beyond 65504, the largest float16; store them as bfloat16")
    return cast


@functools.partial(jax.jit, static_argnums=1)
def _cast_and_overflows(values: list[jax.Array], dtypes: tuple[Any, ...]) -> tuple[list[jax.Array], jax.Array | None]:
    """The values in other types, and whether some became infinite by it, where that can happen."""
    narrow = [value.astype(dtype) for value, dtype in zip(values, dtypes, strict=True)]
    became = [
        jnp.any(jnp.isinf(new) & jnp.isfinite(old))
        for old, new in zip(values, narrow, strict=True)
        if new.dtype == jnp.float16 != old.dtype
    ]
    return narrow, functools.reduce(jnp.logical_or, became) if became else None
