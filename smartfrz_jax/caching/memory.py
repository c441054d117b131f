"""Where activations lie: arrays on the device, in host memory, or in files."""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from smartfrz_jax.caching import exchange
from smartfrz_jax.pytrees import hosts

_ROOT = Path("/")


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
    """Arrays of JAX; divided among the devices of a mesh, if there is a sharding, each a block of rows."""

    def __init__(self, shapes: Sequence[jax.ShapeDtypeStruct], sharding: NamedSharding | None = None):
        self._sharding = sharding
        self.values: list[Any] = (
            [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
            if sharding is None
            else exchange.zeros(shapes, sharding)
        )

    def put(self, rows: np.ndarray, values: Sequence[jax.Array]) -> None:
        """As of :class:`Store`."""
        if self._sharding is None:
            self.values = _scattered(self.values, rows, list(values))
        else:
            self.values = exchange.scattered(self.values, rows, list(values), self._sharding)

    def take(self, rows: np.ndarray) -> list[jax.Array]:
        """As of :class:`Store`."""
        if self._sharding is None:
            return _gathered(self.values, rows)
        return exchange.gathered(self.values, rows, self._sharding)


class OnHost:
    """Arrays of NumPy; where a sharding divides them among processes, each has the rows of its devices."""

    def __init__(self, shapes: Sequence[jax.ShapeDtypeStruct], sharding: NamedSharding | None = None):
        self._sharding = sharding
        self._blocks = [0] if sharding is None else exchange.local_blocks(sharding)
        share = len(self._blocks), exchange.blocks(sharding)
        self.values: list[Any] = [
            self._made(i, (shape.shape[0] * share[0] // share[1], *shape.shape[1:]), shape.dtype)
            for i, shape in enumerate(shapes)
        ]
        self._rows = shapes[0].shape[0] // share[1] if shapes else 0  # of a block

    def _made(self, number: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def put(self, rows: np.ndarray, values: Sequence[jax.Array]) -> None:
        """As of :class:`Store`."""
        here, own = self._own(rows)
        for stored, new in zip(self.values, values, strict=True):
            stored[own] = hosts.fetch(new)[here]

    def take(self, rows: np.ndarray) -> list[jax.Array]:
        """As of :class:`Store`."""
        if self._sharding is None or len(self._blocks) == exchange.blocks(self._sharding):
            to = exchange.divided(self._sharding, len(rows))
            return [jax.device_put(np.ascontiguousarray(stored[rows]), to) for stored in self.values]
        return self._exchanged(rows, self._sharding)

    def _own(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of these rows are in this process, and where."""
        place = np.full(exchange.blocks(self._sharding), -1)
        place[self._blocks] = np.arange(len(self._blocks))
        block, within = np.divmod(rows, self._rows)
        here = np.flatnonzero(place[block] >= 0)
        return here, place[block[here]] * self._rows + within[here]

    def _exchanged(self, rows: np.ndarray, sharding: NamedSharding) -> list[jax.Array]:
        """Rows that lie in several processes: each device is given those of its block, and they are exchanged."""
        total = len(rows)
        homes = [np.flatnonzero(rows // self._rows == block) for block in range(exchange.blocks(sharding))]
        most = 1 << (max(map(len, homes)) - 1).bit_length()  # few sizes, as each is a program

        def blocks_of(make: Callable[[int], np.ndarray], shape: tuple[int, ...]) -> jax.Array:
            def of(index: Any) -> np.ndarray:
                return make((index[0].start or 0) // most)

            return jax.make_array_from_callback((len(homes) * most, *shape), sharding, of)

        def places(block: int) -> np.ndarray:
            return np.pad(homes[block], (0, most - len(homes[block])), constant_values=total).astype(np.int32)

        def given(stored: np.ndarray) -> jax.Array:
            def of(block: int) -> np.ndarray:
                own = stored[self._own(rows[homes[block]])[1]]
                return np.concatenate([own, np.zeros((most - len(own), *own.shape[1:]), own.dtype)])

            return blocks_of(of, stored.shape[1:])

        return exchange.placed([given(stored) for stored in self.values], blocks_of(places, ()), total, sharding)


class OnDisk(OnHost):
    """Files mapped into memory, as arrays of NumPy.

    Args:
        shapes: Of the whole arrays.
        directory: An empty one; of several processes each needs its own.
        sharding: As of :class:`OnHost`.
    """

    def __init__(self, shapes: Sequence[jax.ShapeDtypeStruct], directory: Path, sharding: NamedSharding | None = None):
        self._directory = directory
        super().__init__(shapes, sharding)

    def _made(self, number: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        file = self._directory / f"activations-{number}.bin"
        with file.open("wb") as opened:
            size = math.prod(shape) * dtype.itemsize
            if hasattr(os, "posix_fallocate"):  # so that a full disk is an error here, not a signal later
                os.posix_fallocate(opened.fileno(), 0, size)
            else:
                opened.truncate(size)
        return np.memmap(file, dtype=dtype, mode="r+", shape=shape)


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
    known = [free for free in (_available(), _left_in_cgroup()) if free is not None]
    return min(known, default=None)


def _available() -> int | None:
    """Bytes of the host that a process may take, those of the page cache that can be dropped included."""
    lines = _lines(_ROOT / "proc/meminfo")
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    if kilobytes is not None:
        return int(kilobytes) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


def _left_in_cgroup() -> int | None:
    """Bytes that the container of this process may still take; ``None`` without a limit."""
    groups = [line.split(":", 2) for line in _lines(_ROOT / "proc/self/cgroup")]
    left = []
    for _, kinds, path in (group for group in groups if len(group) == 3):
        second = not kinds  # version 2 of cgroups has one tree for all
        if not second and "memory" not in kinds.split(","):
            continue
        top = _ROOT / "sys/fs/cgroup" / ("" if second else "memory")
        limit, used = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        own = top / path.lstrip("/")
        # A limit of a group around it holds too; in a container the path may be one outside of it.
        for place in {top, *(each for each in (own, *own.parents) if each.is_relative_to(top))}:
            most, now = _number(place / limit), _number(place / used)
            if most is not None and now is not None:
                left.append(max(0, most - now + _droppable(place / "memory.stat")))
    return min(left, default=None)


def _droppable(path: Path) -> int:
    """Bytes of a group's page cache that can be dropped."""
    sizes = dict(line.split()[:2] for line in _lines(path))
    return int(sizes.get("total_inactive_file", sizes.get("inactive_file", 0)))


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not on every system
        return []
