"""Prices of single equations, against what XLA counts in programs compiled for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from smartfrz_jax.cost.kinds import kind_of
from smartfrz_jax.jaxprs import flops, inline
from tests.support.programs import AS_FOR_USERS


def shape(*dims: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def compiled(function, *shapes, options=AS_FOR_USERS) -> float:
    analysis = jax.jit(function, compiler_options=options).lower(*shapes).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis).get("flops", 0.0)


def equation(function, *shapes):
    flat = inline.inline(jax.make_jaxpr(function)(*shapes), (), ()).jaxpr
    (eqn,) = flat.eqns
    return eqn


def total(price: flops.Flops) -> float:
    return price.needed + price.added


def check(function, *shapes, gradients=()) -> None:
    """The price of an equation, and of its gradients for these inputs, must be XLA's."""
    eqn = equation(function, *shapes)
    assert total(flops.of_equation(eqn, "cpu")) == compiled(function, *shapes)
    for at in gradients:

        def gradient(cotangent, *values, at=at):
            def of_one(value):
                return function(*values[:at], value, *values[at + 1 :])

            return jax.vjp(of_one, values[at])[1](cotangent)[0]

        out = jax.eval_shape(function, *shapes)
        assert total(flops.of_gradient(eqn, {at}, "cpu")) == compiled(gradient, out, *shapes)


def convolution(stride=1, padding="SAME", groups=1, dilation=1):
    def run(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            padding,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    return run


CONVOLUTIONS = {
    "valid": ({"padding": "VALID"}, 3, 8),
    "same": ({}, 3, 8),
    "stride": ({"stride": 2}, 3, 8),
    "explicit": ({"stride": 2, "padding": ((3, 3), (3, 3))}, 7, 8),
    "one": ({"padding": "VALID"}, 1, 16),
    "one_strided": ({"stride": 2, "padding": "VALID"}, 1, 16),
    "dilated": ({"dilation": 2}, 3, 8),
    "grouped": ({"groups": 2}, 3, 8),
    "depthwise": ({"groups": 8}, 3, 8),
    "depthwise_strided": ({"groups": 8, "stride": 2}, 5, 8),
}


@pytest.mark.parametrize(("options", "kernel", "features"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_and_their_gradients(options, kernel, features):
    w = shape(kernel, kernel, 8 // options.get("groups", 1), features)
    check(convolution(**options), shape(4, 14, 13, 8), w, gradients=(0, 1))


def test_positions_on_padding_are_left_out_but_published():
    eqn = equation(convolution(), shape(1, 4, 4, 1), shape(3, 3, 1, 1))
    # Along each axis the kernel covers 2 + 3 + 3 + 2 pixels of the image.
    assert flops.of_equation(eqn, "cpu").needed == 2 * 10 * 10
    assert flops.macs(eqn) == 9 * 16


def test_what_the_backend_adds_is_apart():
    eqn = equation(convolution(groups=8), shape(4, 14, 14, 8), shape(3, 3, 1, 8))
    forward = flops.of_equation(eqn, "cpu")
    assert forward.added == 0
    on_cpu, elsewhere = (flops.of_gradient(eqn, {1}, backend) for backend in ("cpu", "gpu"))
    assert on_cpu.needed == elsewhere.needed == forward.needed
    assert on_cpu.added > 6 * forward.needed
    assert elsewhere.added == 0


def shifted(x, w):
    padded = lax.pad(x, jnp.zeros(()), ((0, 0, 0), (1, 1, 0), (0, 0, 0)))
    first, second, third = (padded[:, i : i + 14] * w[i] for i in range(3))
    return first + second + third


def scaled(x, w):
    return x * w[0]


def biased(x, w):
    return shifted(x, w) + w[0]


def squared(x, w):
    return shifted(shifted(x, w), w)


def rectified(x, w):
    return jnp.maximum(x, 0) * w[0] + x * w[1]


@pytest.mark.parametrize(
    ("function", "products"), [(shifted, 3), (scaled, 0), (biased, 0), (squared, 0), (rectified, 0)]
)
def test_convolutions_that_are_written_out(function, products):
    whole = jax.custom_vjp(jax.jit(function))
    whole.defvjp(lambda x, w: (function(x, w), (x, w)), lambda residuals, dy: jax.vjp(function, *residuals)[1](dy))
    shapes = shape(4, 14, 8), shape(3, 1, 1, 8)
    eqn = equation(whole, *shapes)
    assert len(flops.written_out(eqn)) == products
    assert flops.macs(eqn) == products * 4 * 14 * 8
    if products:
        check(whole, *shapes, gradients=(0, 1))
        kinds = {
            kind_of(eqn, [False, True], [True, False]),
            kind_of(eqn, [False, False], [True, True]),
        }
        assert kinds == {"convolution", "attention"}


def test_products():
    check(lambda x, y: x @ y, shape(8, 16), shape(16, 4), gradients=(0, 1))
    check(lambda x, y: lax.dot_general(x, y, (((2,), (2,)), ((0,), (0,)))), shape(3, 5, 8), shape(3, 7, 8))


ELEMENTWISE = {
    "tanh": lax.tanh,
    "exp": lax.exp,
    "erf": lax.erf,
    "logistic": lax.logistic,
    "rsqrt": lax.rsqrt,
    "negative": lax.neg,
    "fifth_power": lambda x: lax.integer_pow(x, 5),
    "square": lax.square,
    "relu": jax.nn.relu,
    "sum": lambda x: lax.reduce_sum(x, (0,)),
    "largest": lambda x: lax.reduce_max(x, (1,)),
    "cast": lambda x: x.astype(jnp.bfloat16),
    "transpose": lambda x: x.T,
}


@pytest.mark.parametrize("function", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_elementwise_functions_and_reductions(function):
    check(function, shape(32, 64))


def test_gradient_of_relu():
    check(jax.nn.relu, shape(32, 64), gradients=(0,))


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (3, 2)])
def test_max_pooling_and_its_gradient(window, stride):
    def pool(x):
        return lax.reduce_window(x, -np.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), "VALID")

    check(pool, shape(4, 13, 13, 8), gradients=(0,))


def larger(a, b):
    is_larger = a[0] > b[0]
    return tuple(lax.select(is_larger, one, other) for one, other in zip(a, b, strict=True))


OWN_FUNCTIONS = {
    "reduction": lambda x: lax.reduce(x, 0.0, lambda a, b: a + 2 * b, (1,)),
    "reduction of all": lambda x: lax.reduce(x, -jnp.inf, jnp.logaddexp, (0, 1, 2)),
    "reduction of two": lambda x: lax.reduce((x, x), (0.0, 0.0), larger, (0, 2))[1],
    "product": lambda x: lax.reduce_window(x, 1.0, lax.mul, (1, 3, 3), (1, 1, 1), "SAME"),
    "logarithms": lambda x: lax.reduce_window(x, -jnp.inf, jnp.logaddexp, (1, 3, 2), (1, 2, 2), "VALID"),
    "window of two": lambda x: lax.reduce_window((x, x), (0.0, 0.0), larger, (1, 2, 2), (1, 2, 2), "VALID"),
}


@pytest.mark.parametrize("name", OWN_FUNCTIONS)
def test_reductions_and_windows_with_a_function_of_ones_own(name):
    check(OWN_FUNCTIONS[name], shape(32, 12, 12))


@pytest.mark.parametrize("groups", [1, 2])
def test_complex_convolutions_cost_what_the_real_ones_do_that_they_become(groups):
    function, shapes = convolution(groups=groups), (shape(4, 14, 13, 8, dtype=jnp.complex64),)
    shapes += (shape(3, 3, 8 // groups, 16, dtype=jnp.complex64),)
    price = total(flops.of_equation(equation(function, *shapes), "cpu"))
    assert price == jax.jit(function).lower(*shapes).cost_analysis()["flops"]
    # In loops that it compiles, XLA takes real and imaginary parts twice.
    assert price == pytest.approx(compiled(function, *shapes), rel=0.02)


def test_what_is_mapped_over_devices_counts_on_all_of_them():
    mesh = jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    some, every = P("rows"), P(("rows", "columns"))

    def of_one(x, w):
        return x @ w

    for names, rows in (({"rows"}, some), ({"rows", "columns"}, every)):
        mapped = jax.shard_map(of_one, mesh=mesh, in_specs=(rows, P()), out_specs=rows, axis_names=names)
        eqn = jax.make_jaxpr(mapped)(shape(16, 4), shape(4, 8)).eqns[-1]
        assert flops.of_equation(eqn, "cpu").needed == 2 * 16 * 4 * 8
        assert flops.of_gradient(eqn, {0}, "cpu").needed == 2 * 16 * 4 * 8


def test_loops_count_as_often_as_they_run():
    def loop(x):
        return lax.scan(lambda x, _: (x @ x, None), x, None, length=7)[0]

    def choice(x):
        return lax.cond(True, lambda x: x @ x, lambda x: x, x)

    assert flops.of_equation(equation(loop, shape(4, 4)), "cpu").needed == 7 * 2 * 4**3
    eqn = next(eqn for eqn in jax.make_jaxpr(choice)(shape(4, 4)).eqns if eqn.primitive.name == "cond")
    assert flops.of_equation(eqn, "cpu").needed == 2 * 4**3


def test_the_unknown_is_asked_of_xla():
    for function, tolerance in ((lax.erfc, 0.05), (lambda x: lax.argmax(x, 0, jnp.int32), 0.0)):
        price = flops.of_equation(equation(function, shape(64)), "cpu").needed
        assert price == pytest.approx(compiled(function, shape(64)), rel=tolerance)
        assert price > 5 * 64


def once(x, y, out):
    out[...] = x[...] @ y[...]


def summed(x, y, out):
    def run(total):
        total[...] = x[:, :8] @ y[:8, :]
        total[...] += x[:, 8:] @ y[8:, :]
        out[...] = total[...]

    pl.run_scoped(run, pl.MemoryRef(jax.core.ShapedArray((4, 8), jnp.float32), pl.ANY))


def repeated(x, y, out):
    @pl.when(pl.program_id(0) == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    out[...] += x[...] @ y[...]


def kernel(body, grid=(3, 2), **options):
    """A product of (12, 16) and (16, 16), block by block."""
    blocks = [pl.BlockSpec((4, 16), lambda i, j: (i, 0)), pl.BlockSpec((16, 8), lambda i, j: (0, j))]
    out = {"out_specs": pl.BlockSpec((4, 8), lambda i, j: (i, j)), "out_shape": shape(12, 16)}
    return pl.pallas_call(body, grid=grid, in_specs=blocks, interpret=True, **out, **options)


PRODUCT = 2 * 12 * 16 * 16


@pytest.mark.parametrize(("body", "more"), [(once, 0), (summed, 12 * 16), (repeated, 12 * 16 + 6 * 2)])
def test_kernels_cost_their_body_at_each_place_of_the_grid(body, more):
    eqn = equation(kernel(body), shape(12, 16), shape(16, 16))
    assert flops.of_equation(eqn, "cpu").needed == PRODUCT + more


def test_kernels_cost_what_they_say():
    says = pl.CostEstimate(flops=7, transcendentals=0, bytes_accessed=0)
    eqn = equation(kernel(once, cost_estimate=says), shape(12, 16), shape(16, 16))
    assert flops.of_equation(eqn, "cpu").needed == 7


def test_kernels_that_cannot_be_counted():
    eqn = equation(lambda n, x, y: kernel(once, (n, 2))(x, y), shape(dtype=jnp.int32), shape(12, 16), shape(16, 16))
    with pytest.raises(ValueError, match=r"FLOPs of the Pallas kernel 'once' .*pass cost_estimate=pl.CostEstimate"):
        flops.of_equation(eqn, "cpu")


@pytest.mark.parametrize(("length", "reverse"), [(12, True), (300, False)])
@pytest.mark.parametrize("name", ["cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"])
def test_cumulative_ones_cost_what_they_are_compiled_to(name, length, reverse):
    def run(x):
        return jax.vmap(lambda x: getattr(lax, name)(x, axis=0, reverse=reverse))(x)

    def with_gradient(x, cotangent):
        out, pull = jax.vjp(run, x)
        return out, pull(cotangent)

    x = shape(2, length, 8)
    eqn = equation(run, x)
    price = flops.of_equation(eqn, "cpu")
    assert total(price) == compiled(run, x, options={})
    assert total(price + flops.of_gradient(eqn, {0}, "cpu")) == compiled(with_gradient, x, x, options={})
    repeated = equation(lambda x: lax.scan(lambda x, _: (run(x), None), x, None, length=7)[0], x)
    assert flops.of_equation(repeated, "cpu") == price.times(7)


def test_gradients_of_nothing_cost_nothing():
    eqn = equation(lambda x, y: x @ y, shape(8, 16), shape(16, 4))
    assert flops.of_gradient(eqn, (), "cpu") == flops.ZERO
