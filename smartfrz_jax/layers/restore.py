"""A part of a checkpoint, such as a backbone without its head: what selectors name, into the leaves of a pytree."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from smartfrz_jax.layers.layers import Layer, Layers
from smartfrz_jax.layers.select import Selectors, as_selectors, select
from smartfrz_jax.pytrees import checkpoint, checks, paths
from smartfrz_jax.pytrees.file_paths import PathLike
from smartfrz_jax.pytrees.types import PyTree

# Where what is restored may be in a run: the places of the doors, and that of a pytree saved as it is.
_ROOTS = ("run/model/", "run/params/", "run/state/params/", "run/state/", "run/")


class Restored(NamedTuple):
    """What came of restoring a part of a checkpoint, by names of leaves.

    Attributes:
        names: What was restored.
        not_found: What was selected, but is not in the checkpoint: it is as it was.
        left: What the checkpoint has beside it, of the same pytree.
    """

    names: tuple[str, ...]
    not_found: tuple[str, ...]
    left: tuple[str, ...]


def restore(path: PathLike, tree: PyTree, selectors: Selectors, kind: str, *, strict: bool) -> tuple[PyTree, Restored]:
    """Reads the leaves that are selected, and no others; random keys are neither looked at nor restored.

    The pytree is looked for where the front doors save parameters, and among what was saved as it is.

    Args:
        path: Directory of the checkpoint.
        tree: Pytree of arrays.
        selectors: As of :func:`smartfrz_jax.layers.select.select`, of names of leaves in place of layers.
        kind: What it should be a checkpoint of, for the error.
        strict: Whether all that is selected must be in the checkpoint, and all of it that is selected in ``tree``.

    Returns:
        The pytree with what was saved in place of what was selected, and what came of it.

    Raises:
        FileNotFoundError: If there is no such directory.
        TypeError: If ``selectors`` select no names, or a leaf is no array.
        ValueError: If the checkpoint is damaged, nothing is found, or what is found is of another shape or dtype.
    """
    checks.flag(strict, "strict")
    wanted = as_selectors(selectors, "select")
    checkpoint.leaves_by_name(tree, "params")
    leaves = {name: leaf for name, leaf in paths.flatten(tree).items() if not _is_key(leaf)}
    there = _of_same_tree(checkpoint.notes(path, kind), leaves)
    chosen = _chosen(wanted, dict.fromkeys([*leaves, *there]))
    found = [name for name in leaves if name in there and name in chosen]
    result = Restored(
        names=tuple(found),
        not_found=tuple(name for name in leaves if name in chosen and name not in there),
        left=tuple(name for name in there if name not in found),
    )
    only_there = [name for name in result.left if name in chosen]
    if (strict and (result.not_found or only_there)) or not found:
        raise ValueError(
            f"select: of the {len(chosen)} names that it selects, the checkpoint in {path} lacks "
            f"{_some(result.not_found)}, and params lack {_some(only_there)}; {len(found)} are in both. Select only "
            "these, make params as for the saved run, or pass strict=False, which leaves the others as they are"
        )
    arrays = checkpoint.read_leaves(path, {there[name]: leaves[name] for name in found}, kind)
    new = paths.tree_map(lambda name, leaf: arrays[there[name]] if name in result.names else leaf, tree)
    return new, result


def _of_same_tree(saved: Mapping[str, Mapping[str, Any]], leaves: Iterable[str]) -> dict[str, str]:
    """Names in the checkpoint, as ``jax.tree_util.keystr`` writes them, by the names they have in the pytree."""
    streams = {
        paths.of_keystr(key).rpartition("/")[0] for key, note in saved.items() if note["dtype"].startswith("key<")
    }
    names = {paths.of_keystr(key): key for key in saved}
    root = max(_ROOTS, key=lambda root: sum(root + leaf in names for leaf in leaves))
    random = {f"{stream}/{part}" for stream in streams for part in ("key", "count")}
    return {name.removeprefix(root): key for name, key in names.items() if name.startswith(root) and name not in random}


def _chosen(selectors: Iterable[Any], names: Iterable[str]) -> set[str]:
    known = Layers(tuple(Layer(name, (name,), (name,)) for name in names))
    chosen: set[str] = set()
    for each in selectors:
        try:
            chosen.update(select(known, each, "select"))
        except ValueError as error:
            near = difflib.get_close_matches(each, known.names, n=3, cutoff=0.4) if isinstance(each, str) else []
            raise ValueError(
                f"select: got {each!r}, which selects none of the {len(known)} arrays of params and of the checkpoint, "
                f"expected names such as {_some(near or known.names)}, or globs such as 'encoder/*'"
            ) from error
    return chosen


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _some(names: Iterable[str]) -> str:
    names = [*names]
    return (", ".join(map(repr, names[:3])) or "nothing") + (f" and {len(names) - 3} more" if len(names) > 3 else "")
