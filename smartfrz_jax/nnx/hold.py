"""Frozen layers of an NNX model as they are to run: in evaluation mode, with variables that nothing changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from flax import nnx

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.nnx.parts.hold_rows import PASSING, Owners, evaluation, goes_on, hold_rows
from smartfrz_jax.pytrees import paths


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
        if any(map(frozen.names.issuperset, layers_of.get(id(variable), ()))) and not isinstance(variable, PASSING)
    }
    modes: list[tuple[nnx.Module, str, Any, Any]] = []
    statistics: set[int] = set()
    by_row: dict[int, tuple[nnx.Module, tuple[bool, ...]]] = {}
    for path, module in nnx.iter_modules(model, graph=True):
        held = _held(module, layers_of, frozen) if frozen.names else False
        if isinstance(held, tuple) and evaluation(module):
            by_row[id(module)] = module, held
        for name, value in _mode(module, path, frozen, is_held=held is True).items():
            modes.append((module, name, getattr(module, name), value))
            setattr(module, name, value)
            if isinstance(module, nnx.BatchNorm):
                statistics.update(id(value) for value in vars(module).values() if isinstance(value, nnx.BatchStat))
    try:
        with hold_rows(by_row, variables, frozen):
            yield
        for name, (variable, value) in values.items():
            if id(variable) in statistics and variable.get_raw_value() is not value:
                raise goes_on(repr(name))
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


def _layers_of(variables: dict[str, nnx.Variable[Any]], layers: Layers) -> dict[int, Owners]:
    """The layers that a variable belongs to, by the variable's id."""
    found: dict[int, Owners] = {}
    for layer in layers:
        for param in (*layer.params, *layer.state):
            name = layers.array_of.get(param, param)
            owners = layers.stacks[name].layers if name in layers.stacks else (layer.name,)
            while name and name not in variables:  # a leaf of a variable that is a pytree
                name = name.rpartition(paths.SEPARATOR)[0]
            if name:
                variable = variables[name]
                found[id(variable)] = found.get(id(variable), frozenset()) | {owners}
    return found


def _held(module: nnx.Module, layers_of: dict[int, Owners], frozen: Frozen) -> bool | tuple[bool, ...]:
    """Whether all layers are frozen that have variables in a module; or in which rows of a stack."""
    inside = frozenset[tuple[str, ...]]().union(*(layers_of.get(id(v), ()) for v in _variables(module).values()))
    return bool(inside) and frozen.held(inside)


def _mode(module: nnx.Module, path: tuple[Any, ...], frozen: Frozen, *, is_held: bool) -> dict[str, Any]:
    """Attributes with which a module runs as it does when its layers are frozen."""
    mode: dict[str, Any] = {}
    if hasattr(module, "frozen_params"):
        prefix = paths.SEPARATOR.join((*map(str, path), ""))
        mode["frozen_params"] = frozenset(n.removeprefix(prefix) for n in frozen.params if n.startswith(prefix))
    return mode | evaluation(module) if is_held else mode
