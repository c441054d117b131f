"""Whether the state of an optimizer fits what the optimizer makes for a frozen set."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path


def mismatch(old: dict[str, Any], wanted: dict[str, Any], *, dropped: list[str], absent: list[str]) -> str | None:
    """Path at which the two differ, beside the leaves of layers that return (``dropped``) or freeze (``absent``)."""
    for path in [*wanted, *(path for path in old if path not in wanted)]:
        masked = dropped if path not in old else absent if path not in wanted else ()
        if not fits(old.get(path), wanted.get(path)) and not any(path.startswith(prefix) for prefix in masked):
            return path
    return None


def fits(got: Any, expected: Any) -> bool:
    """Whether a value can take the place of another: of the same shape and type, but for the precision of floats.

    Updates make it higher where gradients or hyperparameters are more precise than parameters. That of a scalar depends
    on which parameters are active, or is the user's.
    """
    if got is None or expected is None:
        return got is expected
    own, other = jnp.result_type(got), jnp.result_type(expected)
    if np.shape(got) != np.shape(expected):
        return False
    if not (jnp.issubdtype(own, jnp.floating) and jnp.issubdtype(other, jnp.floating)):
        return own == other
    return np.shape(got) == () or jnp.promote_types(own, other) == own


def masked(tree: Any) -> list[str]:
    """Paths at which a transformation has dropped the state of a parameter."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return [keystr(path) for path, node in tree_leaves_with_path(tree, is_leaf=is_masked) if is_masked(node)]


def text(leaf: Any) -> str:
    """A value for a message."""
    return "missing" if leaf is None else f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
