"""Orbax checkpoints of pytrees, with JSON metadata, and errors that say what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr
from orbax.checkpoint import v1 as ocp

PyTree = Any

# Where the metadata describe what Orbax does not hold as it is: random keys, arrays of size zero, Python's numbers.
_SPECIAL = "special_leaves"


def write(path: str | Path, tree: PyTree, kind: str, metadata: dict[str, Any], *, overwrite: bool = False) -> None:
    """Writes a pytree and JSON metadata as an Orbax checkpoint, atomically.

    Args:
        path: Directory to make.
        tree: Pytree of arrays; numbers and strings of Python may be among them.
        kind: What it is a checkpoint of.
        metadata: What JSON can hold.
        overwrite: Whether to replace a checkpoint that is there.

    Raises:
        FileExistsError: If ``path`` exists and ``overwrite`` is false.
        TypeError: If a leaf is neither an array nor a number nor a string.
        ValueError: If there is no array with elements, without which Orbax writes nothing.
    """
    target = Path(path).absolute()
    if target.exists() and not overwrite:
        raise FileExistsError(f"path: {target} exists; choose another directory or pass overwrite=True")
    leaves = _by_name(tree, "tree")
    arrays = {name: _given(_storable(leaf)) for name, leaf in leaves.items() if _is_stored(leaf)}
    if not arrays:
        raise ValueError(f"tree: the {kind} has no array with elements, expected at least one; add what it is for")
    special = {name: _note(leaf) for name, leaf in leaves.items() if not _is_stored(leaf) or _is_key(leaf)}
    metadata = {"kind": kind} | metadata | ({_SPECIAL: special} if special else {})
    ocp.save(str(target), arrays, overwrite=overwrite, custom_metadata=metadata)


def read_metadata(path: str | Path, kind: str) -> dict[str, Any]:
    """The JSON metadata of a checkpoint.

    Args:
        path: Directory of the checkpoint.
        kind: What it should be a checkpoint of, for the error.

    Raises:
        FileNotFoundError: If there is no such directory.
        ValueError: If it is not a complete checkpoint of that kind.
    """
    metadata = _metadata(Path(path).absolute(), kind).custom_metadata
    return {name: value for name, value in metadata.items() if name != _SPECIAL}


def read(path: str | Path, like: PyTree, kind: str) -> PyTree:
    """Reads a pytree that :func:`write` wrote.

    Args:
        path: Directory of the checkpoint.
        like: Pytree of the expected structure; its leaves have a shape, a dtype and perhaps a sharding. Leaves come
            onto those devices; without a sharding, or in place of an array that is not committed to one, onto the
            default device, not committed either; in place of NumPy arrays come NumPy arrays, in place of a number of
            Python the one that was saved.
        kind: What it should be a checkpoint of, for the error.

    Returns:
        A pytree with the structure of ``like``.

    Raises:
        FileNotFoundError: If there is no such directory.
        TypeError: If a leaf is neither an array nor a number nor a string.
        ValueError: If the checkpoint is damaged, or a leaf is missing, is left over, or has another shape or dtype.
    """
    source = Path(path).absolute()
    metadata, wanted = _metadata(source, kind), _by_name(like, "like")
    saved, special = metadata.metadata, metadata.custom_metadata.get(_SPECIAL, {})
    got = {name: _described(leaf) for name, leaf in saved.items()}
    got |= {name: (tuple(note["shape"]), note["dtype"]) for name, note in special.items()}
    # Which kind a random key is of was not always noted.
    expected = {
        name: _described(_storable(leaf) if name in saved and name not in special else leaf)
        for name, leaf in wanted.items()
    }
    wrong = [name for name in sorted(expected.keys() | got.keys()) if expected.get(name) != got.get(name)]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"path: the {kind} in {source} does not fit: {name} is {_text(got.get(name))} there, expected "
            f"{_text(expected.get(name))} ({len(wrong)} of {len(expected)} arrays differ); restore it with the "
            "configuration it was saved with"
        )
    try:
        leaves = ocp.load(str(source), {name: _abstract(wanted[name]) for name in saved})
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        raise ValueError(_damaged(source, kind, error)) from error

    def restored(path: Any, leaf: Any) -> Any:
        name = keystr(path)
        if _is_python(leaf):
            return special[name]["value"]
        return _as_saved(leaves[name] if name in leaves else _empty(leaf), leaf)

    return jax.tree_util.tree_map_with_path(restored, like)


def outline(tree: PyTree) -> PyTree:
    """The same with shapes in place of device arrays: what :func:`read` needs of it, without their memory."""

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if leaf.committed else None)

    return jax.tree.map(shape, tree)


def with_dropped(path: str | Path, like: PyTree, kind: str, *, prefix: str) -> PyTree:
    """``like``, with shape ``()`` for the leaves that were saved as a scalar because they were no longer needed.

    Args:
        path: Directory of the checkpoint.
        like: Pytree of arrays or ``jax.ShapeDtypeStruct``.
        kind: What it should be a checkpoint of.
        prefix: Where ``like`` is in the saved pytree, as ``jax.tree_util.keystr`` writes it.
    """
    saved = _metadata(Path(path).absolute(), kind).metadata

    def dropped(path: Any, leaf: Any) -> Any:
        there = saved.get(prefix + keystr(path))
        is_dropped = there is not None and tuple(there.shape) == () != np.shape(leaf)
        return np.zeros((), leaf.dtype) if is_dropped else leaf

    return jax.tree_util.tree_map_with_path(dropped, like)


def _metadata(source: Path, kind: str) -> Any:
    if not source.is_dir():
        raise FileNotFoundError(f"path: there is no directory {source}; expected the checkpoint of a {kind}")
    try:
        metadata = ocp.metadata(str(source))
    except Exception as error:  # as above
        raise ValueError(_damaged(source, kind, error)) from error
    if not isinstance(metadata.custom_metadata, dict) or metadata.custom_metadata.get("kind") != kind:
        raise ValueError(
            f"path: {source} is not the checkpoint of a {kind}; its metadata are {metadata.custom_metadata}"
        )
    if not isinstance(metadata.metadata, dict):  # Orbax only logs that it could not read them
        raise ValueError(_damaged(source, kind, ValueError("the list of its arrays cannot be read")))
    return metadata


def _damaged(source: Path, kind: str, error: Exception) -> str:
    first_line = (str(error) or "no message").splitlines()[0]
    return (
        f"path: {source} is not a complete checkpoint of a {kind} ({type(error).__name__}: {first_line}); "
        "restore another copy, or save it again"
    )


def _text(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return "missing" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _by_name(tree: PyTree, argument: str) -> dict[str, Any]:
    leaves = {keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for name, leaf in leaves.items():
        if not _is_python(leaf) and not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
            raise TypeError(
                f"{argument}: {name} is {type(leaf).__name__}, expected an array or a number; make it a NumPy array, "
                "or keep it out of what is saved"
            )
    return leaves


def _is_python(leaf: Any) -> bool:
    return type(leaf) in (bool, int, float, str)  # NumPy's float64 is a float, too


def _is_key(leaf: Any) -> bool:
    return not _is_python(leaf) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_stored(leaf: Any) -> bool:
    """Orbax does not save arrays of size zero, and cannot list all of Python's numbers."""
    return not _is_python(leaf) and leaf.size > 0


def _described(leaf: Any) -> tuple[tuple[int, ...], str]:
    return ((), type(leaf).__name__) if _is_python(leaf) else (tuple(leaf.shape), str(leaf.dtype))


def _note(leaf: Any) -> dict[str, Any]:
    shape, dtype = _described(leaf)
    return {"shape": list(shape), "dtype": dtype} | ({"value": leaf} if _is_python(leaf) else {})


def _storable(leaf: Any) -> Any:
    """Random keys are stored as their bits, NumPy's scalars as arrays."""
    if isinstance(leaf, np.generic):
        return np.asarray(leaf)
    if not _is_key(leaf):
        return leaf
    return (
        jax.eval_shape(jax.random.key_data, leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct)
        else jax.random.key_data(leaf)
    )


def _given(leaf: Any) -> Any:
    """What is given to Orbax to write."""
    return np.asarray(leaf) if isinstance(leaf, jax.Array) and _is_own(leaf) else leaf


def _abstract(like: Any) -> Any:
    """What tells Orbax how to load an array."""
    leaf = _storable(like)
    if isinstance(leaf, np.ndarray) or _is_own(leaf):  # NumPy's 64 bits would lose half of them on a device
        return np.empty(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))


def _is_committed(leaf: Any) -> bool:
    return leaf.committed if isinstance(leaf, jax.Array) else getattr(leaf, "sharding", None) is not None


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _is_own(leaf: Any) -> bool:
    """Of several processes each has its own copy, of which Orbax takes and gives only arrays of NumPy."""
    return jax.process_count() > 1 and _sharding(leaf).is_fully_addressable


def _empty(like: Any) -> Any:
    abstract = _abstract(like)
    zeros = np.zeros(abstract.shape, abstract.dtype)
    return zeros if isinstance(abstract, np.ndarray) else jax.device_put(zeros, abstract.sharding)


def _as_saved(leaf: Any, like: Any) -> Any:
    if isinstance(like, np.ndarray | np.generic):
        return np.asarray(leaf) if isinstance(like, np.ndarray) else np.asarray(leaf)[()]
    if not _is_committed(like):  # it may go to any device; what was read would insist on one
        leaf = jax.device_put(jax.device_get(leaf))
    elif isinstance(leaf, np.ndarray):
        leaf = jax.device_put(leaf, _sharding(like))
    return (
        jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(jax.numpy.zeros((), like.dtype)))
        if _is_key(like)
        else leaf
    )
