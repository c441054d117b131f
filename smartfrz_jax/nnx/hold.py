"""Frozen layers of an NNX model as they are to run: in evaluation mode, with variables that nothing changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from flax import nnx

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.pytrees import paths

# Variables that a call may write whatever is frozen: they say nothing of what a layer computes.
_PASSING = (nnx.RngState, nnx.Cache, nnx.Intermediate)


@contextlib.contextmanager
def hold(model: nnx.Module, frozen: Frozen) -> Iterator[None]:
    """Within it, modules that belong to frozen layers run in evaluation mode; afterwards all is as it was before.

    A module that belongs to several layers is left alone until all of them are frozen, and so is one of which no
    variable belongs to a layer: a dropout without a random stream of its own. Variables of frozen layers, parameters
    and others, end with the values that they began with, whatever module has written them. Random streams, caches and
    intermediates go on.

    Tells modules that want to know (by an attribute ``frozen_params``) which of their parameters are frozen.

    Raises:
        ValueError: If a BatchNorm of a frozen layer is called with ``use_running_average=False``.
    """
    variables = _variables(model)
    layers_of = _layers_of(variables, frozen.layers)
    values = {
        name: (variable, variable.get_raw_value())
        for name, variable in variables.items()
        if layers_of.get(id(variable), frozenset()) & frozen.names and not isinstance(variable, _PASSING)
    }
    modes: list[tuple[nnx.Module, str, Any, Any]] = []
    statistics: set[int] = set()
    for path, module in nnx.iter_modules(model, graph=True):
        for name, value in _mode(module, path, layers_of, frozen).items():
            modes.append((module, name, getattr(module, name), value))
            setattr(module, name, value)
            if isinstance(module, nnx.BatchNorm):
                statistics.update(id(value) for value in vars(module).values() if isinstance(value, nnx.BatchStat))
    try:
        yield
        for name, (variable, value) in values.items():
            if id(variable) in statistics and variable.get_raw_value() is not value:
                raise ValueError(
                    f"loss_fn: calls the BatchNorm of {name!r} with use_running_average=False, so its statistics would "
                    "go on changing although its layer is frozen; set the mode with model.train() and model.eval() "
                    "instead"
                )
    finally:
        for module, name, before, value in modes:
            if getattr(module, name) is value:  # else the loss has set it
                setattr(module, name, before)
        for variable, value in values.values():
            if variable.get_raw_value() is not value:
                variable.set_raw_value(value)


def _variables(module: nnx.Module) -> dict[str, nnx.Variable[Any]]:
    """Variables by name; not copies."""
    flat = nnx.to_flat_state(nnx.state(module, graph=True))
    return {paths.SEPARATOR.join(map(str, path)): leaf for path, leaf in flat if isinstance(leaf, nnx.Variable)}


def _layers_of(variables: dict[str, nnx.Variable[Any]], layers: Layers) -> dict[int, frozenset[str]]:
    """Names of the layers that a variable belongs to, by the variable's id."""
    found: dict[int, frozenset[str]] = {}
    for layer in layers:
        for name in (*layer.params, *layer.state):
            while name and name not in variables:  # a leaf of a variable that is a pytree
                name = name.rpartition(paths.SEPARATOR)[0]
            if name:
                variable = variables[name]
                found[id(variable)] = found.get(id(variable), frozenset()) | {layer.name}
    return found


def _mode(
    module: nnx.Module, path: tuple[Any, ...], layers_of: dict[int, frozenset[str]], frozen: Frozen
) -> dict[str, Any]:
    """Attributes with which a module runs as it does when its layers are frozen."""
    mode: dict[str, Any] = {}
    if hasattr(module, "frozen_params"):
        prefix = paths.SEPARATOR.join((*map(str, path), ""))
        mode["frozen_params"] = frozenset(n.removeprefix(prefix) for n in frozen.params if n.startswith(prefix))
    if not frozen.names:
        return mode
    inside = frozenset[str]().union(*(layers_of.get(id(v), ()) for v in _variables(module).values()))
    if inside and inside <= frozen.names:
        # As nnx.Module.eval does; and the rates, for an argument of a call beats an attribute.
        mode |= {name: True for name in ("deterministic", "use_running_average") if hasattr(module, name)}
        if isinstance(module, nnx.Dropout):
            mode["rate"] = 0.0
        elif isinstance(module, nnx.MultiHeadAttention):
            mode["dropout_rate"] = 0.0
    return mode
