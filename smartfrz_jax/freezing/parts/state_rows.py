"""Which of an optimizer's state is of stacked parameters: row by row, or of all rows together.

Asked of the optimizer, by the shapes of what it makes for other parameters.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.freezing.transform import partition
from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree

# What optax has in place of state that an array has none of, as Adafactor of what it does not factor.
_NOTHING = (1,)
_Leaves: TypeAlias = dict[str, jax.ShapeDtypeStruct]


def axes(tx: optax.GradientTransformation, params: PyTree, layers: Layers) -> dict[str, tuple[int, str]]:
    """Along which axis an array of an optimizer's state has rows, and of which stacked parameter, by path.

    Args:
        tx: The optax transformation.
        params: The parameters.
        layers: Their layers.
    """
    more = {name: at for at, name in enumerate(sorted(layers.stacks), 1)}

    def longer(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        shape = list(np.shape(leaf))
        if name in more:
            shape[layers.stacks[name].axis] += more[name]
        return jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(leaf))

    nothing = Frozen(layers)
    own, other = (_state(tx, nothing, of) for of in (params, paths.tree_map(longer, params)))
    names = {at: name for name, at in more.items()}
    found = {}
    for path, leaf in own.items():
        shape, after = leaf.shape, other[path].shape if path in other else ()
        longer_by = [b - a for a, b in zip(shape, after, strict=False)]
        grown = [axis for axis, by in enumerate(longer_by) if by]
        name = names.get(longer_by[grown[0]]) if len(grown) == 1 and len(after) == len(shape) else None
        if name is not None and shape[grown[0]] == len(layers.stacks[name].layers):
            found[path] = grown[0], name
    return found


def together(tx: optax.GradientTransformation, params: PyTree, layers: Layers) -> dict[str, str]:
    """Paths of what an optimizer holds of all rows of a stacked parameter together, with the name of that.

    Flags are left out: they tell of the last update, as those of ``optax.zero_nans``.

    Args:
        tx: The optax transformation.
        params: The parameters.
        layers: Their layers.
    """
    of_rows, found = axes(tx, params, layers), {}
    keys = {keystr(path): paths.name(path) for path, _ in tree_leaves_with_path(params)}
    for path, leaf in _state(tx, Frozen(layers), params).items():
        # Optax holds what is of a parameter under its path; the longest, as ['w'] is in ['head']['w'], too.
        name = keys.get(max((key for key in keys if key in path), key=len, default=""))
        if name in layers.stacks and path not in of_rows and leaf.shape != _NOTHING and leaf.dtype != jnp.bool_:
            found[path] = name
    return found


def _state(tx: optax.GradientTransformation, frozen: Frozen, params: PyTree) -> _Leaves:
    state = jax.eval_shape(partition(tx, frozen).init, params)
    return {keystr(path): leaf for path, leaf in tree_leaves_with_path(state)}
