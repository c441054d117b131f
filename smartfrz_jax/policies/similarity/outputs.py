"""What policies that compare layers' outputs have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.policies.base import names_of, require
from smartfrz_jax.predictor.cka import layer_similarity
from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Shaped

    Outputs = Mapping[str, Shaped[Array, "examples ..."]]


def features_of(signals: dict[str, Any], policy: str) -> Callable[[], Outputs]:
    """The function that computes every layer's output, which the loop passes.

    Raises:
        TypeError: If it is no function.
        ValueError: If there is none.
    """
    way_out = "pass a function that computes the layers' outputs on the probe batch"
    features = require(signals, "features", policy, way_out)
    checks.function(features, "features", "a function without arguments that computes the layers' outputs")
    return features


def of_layers(outputs: Outputs, names: Iterable[str], argument: str) -> dict[str, Any]:
    """The outputs of some layers.

    Raises:
        TypeError: If they are no mapping.
        ValueError: If a layer's are missing.
    """
    checks.by_name(outputs, argument, "a dict from layer names to outputs")
    missing = sorted(name for name in names if name not in outputs)
    if missing:
        raise ValueError(
            f"{argument}: lacks the output of {len(missing)} layer(s), such as {missing[0]!r}; pass that of every "
            "layer which may freeze, by layer name"
        )
    return {name: outputs[name] for name in names}


def cka_of(
    layers: Layers, features: Outputs, reference: Outputs, may_freeze: Bool[Any, " layers"]
) -> Float[jax.Array, " judged"]:
    """Of every layer that may freeze, frozen or not: for each set of layers there would be a program to compile."""
    names = [name for name in layers.names if name in names_of(layers, may_freeze)]
    return layer_similarity(of_layers(features, names, "features"), of_layers(reference, names, "reference"))
