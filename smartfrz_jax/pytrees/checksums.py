"""Checksums of the arrays of a checkpoint, also of those that no process holds as a whole.

Such an array has the sum of mixed elements, modulo 2**64: each process adds up its own, and the sum of all does not
depend on how the array is split, so that it can be restored onto other devices. Every other has its CRC-32, which also
depends on the order and is computed one and a half times as fast.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_BLOCK = 1 << 16  # elements that stay in the processor's cache while they are mixed
_MIX = 0x9E3779B97F4A7C15  # of splitmix64: odd, so that no bit is lost
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def of(arrays: Mapping[str, Any]) -> dict[str, int | str]:
    """Checksums of arrays by name: integers, or texts for arrays of which other processes hold parts.

    If there are such, all processes must call it.

    Args:
        arrays: Arrays of JAX or NumPy that Orbax got or gave.

    Example:
        >>> of({"a": np.arange(3, dtype=np.int32)})
        {'a': 494276218}
    """
    apart = {name: array for name, array in arrays.items() if _is_apart(array)}
    return {name: _crc(array) for name, array in arrays.items() if name not in apart} | _sums(apart)


def differing(saved: Mapping[str, int | str | None], arrays: Mapping[str, Any]) -> str | None:
    """The first name whose array is not the one that was saved; ``None`` if all are.

    What was saved as a whole, and comes in parts to several processes, is not looked at.

    Args:
        saved: Checksums from :func:`of`; of earlier versions ``None`` for arrays of several processes.
        arrays: Arrays by name. All processes must call it.
    """
    summed = {name: array for name, array in arrays.items() if isinstance(saved.get(name), str)}
    whole = {name: array for name, array in arrays.items() if isinstance(saved.get(name), int) and not _is_apart(array)}
    found = _sums(summed) | {name: _crc(array) for name, array in whole.items()}
    return next((name for name in arrays if name in found and found[name] != saved[name]), None)


def sum_of_shards(array: Any) -> int:
    """The part of this process in an array's checksum; for arrays that it holds as a whole, the checksum.

    Args:
        array: An array of JAX or NumPy.
    """
    if not _is_apart(array):
        return _mixed(array)
    shards = [shard.data for shard in array.addressable_shards if shard.replica_id == 0]
    return sum(map(_mixed, shards)) % 2**64


def _is_apart(array: Any) -> bool:
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def _crc(array: Any) -> int:
    return zlib.crc32(_bytes(array).data)


def _mixed(array: Any) -> int:
    array = _plain(array)
    words = array.reshape(-1).view(_WORDS.get(array.dtype.itemsize, np.uint64))
    total = 0
    for start in range(0, words.size, _BLOCK):
        mixed = words[start : start + _BLOCK].astype(np.uint64) * np.uint64(_MIX)  # array arithmetic wraps around
        mixed ^= mixed >> np.uint64(32)
        total += int(mixed.sum(dtype=np.uint64))
    return total % 2**64


def _plain(array: Any) -> np.ndarray:
    array = np.ascontiguousarray(array)
    if array.dtype.itemsize == 1 and array.dtype.kind == "V":  # of types with less than 8 bits the others may differ
        return array.astype(np.float32)
    return array


def _bytes(array: Any) -> np.ndarray:
    return _plain(array).reshape(-1).view(np.uint8)


def _sums(arrays: Mapping[str, Any]) -> dict[str, str]:
    """The sums of whole arrays, as text."""
    parts = {name: sum_of_shards(array) for name, array in arrays.items()}
    apart = [name for name, array in arrays.items() if _is_apart(array)]
    if jax.process_count() > 1 and apart:
        halves = np.array([(parts[name] >> 32, parts[name] & 0xFFFFFFFF) for name in apart], np.uint32)
        of_all = np.asarray(multihost_utils.process_allgather(halves)).swapaxes(0, 1).tolist()
        parts |= {
            name: sum((high << 32) + low for high, low in one) % 2**64 for name, one in zip(apart, of_all, strict=True)
        }
    return {name: f"{total:016x}" for name, total in parts.items()}
