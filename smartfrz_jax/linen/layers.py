"""Layers of a Linen module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from smartfrz_jax.layers.find import Granularity
from smartfrz_jax.layers.find import find_layers as find_layers_of_params
from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree


def find_layers(
    module: nn.Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    granularity: Granularity = "layer",
    rows: bool = False,
    lookups: bool = False,
    rngs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Layers:
    """Layers of a Linen module, in forward order; see :func:`smartfrz_jax.find_layers`.

    Args:
        module: The module.
        variables: Its variables, as ``module.init`` gives them; ``{"params": params}`` if it has no other.
        *inputs: An example batch; arrays or ``jax.ShapeDtypeStruct``.
        granularity: ``"layer"``, ``"block"`` or a function from a parameter's name to its layer's name.
        rows: Whether the blocks of an ``nn.scan`` are layers of their own; see :func:`smartfrz_jax.find_layers`.
        lookups: Whether lookups in a table that is the head too are a layer of their own; see there.
        rngs: Random keys for the streams that the module draws from, as for ``apply``, such as ``{"noise": key}``;
            Flax raises an ``InvalidRngError`` where one is missing. There is one for ``"dropout"``.
        **kwargs: Further arguments of the module's ``__call__``, such as ``train=False``. The module is only traced.

    Returns:
        The layers of ``variables["params"]``, front to back. If there are values that are overwritten by their
        gradients (of operations in fp8), the layers are those of ``{"params": ..., "_overwrite_with_gradient": ...}``,
        for that is what ``TrainState`` takes as ``params`` then.

    Raises:
        ValueError: If ``variables`` has no ``"params"``, these are empty, or ``granularity`` is unknown.

    Example:
        >>> module, x = nn.Dense(3), jax.numpy.ones((1, 2))
        >>> find_layers(module, module.init(jax.random.key(0), x), x).names
        ('kernel',)
    """
    checks.instance(module, nn.Module, "module", "a flax.linen.Module")
    checks.by_name(variables, "variables", "what module.init returned, or {'params': params}")
    if rngs is not None:
        checks.by_name(rngs, "rngs", "a dict from streams to random keys")
    if not inputs and not kwargs:
        raise ValueError("inputs: got none, expected an example batch, for the forward order is traced")
    if "params" not in variables:
        raise ValueError(
            f"variables: got the keys {', '.join(map(repr, variables))}, expected 'params' among them; pass what "
            "module.init returned, or {'params': params}"
        )
    trained = {name: variables[name] for name in ("params", OVERWRITE_WITH_GRADIENT) if name in variables}
    others = {name: collection for name, collection in variables.items() if name not in trained}
    are_both = len(trained) > 1

    def forward(params: PyTree, *inputs: Any) -> Any:
        streams = {"dropout": jax.random.key(0), **(rngs or {})}
        given = params if are_both else {"params": params}
        return module.apply({**given, **others}, *inputs, rngs=streams, mutable=list(others), **kwargs)

    params = trained if are_both else variables["params"]
    return find_layers_of_params(params, forward, *inputs, granularity=granularity, rows=rows, lookups=lookups)
