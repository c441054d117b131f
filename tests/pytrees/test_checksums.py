"""Checksums of arrays, and of those that are split over devices or processes."""

import jax
import ml_dtypes
import numpy as np
import pytest

from smartfrz_jax.pytrees import checksums

DTYPES = [np.bool_, np.int8, np.float16, ml_dtypes.bfloat16, np.float32, np.complex64, np.float64, np.complex128]
rng = np.random.default_rng(0)


def array_of(dtype, shape=(8, 48)):
    return np.frombuffer(rng.bytes(np.dtype(dtype).itemsize * int(np.prod(shape))), dtype).reshape(shape)


def parts(array):
    """As if processes held the parts of an array."""
    return sum(map(checksums.sum_of_shards, np.split(array, 4))) % 2**64


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_the_sum_does_not_depend_on_how_an_array_is_split_and_sees_any_bit(dtype):
    array = array_of(dtype)
    total = checksums.sum_of_shards(array)
    assert parts(array) == parts(array.T) == total
    for _ in range(20):
        damaged = bytearray(array.tobytes())
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        assert checksums.sum_of_shards(np.frombuffer(damaged, dtype)) != total


def test_the_sum_of_large_arrays_and_of_numbers():
    array = array_of(np.uint32, (3, 70_001))
    words = [int(word) * 0x9E3779B97F4A7C15 % 2**64 for word in array.reshape(-1)]
    assert checksums.sum_of_shards(array) == sum(word ^ word >> 32 for word in words) % 2**64
    assert checksums.sum_of_shards(np.float32(1)) != checksums.sum_of_shards(np.float32(2))


def apart(monkeypatch):
    """Every array of JAX counts as one of which other processes hold parts."""
    monkeypatch.setattr(checksums, "_is_apart", lambda array: isinstance(array, jax.Array))


@pytest.mark.parametrize("spec", [(), ("data",), (None, "data")], ids=["replicated", "rows", "columns"])
def test_arrays_of_several_processes_have_the_same_checksum_however_they_lie(monkeypatch, spec):
    apart(monkeypatch)
    array = array_of(np.uint32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    lying = jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))
    found = checksums.of({"a": lying, "b": array})
    assert found == {"a": f"{checksums.sum_of_shards(array):016x}", "b": checksums.of({"b": array})["b"]}
    assert checksums.differing(found, {"a": jax.device_put(array), "b": array}) is None
    assert checksums.differing(found, {"a": array, "b": array}) is None  # in one process, afterwards
    assert checksums.differing(found, {"a": jax.device_put(array ^ 4), "b": array}) == "a"
    assert checksums.differing(found, {"a": lying, "b": array ^ 4}) == "b"
    assert checksums.differing({"a": None} | found, {"b": array}) is None


def test_sums_are_added_up_over_processes(monkeypatch):
    gathered = []

    def both(halves):
        gathered.append(halves)
        return np.stack([halves, np.full_like(halves, 0xFFFFFFFF)])

    apart(monkeypatch)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checksums.multihost_utils, "process_allgather", both)
    array = array_of(np.uint32)
    found = checksums.of({"a": jax.device_put(array)})
    assert int(found["a"], 16) == (checksums.sum_of_shards(array) - 1) % 2**64
    assert gathered[0].dtype == np.uint32
    # Restored in place of what each process has for itself, it is whole in each.
    assert checksums.differing({"a": f"{checksums.sum_of_shards(array):016x}"}, {"a": array}) is None
