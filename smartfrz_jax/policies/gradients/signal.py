"""The gradients that a loop shows a policy, by parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.policies.base import require
from smartfrz_jax.pytrees import checks, hosts


def gradients(signals: dict[str, Any], policy: str) -> Mapping[str, Any]:
    """The signal ``grads``.

    Args:
        signals: What the loop passed to ``update``.
        policy: Name of the policy, for the error.

    Raises:
        TypeError: If it is no mapping.
        ValueError: If the loop did not provide it.
    """
    grads = require(signals, "grads", policy, "pass the gradients of the active layers by parameter name")
    checks.by_name(grads, "grads", "a dict from parameter names to gradients, such as Frozen.active_leaves(grads)")
    return grads


def loss(signals: Mapping[str, Any], grads: Mapping[str, Any]) -> jax.Array | None:
    """The signal ``loss``, to be looked at beside the gradients; ``None`` if the loop shows none.

    Where it is not finite, the step was skipped, and the gradients may be those of an earlier one. Nothing is waited
    for, unless the loss lies on other devices than the gradients.

    Args:
        signals: What the loop passed to ``update``.
        grads: The gradients.
    """
    value = signals.get("loss")
    if value is None or isinstance(value, Tracer):
        return value
    if isinstance(value, jax.Array):
        at = next((each.devices() for each in grads.values() if isinstance(each, jax.Array) and each.committed), None)
        if not value.committed or at is None or value.devices() == at:
            return value
        value = hosts.fetch(value)
    return jax.device_put(np.float32(0 if np.isfinite(value) else np.nan))


def check_kernels(grads: Mapping[str, Any], layers: Layers) -> None:
    """Raises ``ValueError`` if no gradient is of a layer's kernel."""
    if not any(kernel in grads for layer in layers for kernel in layer.kernels):
        raise unknown(grads, "a layer's kernel")


def unknown(grads: Mapping[str, Any], expected: str) -> ValueError:
    """The error that no gradient is of what is expected."""
    return ValueError(
        f"grads: none of the {len(grads)} gradients is of {expected}; pass a dict from parameter names to gradients, "
        "such as Frozen.active_leaves(grads)"
    )


def check_shape(grads: Mapping[str, Any], name: str, like: Any) -> None:
    """Raises ``ValueError`` if a gradient has another shape than ``like``, which has that of its parameter."""
    if np.shape(grads[name]) != np.shape(like):
        raise ValueError(
            f"grads: {name!r} has shape {np.shape(grads[name])}, expected that of the parameter, {np.shape(like)}; "
            "pass the gradients of this network"
        )
