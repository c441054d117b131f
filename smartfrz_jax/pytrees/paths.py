"""Names of the leaves of a parameter pytree: one string per leaf, such as ``blocks/0/conv1/kernel``."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import GetAttrKey, KeyPath, keystr

from smartfrz_jax.pytrees.types import PyTree

SEPARATOR = "/"

_KEY = re.compile(r"""\[('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\]|\[(?:<flat index )?([^\]>]*)>?\]|\.(\w+)""")


def name(path: KeyPath) -> str:
    """Name of a leaf, from its key path.

    The ``value`` that a Flax NNX ``Variable`` adds below its own name is left out, so that an ``nnx.State`` and the
    plain arrays inside it have the same names; not where it is all of the name.
    """
    if len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return keystr(path, simple=True, separator=SEPARATOR)


def of_keystr(text: str) -> str:
    """Name of a leaf, from its key path as ``jax.tree_util.keystr`` writes it.

    Example:
        >>> of_keystr(".params['blocks'][0]['kernel']")
        'params/blocks/0/kernel'
    """
    parts = [quoted or number or attribute for quoted, number, attribute in _KEY.findall(text)]
    return SEPARATOR.join(str(ast.literal_eval(part)) if part[:1] in "'\"" else part for part in parts)


def flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves of ``tree`` by name, in the pytree's own order.

    Raises:
        ValueError: If two leaves have the same name.

    Example:
        >>> list(flatten({"dense": {"kernel": 1, "bias": 2}}))
        ['dense/bias', 'dense/kernel']
    """
    named = [(name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    leaves = dict(named)
    if len(leaves) != len(named):
        twice = next(leaf_name for i, (leaf_name, _) in enumerate(named) if leaf_name in dict(named[:i]))
        raise ValueError(
            f"tree: two leaves are called {twice!r}, expected a name for each; "
            f"rename the one with {SEPARATOR!r} inside a key"
        )
    return leaves


def tree_map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """``jax.tree.map`` with the leaf's name as the first argument of ``fn``."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(name(path), *leaves), tree, *rest)
