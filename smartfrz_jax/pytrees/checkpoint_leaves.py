"""How the leaves of a pytree lie in a checkpoint, so that each comes back bit for bit, of the type it had.

Orbax holds arrays. What they do not tell stands in a *note* beside them: the kind of random keys, the shape of arrays
of size zero, Python's numbers and strings, types that TensorStore does not have, weak types, NumPy's 64 bits.

Under ``jax.jit`` a leaf of Python or NumPy becomes an array of JAX, so that what was saved and what it is restored in
place of may differ by that: ``0`` and a weak ``int32[]``, ``np.float64(0)`` and a ``float32[]``.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.extend.core import primitives

Note = dict[str, Any]

# Without enable_x64 these become those.
_JITTED = {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}
# Which dtypes a number of Python can have become.
_KINDS = {bool: np.bool_, int: np.integer, float: np.floating, complex: np.complexfloating}
# Types that TensorStore does not have, with the one of the same width or more that holds them.
_HELD_BY = {"uint2": "uint8", "uint4": "uint8", "float8_e4m3": "uint8"}


def is_python(leaf: Any) -> bool:
    """Whether it is a number or a string of Python; NumPy's float64 is a float, too."""
    return type(leaf) in (*_KINDS, str)


def is_stored(leaf: Any) -> bool:
    """Whether Orbax gets it: it does not save arrays without bits, and cannot list all of Python's numbers."""
    return not is_python(leaf) and leaf.size > 0 and leaf.dtype != jax.dtypes.float0


def can_be_saved(leaf: Any) -> bool:
    """Whether it is a number or a string of Python, or an array of numbers or random keys."""
    if is_python(leaf):
        return True
    kinds = (np.number, np.bool_, jax.dtypes.prng_key, jax.dtypes.float0)
    return all(hasattr(leaf, name) for name in ("dtype", "shape", "size")) and any(
        jax.numpy.issubdtype(leaf.dtype, kind) for kind in kinds
    )


def stored(leaf: Any) -> Any:
    """What Orbax gets of an array; of several processes each has its own copies, which it takes only as NumPy's."""
    leaf = _held(leaf)
    return np.asarray(leaf) if isinstance(leaf, np.generic) or (isinstance(leaf, jax.Array) and _is_own(leaf)) else leaf


def note(leaf: Any) -> Note | None:
    """What is written down of a leaf beside what Orbax gets; ``None`` if nothing."""
    shape, dtype = described(leaf)
    if is_python(leaf):
        value = [leaf.real, leaf.imag] if isinstance(leaf, complex) else leaf
        return {"shape": [], "dtype": dtype, "value": value}
    more: Note = {}
    if getattr(leaf, "weak_type", False):
        more = {"weak": True}
    elif _is_numpy(leaf) and dtype in _JITTED:
        more = {"numpy": "array" if isinstance(leaf, np.ndarray) else "scalar"}
    if more or not is_stored(leaf) or _is_key(leaf) or dtype in _HELD_BY:
        return {"shape": list(shape), "dtype": dtype} | more
    return None


def described(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype; of Python's numbers and strings the type."""
    return ((), type(leaf).__name__) if is_python(leaf) else (tuple(leaf.shape), str(leaf.dtype))


def expected(saved: Note | None, like: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of ``like``; of random keys those of their bits, if what was saved does not tell their kind."""
    no_kind = saved is not None and not saved["dtype"].startswith("key<")
    return described(_bits(like) if no_kind and _is_key(like) else like)


def fits(saved: Note, like: Any) -> bool:
    """Whether what was saved can come in place of ``like``: the same but for what ``jax.jit`` makes of it.

    Args:
        saved: Shape, dtype and the like of what was saved.
        like: The leaf of the expected pytree.
    """
    shape, dtype = expected(saved, like)
    if tuple(saved["shape"]) != shape:
        return False
    if saved["dtype"] == dtype:
        return True
    if "value" in saved and not is_python(like):
        return _is_of(dtype, saved["dtype"])
    if is_python(like) and "value" not in saved:
        return _is_of(saved["dtype"], dtype)
    is_numpy = _is_numpy(like)
    if is_numpy and "numpy" not in saved:
        return _JITTED.get(dtype) == saved["dtype"]
    return "numpy" in saved and not is_numpy and not is_python(like) and _JITTED[saved["dtype"]] == dtype


def abstract(saved: Note, like: Any) -> Any:
    """What tells Orbax how to load an array that comes in place of ``like``.

    Through NumPy goes what is or was NumPy's or Python's, and all that has 64 bits: Orbax reads in threads, of which
    ``jax.enable_x64`` knows nothing, and there they would lose half of them.
    """
    shape, dtype = tuple(saved["shape"]), _HELD_BY.get(saved["dtype"], saved["dtype"])
    if _is_key(like):
        shape, dtype = described(_bits(like))
    if is_python(like) or _is_numpy(like) or dtype in _JITTED or _is_own(like):
        return np.empty(shape, dtype)
    return jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype), sharding=sharding(like))


def needs_x64(saved: Note, like: Any) -> bool:
    """Whether it would lose half of its bits, as a device has no 64 without ``jax.enable_x64``."""
    comes_as_numpy = "numpy" in saved or (_is_numpy(like) and _is_same(saved, like))
    is_array = "value" not in saved and not comes_as_numpy
    return is_array and saved["dtype"] in _JITTED and not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


def restored(saved: Note, loaded: Any, like: Any) -> Any:
    """The leaf that was saved, in place of ``like``.

    Args:
        saved: Shape, dtype and the like of what was saved.
        loaded: What Orbax made of :func:`abstract`; ``None`` if it does not have it.
        like: The leaf of the expected pytree.
    """
    if "value" in saved:
        return complex(*saved["value"]) if saved["dtype"] == "complex" else saved["value"]
    if loaded is None and like.dtype == jax.dtypes.float0:
        return np.zeros(saved["shape"], like.dtype)
    if loaded is None:
        loaded = _empty(abstract(saved, like))
    if saved["dtype"] in _HELD_BY:
        loaded = _released(loaded, saved["dtype"])
    if _is_numpy(like) and _is_same(saved, like):
        return np.asarray(loaded) if isinstance(like, np.ndarray) else np.asarray(loaded)[()]
    if "numpy" in saved:
        return np.asarray(loaded) if saved["numpy"] == "array" else np.asarray(loaded)[()]
    if not _is_committed(like):  # it may go to any device; what was read would insist on one
        loaded = jax.device_put(jax.device_get(loaded))
    elif isinstance(loaded, np.ndarray):
        loaded = _placed(loaded, sharding(like))
    if "weak" in saved:
        return primitives.convert_element_type_p.bind(loaded, new_dtype=loaded.dtype, weak_type=True, sharding=None)
    if _is_key(like):
        return jax.random.wrap_key_data(loaded, impl=jax.random.key_impl(jax.numpy.zeros((), like.dtype)))
    return loaded


def sharding(leaf: Any) -> jax.sharding.Sharding:
    """Where an array is to lie; on the default device if it does not say."""
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _is_same(saved: Note, like: Any) -> bool:
    return described(like) == (tuple(saved["shape"]), saved["dtype"])


def _is_of(dtype: str, python: str) -> bool:
    """Whether jit makes that dtype of a number of that type of Python."""
    kind = next((kind for number, kind in _KINDS.items() if number.__name__ == python), None)
    return kind is not None and not dtype.startswith("key<") and jax.numpy.issubdtype(jax.numpy.dtype(dtype), kind)


def _is_key(leaf: Any) -> bool:
    return not is_python(leaf) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _bits(key: Any) -> Any:
    data = jax.random.key_data
    return jax.eval_shape(data, key) if isinstance(key, jax.ShapeDtypeStruct) else data(key)


def _held(leaf: Any) -> Any:
    """Random keys, and types that TensorStore does not have, as numbers that it has."""
    if _is_key(leaf):
        return _bits(leaf)
    holder = _HELD_BY.get(str(leaf.dtype))
    if holder is None:
        return leaf
    if jax.numpy.issubdtype(leaf.dtype, np.integer):
        return leaf.astype(holder)
    return jax.lax.bitcast_convert_type(leaf, holder) if isinstance(leaf, jax.Array) else leaf.view(holder)


def _released(loaded: Any, dtype: str) -> Any:
    target = jax.numpy.dtype(dtype)
    if jax.numpy.issubdtype(target, np.integer):
        return loaded.astype(target)
    return jax.lax.bitcast_convert_type(loaded, target) if isinstance(loaded, jax.Array) else loaded.view(target)


def _is_numpy(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | np.generic)


def _is_committed(leaf: Any) -> bool:
    return leaf.committed if isinstance(leaf, jax.Array) else getattr(leaf, "sharding", None) is not None


def _is_own(leaf: Any) -> bool:
    return jax.process_count() > 1 and sharding(leaf).is_fully_addressable


def _empty(wanted: Any) -> Any:
    zeros = np.zeros(wanted.shape, wanted.dtype)
    return zeros if isinstance(wanted, np.ndarray) else jax.device_put(zeros, wanted.sharding)


def _placed(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    if where.is_fully_addressable:
        return jax.device_put(array, where)
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])
