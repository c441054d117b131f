"""A whole train step, traced: the loss, its gradients for the active layers, and the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from smartfrz_jax.cost.equations import Trace
from smartfrz_jax.freezing import transform
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.freezing.parts.stop_gradient import stop_parts
from smartfrz_jax.jaxprs import flops, inline, named_axes
from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.layers.lookups import Lookup
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree


def trace(
    loss_fn: Callable[..., Any],
    frozen: Frozen,
    variables: PyTree,
    params: PyTree,
    inputs: tuple[Any, ...],
    tx: optax.GradientTransformation | None,
) -> Any:
    """A whole step, as a ``ClosedJaxpr``.

    Args:
        loss_fn: A function of ``(variables, *inputs)`` to a tree whose first leaf is the loss.
        frozen: The frozen set; ``loss_fn`` already runs as it does then.
        variables: The parameters, and maybe other variables.
        params: The parameters as the optimizer sees them.
        inputs: The batch.
        tx: The optimizer; without it, the gradients are results.
    """
    params_of_layers = (name for name in paths.flatten(variables) if name in frozen.layers.arrays)
    active = {name for name in params_of_layers if not frozen.is_frozen(name)}

    def loss(active: PyTree, variables: PyTree, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        active = frozen.stop_gradient(active)
        whole = paths.tree_map(lambda name, leaf: active.get(name, leaf), variables)
        out = stop_parts(loss_fn, frozen)(whole, *inputs)
        return jax.tree.leaves(out)[0], out

    def step(variables: PyTree, params: PyTree, opt_state: Any, inputs: tuple[Any, ...]) -> Any:
        values = {name: leaf for name, leaf in paths.flatten(variables).items() if name in active}
        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(values, variables, inputs)
        if tx is None:
            return out, grads
        zeros = paths.tree_map(lambda name, leaf: grads.get(name, leaf), params)
        updates, opt_state = transform.freeze(tx, frozen).update(zeros, opt_state, params)
        return out, transform.apply_updates(params, updates, frozen), opt_state

    opt_state = None if tx is None else jax.eval_shape(transform.freeze(tx, frozen).init, params)
    return named_axes.make_jaxpr(step)(variables, params, opt_state, inputs)


def of_parts(trace: Trace, layers: Layers) -> Trace:
    """A loss of rows, and of what lookups read, as variables of their own; the loss itself if none are layers."""
    if not layers.array_of:
        return trace
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trace.variables)
    return Trace(layers.of_unstacked(trace.loss_fn, like), layers.unstacked(like), trace.inputs)


def update_flops(tx: optax.GradientTransformation, layers: Layers, layer: str, params: PyTree, backend: str) -> float:
    """FLOPs of the optimizer for the parameters of one layer; what lookups read is none, but for the table's layer.

    Raises:
        ValueError: If it cannot do with gradients and parameters.
    """
    # As a partition of optax's shows the optimizer the layers that it is for.
    looked_up = {Lookup(table).name for table in layers.lookups}

    def of_layer(name: str, leaf: Any) -> Any:
        return leaf if layers.holding(name) == layer and name not in looked_up else optax.MaskedNode()

    shown = paths.tree_map(of_layer, layers.unstacked(params))
    if not jax.tree.leaves(shown):
        return 0.0

    def update(params: PyTree, grads: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree]:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    try:
        closed = jax.make_jaxpr(update)(shown, shown, jax.eval_shape(tx.init, shown))
    except TypeError as error:
        raise ValueError(
            f"tx: cannot be priced, as it asks for more than gradients and parameters ({error}); leave tx out, and "
            "updates are not counted"
        ) from error
    flat = inline.inline(closed, (), ()).jaxpr
    return sum(flops.of_equation(eqn, backend).needed for eqn in inline.needed(flat, flat.outvars))
