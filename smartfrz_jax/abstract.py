"""Shapes in place of arrays, with the devices that the arrays lie on: what a step is compiled for."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from smartfrz_jax import paths

PyTree = Any


def of(arg: Any) -> Any:
    """An argument of a step with ``jax.ShapeDtypeStruct`` in place of its arrays: a module, or a pytree."""
    if isinstance(arg, nnx.Module | nnx.Optimizer):
        graphdef, state = nnx.split(arg)
        return nnx.merge(graphdef, jax.tree.map(_shape, state))
    return jax.tree.map(_shape, arg)


def _shape(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        weak_type = getattr(leaf, "weak_type", False)  # random keys have none
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding, weak_type=weak_type)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, np.ndarray) else leaf


def placed(shapes: PyTree, before: PyTree, params: PyTree) -> PyTree:
    """Shapes with the devices of the arrays that they will be.

    Args:
        shapes: Pytree of ``jax.ShapeDtypeStruct``, such as a state of an optimizer.
        before: Pytree of arrays; those of the same name stay where they are.
        params: The parameters; what is new lies where the parameter does that its name ends with.
    """
    known, parameters = paths.flatten(before), paths.flatten(params)

    def place(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        like = known.get(name)
        if like is None:
            like = next((leaf for param, leaf in parameters.items() if name.endswith(param)), None)
        # State that is not shaped like its parameter, such as Adafactor's rows and columns, starts anywhere.
        sharding = getattr(like, "sharding", None) if like is not None and like.shape == leaf.shape else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)

    return paths.tree_map(place, shapes)
