"""Where activations lie: arrays on the device, in host memory, or in files."""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from smartfrz_jax.pytrees import hosts


class Store(Protocol):
    """Arrays whose first axis counts examples, times views; made from the shapes and dtypes of the whole arrays.

    Attributes:
        values: The arrays.
    """

    values: list[Any]

    def put(self, rows: np.ndarray, values: Sequence[jax.Array]) -> None:
        """Writes some rows of every array."""
        ...

    def take(self, rows: np.ndarray) -> list[jax.Array]:
        """Those rows of every array, on the device."""
        ...


class OnDevice:
    """Arrays of JAX."""

    def __init__(self, shapes: Sequence[jax.ShapeDtypeStruct]):
        self.values: list[Any] = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]

    def put(self, rows: np.ndarray, values: Sequence[jax.Array]) -> None:
        """As of :class:`Store`."""
        self.values = _scattered(self.values, rows, list(values))

    def take(self, rows: np.ndarray) -> list[jax.Array]:
        """As of :class:`Store`."""
        return _gathered(self.values, rows)


class OnHost:
    """Arrays of NumPy."""

    def __init__(self, shapes: Sequence[jax.ShapeDtypeStruct]):
        self.values: list[Any] = [np.zeros(shape.shape, shape.dtype) for shape in shapes]

    def put(self, rows: np.ndarray, values: Sequence[jax.Array]) -> None:
        """As of :class:`Store`."""
        for stored, new in zip(self.values, values, strict=True):
            stored[rows] = hosts.fetch(new)

    def take(self, rows: np.ndarray) -> list[jax.Array]:
        """As of :class:`Store`."""
        return [jax.device_put(np.ascontiguousarray(stored[rows])) for stored in self.values]


class OnDisk(OnHost):
    """Files mapped into memory, as arrays of NumPy.

    Args:
        shapes: Of the whole arrays.
        directory: An empty one; of several processes each needs its own.
    """

    def __init__(self, shapes: Sequence[jax.ShapeDtypeStruct], directory: Path):
        self.values = []
        for i, shape in enumerate(shapes):
            file = directory / f"activations-{i}.bin"
            with file.open("wb") as opened:
                size = math.prod(shape.shape) * shape.dtype.itemsize
                if hasattr(os, "posix_fallocate"):  # so that a full disk is an error here, not a signal later
                    os.posix_fallocate(opened.fileno(), 0, size)
                else:
                    opened.truncate(size)
            self.values.append(np.memmap(file, dtype=shape.dtype, mode="r+", shape=shape.shape))


@functools.partial(jax.jit, donate_argnums=0)
def _scattered(stored: list[jax.Array], rows: jax.Array, new: list[jax.Array]) -> list[jax.Array]:
    return [old.at[rows].set(values) for old, values in zip(stored, new, strict=True)]


@jax.jit
def _gathered(stored: list[jax.Array], rows: jax.Array) -> list[jax.Array]:
    return [jnp.take(values, rows, axis=0, mode="clip") for values in stored]


def empty_directory(path: Path) -> Path:
    """Makes a directory if it is not there.

    Args:
        path: The directory.

    Returns:
        The same; it is there, empty and writable.

    Raises:
        FileExistsError: If it is not empty.
        NotADirectoryError: If it is a file.
        PermissionError: If nothing can be written there.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"place: {path} is a file, expected 'device', 'host' or a directory")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"place: the directory {path} is not empty; pass a new one, or delete what is in it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "writable").touch()
        (path / "writable").unlink()
    except OSError as error:
        raise PermissionError(f"place: cannot write to the directory {path} ({error}); pass another") from error
    return path


def free_bytes(directory: Path | None, *, on_device: bool) -> int | None:
    """Bytes that are free; ``None`` where nobody knows.

    Args:
        directory: Where activations go on disk; ``None`` for memory.
        on_device: Whether that is the device's memory.
    """
    if directory is not None:
        return shutil.disk_usage(directory).free
    stats = jax.local_devices()[0].memory_stats() if on_device else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    if on_device and jax.default_backend() != "cpu":
        return None
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None
