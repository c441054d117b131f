"""Modules of blocks that a scan runs, of which some rows are frozen: in evaluation mode in these alone."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

from flax import nnx

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.jaxprs import row_flags
from smartfrz_jax.pytrees import rows

# The layers that a variable belongs to: each alone, or, of a stacked variable, those of all of its rows.
Owners: TypeAlias = frozenset[tuple[str, ...]]

# Variables that a call may write whatever is frozen: they say nothing of what a layer computes.
PASSING = (nnx.RngState, nnx.Cache, nnx.Intermediate)


@contextlib.contextmanager
def hold_rows(
    held: Mapping[int, tuple[nnx.Module, tuple[bool, ...]]],
    variables: Mapping[str, nnx.Variable[Any]],
    frozen: Frozen,
) -> Iterator[None]:
    """Within it, modules compute otherwise in frozen rows; afterwards variables have their old values there.

    Args:
        held: The modules, and in which rows each is frozen, by id.
        variables: The variables of the model, by name.
        frozen: The frozen set.
    """
    values = {
        name: (variable, variable.get_raw_value())
        for name, variable in variables.items()
        if name in frozen.rows and not isinstance(variable, PASSING)
    }
    classes = [(module, type(module)) for module, _ in held.values()]
    for module, frozen_rows in held.values():
        object.__setattr__(module, "__class__", _class_of(type(module), tuple(evaluation(module).items()), frozen_rows))
    try:
        yield
    finally:
        for module, kind in classes:
            object.__setattr__(module, "__class__", kind)
        for name, (variable, value) in values.items():
            if variable.get_raw_value() is not value:
                stack = frozen.layers.stacks[name]
                still = [row for row in range(len(stack.layers)) if row not in frozen.rows[name]]
                old = rows.take(value, still, stack.axis)
                variable.set_raw_value(rows.put(variable.get_raw_value(), old, still, stack.axis))


def evaluation(module: nnx.Module) -> dict[str, Any]:
    """Attributes with which a module runs in evaluation mode, as :meth:`nnx.Module.eval` sets them.

    And rates, for an argument of a call beats an attribute.
    """
    mode: dict[str, Any] = {name: True for name in ("deterministic", "use_running_average") if hasattr(module, name)}
    if isinstance(module, nnx.Dropout):
        mode["rate"] = 0.0
    elif isinstance(module, nnx.MultiHeadAttention):
        mode["dropout_rate"] = 0.0
    return mode


def goes_on(what: str) -> ValueError:
    """The error that a BatchNorm of a frozen layer runs in training mode all the same."""
    return ValueError(
        f"loss_fn: calls the BatchNorm of {what} with use_running_average=False, so its statistics would go on "
        "changing although its layer is frozen; set the mode with model.train() and model.eval() instead"
    )


@functools.cache
def _class_of(kind: type, mode: Collection[tuple[str, Any]], frozen_rows: tuple[bool, ...]) -> type:
    """A class like that of a module, whose calls select by row; the same for the same arguments, as programs need."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        copy = nnx.clone(self, graph=True)  # what is written in evaluation mode is not to count
        for name, value in mode:
            setattr(copy, name, value)
        is_norm = issubclass(kind, nnx.BatchNorm)
        statistics = [each for each in vars(copy).values() if is_norm and isinstance(each, nnx.BatchStat)]
        before = [each.get_raw_value() for each in statistics]
        evaluated = kind.__call__(copy, *args, **kwargs)
        if any(map(operator.is_not, before, [each.get_raw_value() for each in statistics])):
            raise goes_on("stacked blocks")
        variables = [each for _, each in nnx.iter_graph(self) if isinstance(each, nnx.Variable)]
        old = [each.get_raw_value() for each in variables]
        result = kind.__call__(self, *args, **kwargs)
        for variable, value in zip(variables, old, strict=True):
            new = variable.get_raw_value()
            if new is not value and not isinstance(variable, PASSING):
                variable.set_raw_value(row_flags.selected(frozen_rows, new, value))
        return row_flags.selected(frozen_rows, result, evaluated)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
