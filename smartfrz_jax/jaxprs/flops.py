"""Floating-point operations of single equations of a jaxpr, as XLA counts them, almost without compiling.

XLA counts 2 for a multiply-add, 1 for every element of an elementwise result, and keeps transcendental functions
(exponentials, logarithms, square roots, error functions) apart; so they are 0 here. In a convolution it leaves out the
positions that fall on padding. What is neither of these, nor a reduction, is a few primitives (random bits, sorting,
``erfc``, complex convolutions) that become many operations: for them its own count of the lowered primitive is asked
for. Only cumulative sums and the like are compiled: before, they are windows as long as the axis, of which XLA makes a
tree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from smartfrz_jax.jaxprs import inline, named_axes
from smartfrz_jax.jaxprs.parts import Eqn, Jaxpr, Var, as_function, variables

# fmt: off
ELEMENTWISE = frozenset({
    "abs", "add", "add_any", "and", "ceil", "clamp", "convert_element_type", "div", "eq", "floor", "ge", "gt",
    "imag", "is_finite", "le", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "real", "rem",
    "round", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "square", "sub",
    "xor",
})
FREE = frozenset({
    "bitcast_convert_type", "broadcast_in_dim", "cbrt", "concatenate", "copy", "copy_p", "cos", "create_token",
    "device_put", "dynamic_slice", "dynamic_update_slice", "erf", "exp", "exp2", "expand_dims", "expm1", "iota",
    "log", "log1p", "num_programs", "optimization_barrier", "pad", "pow", "program_id", "random_unwrap",
    "random_wrap", "reshape", "rev", "rsqrt", "sharding_constraint", "sin", "slice", "split", "sqrt", "squeeze",
    "stack", "stop_gradient", "tan", "tanh", "transpose",
})
# Between the positions of a named axis: an addition for each element, or none.
COLLECTIVES = frozenset({"pmax", "pmin", "psum", "psum_invariant"})
EXCHANGES = frozenset({
    "all_gather", "all_gather_invariant", "all_to_all", "axis_index", "ppermute", "pvary", "reduce_scatter",
})
REDUCTIONS = frozenset({
    "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum", "reduce_xor",
})
# fmt: on
_WINDOWS = frozenset({"reduce_window_sum", "reduce_window_max", "reduce_window_min"})
_CUMULATIVE = frozenset({"cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"})
_PARTS = frozenset({"broadcast_in_dim", "convert_element_type", "pad", "reshape", "slice", "squeeze", "transpose"})
_NOT_DIFFERENTIABLE = frozenset({"stop_gradient", "sign", "floor", "ceil", "round"})

# What XLA's CPU backend makes of the gradient of a max pooling: for every comparison in a window, the larger value and
# its four indices are selected (five selects, two comparisons of indices, one of values, not, and, or).
_CPU_SELECT = 11


class Flops(NamedTuple):
    """A number of floating-point operations.

    Attributes:
        needed: Those that the equation asks for.
        added: Those that the backend adds, by replacing the operation with a more expensive one.
    """

    needed: float
    added: float = 0.0

    def __add__(self, other: Flops) -> Flops:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Flops(self.needed + other.needed, self.added + other.added)

    def __sub__(self, other: Flops) -> Flops:
        return Flops(self.needed - other.needed, self.added - other.added)

    def times(self, n: int) -> Flops:
        """``n`` times as many."""
        return Flops(self.needed * n, self.added * n)


ZERO = Flops(0.0)


def of_equation(eqn: Eqn, backend: str) -> Flops:
    """Operations of one equation, those of the jaxprs inside it included.

    Args:
        eqn: An equation. The body of a scan counts as often as it runs; that of a ``while`` once, for nobody knows;
            of the branches of a ``cond``, the most expensive counts; what ``shard_map`` runs, on all devices.
        backend: Platform that it will run on, such as ``"cpu"``.

    Raises:
        ValueError: If it is a Pallas kernel that does not say what it costs, and cannot be counted.
    """
    name, params = eqn.primitive.name, eqn.params
    if name in FREE or name in EXCHANGES:
        return ZERO
    if name in ELEMENTWISE or name in COLLECTIVES:
        return Flops(sum(_size(var) for var in eqn.outvars))
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return Flops(2.0 * _size(eqn.outvars[0]) * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted))
    if name == "conv_general_dilated" and not _is_complex(eqn.outvars[0]):  # else it becomes three real ones
        return _convolution(eqn, backend)
    if name in REDUCTIONS:
        return Flops(sum(_size(var) for var in eqn.invars) - sum(_size(var) for var in eqn.outvars))
    if name in _WINDOWS:
        return Flops(_size(eqn.outvars[0]) * (math.prod(params["window_dimensions"]) - 1.0))
    if name == "reduce":
        return of_jaxpr(params["jaxpr"].jaxpr, backend).times(_size(eqn.invars[0]) - _size(eqn.outvars[0]))
    if name == "reduce_window":
        steps = math.prod(params["window_dimensions"]) - 1
        return of_jaxpr(params["jaxpr"], backend).times(_size(eqn.outvars[0]) * steps)
    if name == "select_and_scatter_add":
        windows, size = _size(eqn.invars[0]), math.prod(params["window_dimensions"])
        added = windows * (_CPU_SELECT - 1.0) * (size - 1) if backend == "cpu" else 0.0
        return Flops(float(windows * size), added)
    if name == "pallas_call":
        return _kernel(eqn, backend)
    if name == "cond":
        return max(of_jaxpr(branch.jaxpr, backend) for branch in params["branches"])
    body, times = repeated(eqn)
    if body is not None:
        return of_jaxpr(body, backend).times(times)
    if any(_is_ref(var) for var in eqn.invars):  # it moves data, and maybe adds them to what is there
        return Flops(_size(eqn.invars[1])) if name == "addupdate" else ZERO
    return _asked(eqn, signature(eqn), *_by_position(eqn))


def repeated(eqn: Eqn) -> tuple[Any, int]:
    """The jaxpr that a loop, a call or ``shard_map`` runs, and how often, on all devices; None for other equations."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return params["jaxpr"].jaxpr, params["length"]
    if name == "while":
        return params["body_jaxpr"].jaxpr, 1
    if name == "run_scoped":
        return params["jaxpr"], 1
    if name == "shard_map":
        devices = (params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        return params["jaxpr"], math.prod(devices)
    return inline.called(eqn), 1


def _kernel(eqn: Eqn, backend: str) -> Flops:
    """Operations of a Pallas kernel: those that it says it has, else those of its body at each place of its grid."""
    estimate, grid = eqn.params["cost_estimate"], eqn.params["grid_mapping"].grid
    if estimate is not None:
        return Flops(float(estimate.flops))
    try:
        return of_jaxpr(eqn.params["jaxpr"], backend).times(math.prod(grid))
    except Exception as error:  # what only some devices have is not lowered here; a grid may depend on values
        raise ValueError(
            f"the FLOPs of the Pallas kernel {eqn.params['jaxpr'].debug_info.func_name!r} cannot be counted ({error}); "
            "pass cost_estimate=pl.CostEstimate(...) to pallas_call"
        ) from error


def of_jaxpr(jaxpr: Jaxpr, backend: str) -> Flops:
    """Operations of all equations of a jaxpr."""
    return _sum(jaxpr.eqns, backend)


def macs(eqn: Eqn) -> int:
    """Multiply-adds of convolutions and products as they are published: positions on padding count.

    They may be in loops and calls, but not in kernels of Pallas. A call may also be a convolution that is written out:
    see :func:`written_out`.
    """
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return _size(eqn.outvars[0]) * math.prod(kernel) // out_features
    if eqn.primitive.name == "dot_general":
        return int(of_equation(eqn, "").needed) // 2
    if products := written_out(eqn):
        return sum(_size(product.outvars[0]) for product in products)
    body, times = repeated(eqn)
    return 0 if body is None else times * sum(map(macs, body.eqns))


def written_out(eqn: Eqn) -> list[Any]:
    """The products in a convolution that is written out, as what it is by definition: a sum of shifted products.

    Args:
        eqn: An equation of an inlined jaxpr.

    Returns:
        The multiplications, if the equation is a call with a differentiation rule of its own, of two arguments, that
        adds up products of parts of one with parts of the other and does nothing else. None for all others.
    """
    if eqn.primitive.name != "custom_vjp_call" or len(eqn.invars) != 2 or len(eqn.outvars) != 1:
        return []
    body = inline.body_of(eqn)
    if body is None:
        return []
    flat = inline.inline(jex.ClosedJaxpr(body, []), (), ()).jaxpr
    parts = {var: {i} for i, var in enumerate(flat.invars)}  # of which arguments a value has parts
    products, sums = [], 0
    for step in inline.needed(flat, flat.outvars):
        name = step.primitive.name
        of = [parts.get(var, set()) for var in variables(step.invars)]
        if name == "mul" and of in ([{0}, {1}], [{1}, {0}]):
            products.append(step)
        elif name == "add" and of == [{0, 1}, {0, 1}]:
            sums += 1
        elif name not in _PARTS or (set().union(*of) == {0, 1} and name != "convert_element_type"):
            return []
        parts[step.outvars[0]] = set().union(*of)
    return products if len(products) == sums + 1 > 1 else []


def of_gradient(eqn: Eqn, wanted: Collection[int], backend: str) -> Flops:
    """Operations that the cotangents of some inputs of an equation take, beside the equation itself.

    Args:
        eqn: An equation.
        wanted: Positions of these inputs.
        backend: Platform that it will run on.
    """
    if not wanted:
        return ZERO
    run, shapes = _by_position(eqn)
    cotangents = [shape_of(var) for var in eqn.outvars]

    def with_gradient(values: dict[int, Any], cotangents: list[Any]) -> Any:
        fixed = {at: value for at, value in values.items() if at not in wanted}
        outs, pull = jax.vjp(lambda some: run(fixed | some), {at: values[at] for at in wanted})
        cotangents = [
            ct if jnp.issubdtype(out.dtype, jnp.inexact) else np.zeros(out.shape, jax.dtypes.float0)
            for out, ct in zip(outs, cotangents, strict=True)
        ]
        return outs, pull(cotangents)

    if eqn.primitive.name in _CUMULATIVE:
        both = _asked(eqn, ("with gradient", signature(eqn)), with_gradient, shapes, cotangents)
        return both - of_equation(eqn, backend)
    closed = inline.inline(named_axes.make_jaxpr(with_gradient)(shapes, cotangents), (), ())
    used = inline.needed(closed.jaxpr, closed.jaxpr.outvars)
    return _sum(used, backend) - of_equation(eqn, backend)


def is_differentiable(eqn: Eqn) -> bool:
    """Whether derivatives pass through an equation at all."""
    floating = any(jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in eqn.outvars)
    return floating and eqn.primitive.name not in _NOT_DIFFERENTIABLE


def signature(eqn: Eqn) -> Any:
    """Equal for equations of the same cost; for those with rules of their own, of the same object only."""
    if any(callable(value) for value in eqn.params.values()):
        return id(eqn)
    params = tuple(sorted((key, str(value)) for key, value in eqn.params.items()))
    return eqn.primitive.name, params, tuple(str(var.aval) for var in (*eqn.invars, *eqn.outvars))


def _by_position(eqn: Eqn) -> tuple[Callable[[dict[int, Any]], list[Any]], dict[int, Any]]:
    """One equation as a function of its inputs by position, and their shapes."""
    invars = [var if isinstance(var, jex.Literal) else jex.Var(var.aval) for var in eqn.invars]
    outvars = [jex.Var(var.aval) for var in eqn.outvars]
    inputs = {at: var for at, var in enumerate(invars) if not isinstance(var, jex.Literal)}
    alone = [eqn.replace(invars=invars, outvars=outvars)]
    run = as_function(jax.make_jaxpr(lambda: None)(), alone, list(inputs.values()), outvars)
    return lambda values: run(*(values[at] for at in inputs)), {at: shape_of(v) for at, v in inputs.items()}


def _sum(eqns: Iterable[Eqn], backend: str) -> Flops:
    return functools.reduce(Flops.__add__, (of_equation(eqn, backend) for eqn in eqns), ZERO)


def shape_of(var: Var) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a variable of a jaxpr."""
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def _is_complex(var: Var) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.complexfloating)


def _is_ref(var: Var) -> bool:
    """Whether a variable is memory that a kernel reads and writes."""
    return hasattr(var.aval, "inner_aval")


def _size(var: Var) -> int:
    return math.prod(var.aval.shape)


def _convolution(eqn: Eqn, backend: str) -> Flops:
    params = eqn.params
    lhs, rhs, out = (var.aval.shape for var in (*eqn.invars[:2], eqn.outvars[0]))
    spec = params["dimension_numbers"]
    valid = 1
    for i, (stride, (low, _), holes, dilation) in enumerate(
        zip(params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True)
    ):
        size, kernel, outs = (
            shape[s[2 + i]] for shape, s in ((lhs, spec.lhs_spec), (rhs, spec.rhs_spec), (out, spec.out_spec))
        )
        valid *= _valid_positions(size, kernel, outs, stride, low, holes, dilation)
    batch_groups = params["batch_group_count"]
    batch, features, in_features = out[spec.out_spec[0]], out[spec.out_spec[1]], rhs[spec.rhs_spec[1]]
    if batch_groups > 1:
        batch = lhs[spec.lhs_spec[0]] // batch_groups
    needed = 2.0 * batch * features * in_features * valid
    if backend != "cpu" or batch_groups == 1 or batch_groups != features:
        return Flops(needed)
    # The CPU backend computes the gradient of a depthwise kernel for every pair of channels, and then keeps the
    # diagonal: a comparison and a select for every element, and a reduction.
    dense = float(batch_groups * math.prod(out))
    return Flops(needed, needed * (batch_groups - 1) + 3 * dense - math.prod(out))


@functools.cache
def _valid_positions(size: int, kernel: int, outs: int, stride: int, low: int, holes: int, dilation: int) -> int:
    """Pairs of a kernel position and an output position that read an input and not padding, along one axis."""
    positions = (out * stride + k * dilation - low for k in range(kernel) for out in range(outs))
    return sum(0 <= at <= (size - 1) * holes and at % holes == 0 for at in positions)


# With the equation, whose identity may be its signature.
_asked_flops: dict[Any, tuple[Flops, Any]] = {}


def _asked(eqn: Eqn, key: Any, function: Callable[..., Any], *shapes: Any) -> Flops:
    """XLA's count of an equation or its gradient as a function, lowered; compiled only if it is a cumulative one."""
    if key not in _asked_flops:
        stage = jax.jit(function).lower(*shapes)
        analysis = (stage.compile() if eqn.primitive.name in _CUMULATIVE else stage).cost_analysis()
        properties = (analysis[0] if isinstance(analysis, list) else analysis) or {}
        _asked_flops[key] = Flops(max(float(properties.get("flops", 0.0)), 0.0)), eqn
    return _asked_flops[key][0]
