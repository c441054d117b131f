"""Evaluation mode for the modules of frozen layers alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from smartfrz_jax import paths
from smartfrz_jax.freezing import Frozen


def hold(model: nnx.Module, frozen: Frozen) -> Iterator[tuple[str, nnx.Variable, Any]]:
    """Puts what belongs to frozen layers into evaluation mode; yields their BatchNorm statistics as they are now.

    A module that belongs to several layers is left alone until all of them are frozen, and so is one of which no
    variable belongs to a layer: a dropout without a random stream of its own.

    Tells modules that want to know (by an attribute ``frozen_params``) which of their parameters are frozen.
    """
    held_by = [(name, layer.name) for layer in frozen.layers for name in (*layer.params, *layer.state)]
    for path, module in nnx.iter_modules(model):
        prefix = paths.SEPARATOR.join((*map(str, path), ""))
        inside = {layer for name, layer in held_by if name.startswith(prefix)}
        if hasattr(module, "frozen_params"):
            own = frozenset(name.removeprefix(prefix) for name in frozen.params if name.startswith(prefix))
            module.frozen_params = own  # pyright: ignore[reportAttributeAccessIssue]
        if not inside or not inside <= frozen.names:
            continue
        if isinstance(module, nnx.BatchNorm):
            module.use_running_average = True
            for key, value in vars(module).items():
                if isinstance(value, nnx.BatchStat):
                    yield prefix + key, value, value.get_value()
        elif isinstance(module, nnx.Dropout):
            module.deterministic, module.rate = True, 0.0  # the rate, because a call's argument beats the attribute
        elif isinstance(module, nnx.MultiHeadAttention):
            module.deterministic, module.dropout_rate = True, 0.0


def check_held(statistics: list[tuple[str, nnx.Variable, Any]]) -> None:
    """Raises if the loss changed BatchNorm statistics that :func:`hold` has yielded."""
    for name, variable, value in statistics:
        if variable.get_value() is not value:
            raise ValueError(
                f"loss_fn: calls the BatchNorm of {name!r} with use_running_average=False, so its statistics would go "
                "on changing although its layer is frozen; set the mode with model.train() and model.eval() instead"
            )
