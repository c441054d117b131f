"""Orbax checkpoints of pytrees, with JSON metadata, and errors that say what does not fit."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr

from smartfrz_jax.pytrees import checkpoint_leaves, checks, checksums
from smartfrz_jax.pytrees.file_paths import Path, PathLike, as_path, is_remote
from smartfrz_jax.pytrees.types import PyTree

# Where the metadata have the notes on leaves that Orbax does not hold as they are, the checksums of those that it does,
# and that of all the metadata.
_SPECIAL, _ARRAYS, _ALL = "special_leaves", "checksums", "checksum"


class Contents(NamedTuple):
    """What an Orbax checkpoint is made of, under the names that Orbax's functions and managers have for it.

    Attributes:
        state: The arrays by name.
        custom_metadata: What JSON can hold, with checksums.
    """

    state: dict[str, jax.Array | np.ndarray]
    custom_metadata: dict[str, Any]


def contents(tree: PyTree, kind: str, metadata: dict[str, Any]) -> Contents:
    """A pytree and JSON metadata as :func:`write` writes them, for who writes them in another way.

    Args:
        tree: Pytree of arrays of JAX or NumPy; numbers and strings of Python may be among them.
        kind: What it is a checkpoint of.
        metadata: What JSON can hold.

    Raises:
        TypeError: If a leaf is neither an array nor a number nor a string.
        ValueError: If there is no array with elements, without which Orbax writes nothing.
    """
    leaves = leaves_by_name(tree, "tree")
    arrays = {
        name: checkpoint_leaves.stored(leaf) for name, leaf in leaves.items() if checkpoint_leaves.is_stored(leaf)
    }
    if not arrays:
        raise ValueError(f"tree: the {kind} has no array with elements, expected at least one; add what it is for")
    special = {name: note for name, leaf in leaves.items() if (note := checkpoint_leaves.note(leaf)) is not None}
    metadata = {"kind": kind} | metadata | ({_SPECIAL: special} if special else {})
    metadata[_ARRAYS] = checksums.of(arrays)
    metadata[_ALL] = _checksum(metadata)
    return Contents(arrays, metadata)


def write(path: PathLike, tree: PyTree, kind: str, metadata: dict[str, Any], *, overwrite: bool = False) -> None:
    """Writes a pytree and JSON metadata as an Orbax checkpoint, atomically, with checksums.

    Args:
        path: Directory to make.
        tree: As of :func:`contents`.
        kind: What it is a checkpoint of.
        metadata: What JSON can hold.
        overwrite: Whether to replace a checkpoint that is there.

    Raises:
        FileExistsError: If ``path`` exists and ``overwrite`` is false.
        TypeError: If a leaf is neither an array nor a number nor a string.
        ValueError: If there is no array with elements, without which Orbax writes nothing.
    """
    checks.flag(overwrite, "overwrite")
    target = _location(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"path: {target} exists; choose another directory or pass overwrite=True")
    state, custom_metadata = contents(tree, kind, metadata)
    _orbax().save(str(target), state, overwrite=overwrite, custom_metadata=custom_metadata)


def read_metadata(path: PathLike, kind: str) -> dict[str, Any]:
    """The JSON metadata of a checkpoint.

    Args:
        path: Directory of the checkpoint.
        kind: What it should be a checkpoint of, for the error.

    Raises:
        FileNotFoundError: If there is no such directory.
        ValueError: If it is not a complete checkpoint of that kind.
    """
    return _own(_metadata(_location(path), kind).custom_metadata)


def read(path: PathLike, like: PyTree, kind: str) -> PyTree:
    """Reads a pytree that :func:`write` wrote.

    Args:
        path: Directory of the checkpoint.
        like: Pytree of the expected structure; its leaves have a shape, a dtype and perhaps a sharding. Leaves come
            onto those devices; without a sharding, or in place of an array that is not committed to one, onto the
            default device, not committed either; in place of NumPy arrays come NumPy arrays. Numbers of Python, and
            NumPy's of 64 bits, fit what ``jax.jit`` makes of them, and the other way round: what was saved comes.
        kind: What it should be a checkpoint of, for the error.

    Returns:
        A pytree with the structure of ``like``.

    Raises:
        FileNotFoundError: If there is no such directory.
        TypeError: If a leaf is neither an array nor a number nor a string.
        ValueError: If the checkpoint is damaged, or a leaf is missing, is left over, or has another shape or dtype.
    """
    wanted = leaves_by_name(like, "like")
    leaves = _load(_location(path), kind, wanted, lambda saved: saved)
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[keystr(path)], like)


def read_leaves(path: PathLike, wanted: dict[str, Any], kind: str) -> dict[str, Any]:
    """Reads some of the leaves that :func:`write` wrote, and only these.

    Args:
        path: Directory of the checkpoint.
        wanted: By name in the checkpoint, as in :func:`notes`, what each is to come in place of, as in :func:`read`.
        kind: What it should be a checkpoint of, for the error.

    Raises:
        FileNotFoundError: If there is no such directory.
        ValueError: If the checkpoint is damaged, or a leaf is missing or has another shape or dtype.
    """
    return _load(
        _location(path), kind, wanted, lambda saved: {name: note for name, note in saved.items() if name in wanted}
    )


def notes(path: PathLike, kind: str) -> dict[str, checkpoint_leaves.Note]:
    """Shape, dtype and the like of all leaves of a checkpoint, by name as ``jax.tree_util.keystr`` writes it.

    Args:
        path: Directory of the checkpoint.
        kind: What it should be a checkpoint of, for the error.

    Raises:
        FileNotFoundError: If there is no such directory.
        ValueError: If it is not a complete checkpoint of that kind.
    """
    return _notes(_metadata(_location(path), kind))


def _notes(metadata: Any) -> dict[str, checkpoint_leaves.Note]:
    saved = {name: {"shape": leaf.shape, "dtype": str(leaf.dtype)} for name, leaf in metadata.metadata.items()}
    return saved | metadata.custom_metadata.get(_SPECIAL, {})


def _load(
    source: Path,
    kind: str,
    wanted: dict[str, Any],
    compared: Callable[[dict[str, checkpoint_leaves.Note]], dict[str, checkpoint_leaves.Note]],
) -> dict[str, Any]:
    """The leaves that are wanted; ``compared`` are those of the checkpoint that must be the same."""
    metadata = _metadata(source, kind)
    saved = _notes(metadata)
    _check_fit(compared(saved), wanted, f"the {kind} in {source}")
    # Orbax leaves out what is an ellipsis.
    abstract = {
        name: checkpoint_leaves.abstract(saved[name], wanted[name]) if name in wanted else ...
        for name in metadata.metadata
    }
    try:
        loaded = _orbax().load(str(source), abstract)
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        raise ValueError(_damaged(source, kind, error)) from error
    loaded = {name: array for name, array in loaded.items() if name in wanted}
    wrong = checksums.differing(metadata.custom_metadata.get(_ARRAYS, {}), loaded)
    if wrong is not None:
        raise ValueError(_damaged(source, kind, ValueError(f"the values of {wrong} are not those that were saved")))
    return {name: checkpoint_leaves.restored(saved[name], loaded.get(name), leaf) for name, leaf in wanted.items()}


def outline(tree: PyTree) -> PyTree:
    """The same with shapes in place of device arrays: what :func:`read` needs of it, without their memory."""

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if leaf.committed else None)

    return jax.tree.map(shape, tree)


def with_dropped(path: PathLike, like: PyTree, kind: str, *, prefix: str) -> PyTree:
    """``like``, with shape ``()`` for the leaves that were saved as a scalar because they were no longer needed.

    Such a scalar holds nothing, and may be of another type than what it stands for.

    Args:
        path: Directory of the checkpoint.
        like: Pytree of arrays or ``jax.ShapeDtypeStruct``.
        kind: What it should be a checkpoint of.
        prefix: Where ``like`` is in the saved pytree, as ``jax.tree_util.keystr`` writes it.
    """
    saved = _metadata(_location(path), kind).metadata

    def dropped(path: Any, leaf: Any) -> Any:
        there = saved.get(prefix + keystr(path))
        if there is None or tuple(there.shape) or np.shape(leaf) == ():
            return leaf
        return np.zeros((), there.dtype)

    return jax.tree_util.tree_map_with_path(dropped, like)


def _orbax() -> Any:
    """Orbax, which takes longer to import than all else together, so only where a checkpoint is written or read."""
    from orbax.checkpoint import v1

    return v1


def _location(path: PathLike) -> Path:
    found = as_path(path)
    return found if is_remote(found) else found.absolute()  # of others Orbax takes only that


def _metadata(source: Path, kind: str) -> Any:
    if not source.is_dir():
        file = ", it is a file" if source.exists() else ""
        raise FileNotFoundError(f"path: there is no directory {source}{file}; expected the checkpoint of a {kind}")
    try:
        metadata = _orbax().metadata(str(source))
    except Exception as error:  # as above
        raise ValueError(_damaged(source, kind, error)) from error
    if not isinstance(metadata.custom_metadata, dict) or metadata.custom_metadata.get("kind") != kind:
        there = _own(metadata.custom_metadata) if isinstance(metadata.custom_metadata, dict) else None
        raise ValueError(f"path: {source} is not the checkpoint of a {kind}; its metadata are {there!s:.300}")
    if metadata.custom_metadata.get(_ALL, _checksum(metadata.custom_metadata)) != _checksum(metadata.custom_metadata):
        raise ValueError(_damaged(source, kind, ValueError("its metadata are not those that were saved")))
    if not isinstance(metadata.metadata, dict):  # Orbax only logs that it could not read them
        raise ValueError(_damaged(source, kind, ValueError("the list of its arrays cannot be read")))
    return metadata


def _own(metadata: dict[str, Any]) -> dict[str, Any]:
    """Without what :func:`write` adds."""
    return {name: value for name, value in metadata.items() if name not in (_SPECIAL, _ARRAYS, _ALL)}


def _checksum(metadata: dict[str, Any]) -> int:
    rest = {name: value for name, value in metadata.items() if name != _ALL}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _damaged(source: Path, kind: str, error: Exception) -> str:
    first_line = (str(error) or "no message").splitlines()[0]
    return (
        f"path: {source} is not a complete checkpoint of a {kind} ({type(error).__name__}: {first_line}); "
        "restore another copy, or save it again"
    )


def _check_fit(saved: dict[str, checkpoint_leaves.Note], wanted: dict[str, Any], what: str) -> None:
    """Checks that every leaf that was saved can come in place of one that is wanted, and that none is missing."""
    got = {name: (tuple(note["shape"]), note["dtype"]) for name, note in saved.items()}
    expected = {name: checkpoint_leaves.expected(saved.get(name), leaf) for name, leaf in wanted.items()}
    both = expected.keys() & got.keys()
    wrong = sorted(expected.keys() ^ got.keys())
    wrong = sorted([*wrong, *(name for name in both if not checkpoint_leaves.fits(saved[name], wanted[name]))])
    if wrong:
        name, of = wrong[0], len(expected.keys() | got.keys())
        raise ValueError(
            f"path: {what} does not fit: {name} is {_text(got.get(name))} there, expected "
            f"{_text(expected.get(name))} ({len(wrong)} of {of} arrays differ); restore it with the "
            "configuration it was saved with, frozen layers included"
        )
    for name, leaf in wanted.items():
        if checkpoint_leaves.needs_x64(saved[name], leaf):
            raise ValueError(
                f"path: {what} has {_text(got[name])} for {name}, which would lose half of its bits on a device; "
                "restore it under jax.enable_x64(True), or in place of an array of NumPy"
            )


def _text(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return "missing" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def leaves_by_name(tree: PyTree, argument: str) -> dict[str, Any]:
    """What can be saved, by name; raises ``TypeError`` if a leaf cannot."""
    leaves = {keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for name, leaf in leaves.items():
        if not checkpoint_leaves.can_be_saved(leaf):
            raise TypeError(
                f"{argument}: {name} is {type(leaf).__name__}{_of(leaf)}, expected an array or a number; make it a "
                "NumPy array of numbers, or keep it out of what is saved"
            )
    return leaves


def _of(leaf: Any) -> str:
    return f" of {leaf.dtype}" if hasattr(leaf, "dtype") else ""
