"""Arrays brought to the host, also where several processes train one network and each holds parts of them."""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer
from jax.experimental import multihost_utils

from smartfrz_jax.pytrees.types import PyTree


def fetch(tree: PyTree) -> PyTree:
    """The arrays of a pytree as NumPy arrays, whole on every process.

    In contrast to ``jax.device_get`` it also takes arrays of which other processes hold parts. All processes must call
    it then, in the same order.

    Args:
        tree: Pytree of arrays.

    Returns:
        The same with NumPy arrays.

    Example:
        >>> fetch({"kernel": jax.numpy.ones(2)})
        {'kernel': array([1., 1.], dtype=float32)}
    """
    return jax.device_get(jax.tree.map(_whole, tree))


def own(array: jax.Array) -> jax.Array:
    """This process's copy of an array that all processes hold whole, without waiting for it; else the array itself.

    Args:
        array: Such as the loss of a step on a mesh.
    """
    if isinstance(array, Tracer) or array.is_fully_addressable or not array.is_fully_replicated:
        return array
    return array.addressable_data(0)


def _whole(leaf: Any) -> Any:
    scattered = isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    return multihost_utils.process_allgather(leaf, tiled=True) if scattered else leaf
