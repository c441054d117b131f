"""How single operations hand on the axis that counts the examples of a batch, or mix the examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from smartfrz_jax.jaxprs import flops
from smartfrz_jax.jaxprs.parts import Eqn

# fmt: off
_ELEMENTWISE = flops.ELEMENTWISE | {
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "complex", "conj",
    "copy", "copy_p", "cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "integer_pow",
    "lgamma", "log", "log1p", "logistic", "pow", "population_count", "reduce_precision", "rsqrt",
    "sharding_constraint", "sin", "sinh", "sqrt", "stop_gradient", "tan", "tanh",
}
# fmt: on
_REDUCTIONS = flops.REDUCTIONS | {"argmax", "argmin"}
_CUMULATIVE = frozenset({"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"})
_WINDOWS = frozenset({"reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"})

Rule = Callable[[Eqn, Sequence[tuple[int, ...]], Sequence["Value"]], list["Axis | None"]]
"""From an equation, the shapes of its inputs and what is known of them to the axis of the examples in its results."""


class Axis(NamedTuple):
    """The axis of a value that counts the examples.

    Attributes:
        position: Where it is.
        inner: How many entries in a row each example has on it: 1, unless other axes were merged into it.
    """

    position: int
    inner: int = 1


class Mixed(Exception):  # noqa: N818 - it is an answer
    """An equation of which the results for an example depend on more than this example; the text says how."""


class Value(NamedTuple):
    """What is known about a value.

    Attributes:
        axis: The axis of the examples; None if the value does not depend on them.
        constant: If it does not, axes along which it is the same everywhere.
    """

    axis: Axis | None = None
    constant: frozenset[int] = frozenset()


def elementwise(eqn: Eqn, shapes: Sequence[tuple[int, ...]], values: Sequence[Value]) -> Axis:
    """Axis of the examples in the result of an operation that works element by element."""
    axis = agreed(value.axis for value in values)
    rank = len(eqn.outvars[0].aval.shape)
    for shape, value in zip(shapes, values, strict=True):
        if value.axis is None and shape and len(shape) == rank:
            _check_constant(shape, value, axis)
    return axis


def agreed(axes: Any) -> Axis:
    """The one axis of all inputs that have one."""
    found = {axis for axis in axes if axis is not None}
    if len(found) != 1:
        raise Mixed("values of different examples are combined")
    return found.pop()


def _check_constant(shape: tuple[int, ...], value: Value, axis: Axis) -> None:
    if shape[axis.position] != 1 and axis.position not in value.constant:
        raise Mixed("a value that is not the same for every position in the batch")


def without(axis: Axis | None, removed: Sequence[int], how: str) -> Axis:
    """The axis after others were removed; :class:`Mixed`, saying ``how``, if it is one of them."""
    assert axis is not None
    if axis.position in removed:
        raise Mixed(how)
    return axis._replace(position=axis.position - sum(at < axis.position for at in removed))


def _elementwise(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    return [elementwise(eqn, shapes, values)]


def _broadcast(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    (axis,) = (values[0].axis,)
    return [axis._replace(position=eqn.params["broadcast_dimensions"][axis.position])]


def _reshape(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    if eqn.params["dimensions"] is not None:
        raise Mixed("a reshape that permutes axes")
    axis, old, new = values[0].axis, shapes[0], eqn.outvars[0].aval.shape
    # The examples stay together if as many entries come before the axis as before one of the new.
    before = math.prod(old[: axis.position])
    after = math.prod(old[axis.position + 1 :]) * axis.inner
    examples = old[axis.position] // axis.inner
    for position, size in enumerate(new):
        if math.prod(new[:position]) == before and size > 1 and size % examples == 0:
            inner = size // examples
            if after % inner == 0 and math.prod(new[position + 1 :]) * inner == after:
                return [Axis(position, inner)]
    raise Mixed("a reshape that merges or splits the axis of the examples")


def _transpose(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    axis = values[0].axis
    return [axis._replace(position=eqn.params["permutation"].index(axis.position))]


def _dot_general(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    contracted, batch = eqn.params["dimension_numbers"]
    found = []
    for side in (0, 1):
        axis = values[side].axis
        if axis is None:
            continue
        other = values[1 - side]
        if axis.position in contracted[side]:
            raise Mixed("a product that sums over the examples")
        if axis.position in batch[side]:
            at = batch[side].index(axis.position)
            if other.axis is None:
                _check_constant(shapes[1 - side], other, Axis(batch[1 - side][at]))
            found.append(Axis(at, axis.inner))
            continue
        if other.axis is not None:
            raise Mixed("a product of different examples")
        used = {*contracted[side], *batch[side]}
        free = [i for i in range(len(shapes[side])) if i not in used]
        first = len(batch[0]) + (len(shapes[0]) - len(contracted[0]) - len(batch[0])) * side
        found.append(Axis(first + free.index(axis.position), axis.inner))
    return [agreed(found)]


def _convolution(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    spec = eqn.params["dimension_numbers"]
    axis = values[0].axis
    if values[1].axis is not None or axis.position != spec.lhs_spec[0] or eqn.params["batch_group_count"] != 1:
        raise Mixed("a convolution over the examples")
    return [axis._replace(position=spec.out_spec[0])]


def _window(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    axis, params = _of_operands(eqn, shapes, values), eqn.params
    at = axis.position
    sizes = (params[key][at] for key in ("window_dimensions", "window_strides", "base_dilation", "window_dilation"))
    if any(size != 1 for size in sizes) or tuple(params["padding"][at]) != (0, 0):
        raise Mixed("a window over the examples")
    return [axis] * len(eqn.outvars)


def _reduce(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    axis = _of_operands(eqn, shapes, values)
    return [without(axis, eqn.params["dimensions"], "a reduction over the examples")] * len(eqn.outvars)


def _of_operands(eqn: Eqn, shapes: Any, values: Any) -> Axis:
    """Axis of the examples in what is reduced together, one value for each result; then come the initial ones."""
    n = len(eqn.outvars)
    return _together(shapes[:n], values[:n])


def _together(shapes: Sequence[tuple[int, ...]], values: Sequence[Value]) -> Axis:
    """Axis of the examples in values of one shape."""
    axis = agreed(value.axis for value in values)
    for shape, value in zip(shapes, values, strict=True):
        if value.axis is None:
            _check_constant(shape, value, axis)
    return axis


def _stack(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    axis = _together(shapes, values)
    return [axis._replace(position=axis.position + (eqn.params["axis"] <= axis.position))]


def _pad(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    axis = values[0].axis
    if axis is None or tuple(eqn.params["padding_config"][axis.position]) != (0, 0, 0):
        raise Mixed("the batch is padded")
    return [axis]


def _slice(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    axis = values[0].axis
    strides = eqn.params["strides"]
    _check_whole(eqn.outvars[0].aval.shape, shapes[0], axis, reverses=bool(strides and strides[axis.position] != 1))
    return [axis]


def _dynamic_slice(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    if any(value.axis is not None for value in values[1:]):
        raise Mixed("a slice that begins where an example says")
    _check_whole(eqn.params["slice_sizes"], shapes[0], values[0].axis)
    return [values[0].axis]


def _dynamic_update_slice(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    if any(value.axis is not None for value in values[2:]):
        raise Mixed("a slice that begins where an example says")
    axis = elementwise(eqn, shapes[:2], values[:2])
    _check_whole(shapes[1], shapes[0], axis)
    return [axis]


def _check_whole(part: Sequence[int], whole: Sequence[int], axis: Axis, *, reverses: bool = False) -> None:
    if reverses or part[axis.position] != whole[axis.position]:
        raise Mixed("a part of the batch is taken")


def _along(parameter: str, how: str) -> Rule:
    """Of primitives that work along one axis, or some, and leave the others as they are."""

    def rule(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
        along = eqn.params[parameter]
        axis = elementwise(eqn, shapes, values)
        if axis.position in (along if isinstance(along, tuple) else (along,)):
            raise Mixed(how)
        return [axis] * len(eqn.outvars)

    return rule


def _removing(parameter: str, how: str) -> Rule:
    """Of primitives of which the results lack one axis, or some."""

    def rule(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
        gone = eqn.params[parameter]
        return [without(values[0].axis, gone if isinstance(gone, tuple) else (gone,), how)] * len(eqn.outvars)

    return rule


def _gather(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    numbers = eqn.params["dimension_numbers"]
    operand, indices = values[0].axis, values[1].axis
    rank = len(eqn.outvars[0].aval.shape)
    rows = [at for at in range(rank) if at not in numbers.offset_dims]  # one for each axis of the indices but the last
    if indices is not None and indices.position == len(shapes[1]) - 1:
        raise Mixed("an index of which each example is a part")
    paired = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    if operand is None:
        assert indices is not None
        for at, its_at in paired.items():
            if its_at == indices.position:
                _check_constant(shapes[0], values[0], Axis(at))
        return [indices._replace(position=rows[indices.position])]
    if operand.position in paired:
        at = paired[operand.position]
        if indices is None:
            _check_constant(shapes[1], values[1], Axis(at))
        elif indices != operand._replace(position=at):
            raise Mixed("an example is looked up in another")
        return [operand._replace(position=rows[at])]
    if indices is not None or eqn.params["slice_sizes"][operand.position] != shapes[0][operand.position]:
        raise Mixed("an example is looked up in another")
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [at for at in range(len(shapes[0])) if at not in gone]
    return [operand._replace(position=numbers.offset_dims[kept.index(operand.position)])]


def _barrier(eqn: Eqn, shapes: Any, values: Any) -> list[Axis | None]:
    return [value.axis for value in values]


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _along("dimension", "the batch is concatenated with something"),
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "optimization_barrier": _barrier,
    "pad": _pad,
    "reduce": _reduce,
    "reshape": _reshape,
    "rev": _along("dimensions", "the batch is turned round"),
    "slice": _slice,
    "sort": _along("dimension", "a sort over the examples"),
    "split": _along("axis", "a split of the examples"),
    "squeeze": _removing("dimensions", "the axis of the examples is removed"),
    "stack": _stack,
    "top_k": _along("axis", "the largest of the examples are taken"),
    "transpose": _transpose,
    "unstack": _removing("axis", "the examples are taken apart"),
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _removing("axes", "a reduction over the examples")),
    **dict.fromkeys(_CUMULATIVE, _along("axis", "a cumulative sum over the examples")),
    **dict.fromkeys(_WINDOWS, _window),
}
