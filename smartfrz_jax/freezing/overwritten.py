"""Values among the parameters that are overwritten by their gradients, as Flax's operations in fp8 have them.

They come beside the parameters proper, as ``{"params": ..., "_overwrite_with_gradient": ...}``: scales and histories of
maxima whose "gradient" is their next value. No optimizer sees them. NNX has no such operations.
"""

from __future__ import annotations

from collections.abc import Collection

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.layers.layers import Layer, Layers
from smartfrz_jax.layers.lookups import Lookup
from smartfrz_jax.layers.overwritten import PARAMS, is_overwritten
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree


def are_in(params: PyTree) -> bool:
    """Whether there are such values among the parameters."""
    return hasattr(params, "keys") and OVERWRITE_WITH_GRADIENT in params


def optimized(params: PyTree) -> PyTree:
    """The part of the parameters, or of their gradients, that the optimizer sees."""
    return params[PARAMS] if are_in(params) else params


def optimized_frozen(frozen: Frozen) -> Frozen:
    """A frozen set for that part, with the names of the parameters as they are there."""
    prefix = PARAMS + paths.SEPARATOR
    if not any(map(is_overwritten, frozen.layers.owner)):
        return frozen

    def inside(names: Collection[str]) -> tuple[str, ...]:
        return tuple(name.removeprefix(prefix) for name in names if name.startswith(prefix))

    def of_layer(layer: Layer) -> Layer:
        rows = tuple(row._replace(array=name) for row in layer.rows for name in inside([row.array]))
        lookups = tuple(Lookup(name) for lookup in layer.lookups for name in inside([lookup.array]))
        return Layer(layer.name, inside(layer.params), inside(layer.kernels), layer.state, rows, lookups)

    layers = map(of_layer, frozen.layers)
    return Frozen(Layers(tuple(layers)), frozen.names)


def overwrite(params: PyTree, optimized: PyTree, grads: PyTree, frozen: Frozen) -> PyTree:
    """Parameters after a step: the new ``optimized`` ones, and the gradients of the others; frozen ones as they are."""
    if not are_in(params):
        return optimized
    new = paths.tree_map(lambda name, old, grad: old if name in frozen.params else grad, params, grads)
    return {PARAMS: optimized, OVERWRITE_WITH_GRADIENT: new[OVERWRITE_WITH_GRADIENT]}
