"""Orbax checkpoints of pytrees, with JSON metadata, and errors that say what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr
from orbax.checkpoint import v1 as ocp

PyTree = Any


def write(path: str | Path, tree: PyTree, kind: str, metadata: dict[str, Any], *, overwrite: bool = False) -> None:
    """Writes a pytree of arrays and JSON metadata as an Orbax checkpoint, atomically.

    Args:
        path: Directory to make.
        tree: Pytree of arrays.
        kind: What it is a checkpoint of.
        metadata: What JSON can hold.
        overwrite: Whether to replace a checkpoint that is there.

    Raises:
        FileExistsError: If ``path`` exists and ``overwrite`` is false.
    """
    target = Path(path).absolute()
    if target.exists() and not overwrite:
        raise FileExistsError(f"path: {target} exists; choose another directory or pass overwrite=True")
    ocp.save(str(target), _by_name(tree), overwrite=overwrite, custom_metadata={"kind": kind} | metadata)


def read_metadata(path: str | Path, kind: str) -> dict[str, Any]:
    """The JSON metadata of a checkpoint.

    Args:
        path: Directory of the checkpoint.
        kind: What it should be a checkpoint of, for the error.

    Raises:
        FileNotFoundError: If there is no such directory.
        ValueError: If it is not a complete checkpoint of that kind.
    """
    return dict(_metadata(Path(path).absolute(), kind).custom_metadata)


def read(path: str | Path, like: PyTree, kind: str) -> PyTree:
    """Reads a pytree that :func:`write` wrote.

    Args:
        path: Directory of the checkpoint.
        like: Pytree of the expected structure; its leaves have a shape, a dtype and perhaps a sharding. Leaves come
            onto those devices, or onto the first one.
        kind: What it should be a checkpoint of, for the error.

    Returns:
        A pytree with the structure of ``like``.

    Raises:
        FileNotFoundError: If there is no such directory.
        ValueError: If the checkpoint is damaged, or a leaf is missing, is left over, or has another shape or dtype.
    """
    source = Path(path).absolute()
    saved = _metadata(source, kind).metadata
    expected = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in _by_name(like).items()}
    got = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in saved.items()}
    wrong = [name for name in sorted(expected.keys() | got.keys()) if expected.get(name) != got.get(name)]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"path: the {kind} in {source} does not fit: {name} is {_text(got.get(name))} there, expected "
            f"{_text(expected.get(name))} ({len(wrong)} of {len(expected)} arrays differ); restore it with the "
            "configuration it was saved with"
        )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device)
        for name, leaf in _by_name(like).items()
    }
    try:
        leaves = ocp.load(str(source), abstract)
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        raise ValueError(_damaged(source, kind, error)) from error
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _as_saved(leaves[keystr(path)], leaf), like)


def with_dropped(path: str | Path, like: PyTree, kind: str, *, prefix: str) -> PyTree:
    """``like``, with shape ``()`` for the leaves that were saved as a scalar because they were no longer needed.

    (Orbax does not save arrays of size zero.)

    Args:
        path: Directory of the checkpoint.
        like: Pytree of arrays.
        kind: What it should be a checkpoint of.
        prefix: Where ``like`` is in the saved pytree, as ``jax.tree_util.keystr`` writes it.
    """
    saved = _metadata(Path(path).absolute(), kind).metadata

    def dropped(path: Any, leaf: Any) -> Any:
        there = saved.get(prefix + keystr(path))
        is_dropped = there is not None and tuple(there.shape) == () != tuple(leaf.shape)
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


def _by_name(tree: PyTree) -> dict[str, Any]:
    return {keystr(path): _storable(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(leaf: Any) -> Any:
    """Random keys are stored as their bits."""
    if not _is_key(leaf):
        return leaf
    return (
        jax.eval_shape(jax.random.key_data, leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct)
        else jax.random.key_data(leaf)
    )


def _as_saved(leaf: jax.Array, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return np.asarray(leaf)
    if isinstance(like, jax.Array) and not like.committed:  # it may go to any device; what was read would insist on one
        leaf = jax.device_put(jax.device_get(leaf))
    return (
        jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(jax.numpy.zeros((), like.dtype)))
        if _is_key(like)
        else leaf
    )
