"""Depthwise convolutions, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from models.layers.depthwise import depthwise_convolution
from tests.support.rounding import assert_close


def convolution(x, kernel, strides, padding, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    options = {"dimension_numbers": numbers, "feature_group_count": x.shape[-1]} | options
    return depthwise_convolution(x, kernel, strides, padding, **options)


def in_float64(x, kernel, dy, strides, padding):
    """Result and both gradients of the sum of its products with ``dy``, pixel by pixel."""
    (top, bottom), (left, right) = padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    rows, cols = ((padded.shape[1 + a] - kernel.shape[a]) // strides[a] + 1 for a in range(2))
    y, dx, dkernel = np.zeros((len(x), rows, cols, x.shape[3])), np.zeros_like(padded), np.zeros_like(kernel)
    dy = dy[:, :rows, :cols]
    for row in range(rows):
        for col in range(cols):
            at = np.s_[
                :,
                row * strides[0] : row * strides[0] + kernel.shape[0],
                col * strides[1] : col * strides[1] + kernel.shape[1],
            ]
            here = dy[:, row, col, None, None]
            y[:, row, col] = (padded[at] * kernel[:, :, 0]).sum(axis=(1, 2))
            dx[at] += here * kernel[:, :, 0]
            dkernel[:, :, 0] += (padded[at] * here).sum(axis=0)
    return y, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel


def arrays(size, kernel_size, channels=3, n=2):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, *size, channels)), rng.normal(size=(*kernel_size, 1, channels))


def values_and_gradients(x, kernel, dy, strides, padding):
    @jax.jit
    def run(x, kernel, dy):
        y, pull = jax.vjp(lambda x, kernel: convolution(x, kernel, strides, padding), x, kernel)
        return y, *pull(dy[:, : y.shape[1], : y.shape[2]])

    return run(x, kernel, dy)


CASES = {
    # size of the image, of the kernel, strides, padding
    "same": ((6, 5), (3, 3), (1, 1), "SAME"),
    "same_5": ((7, 8), (5, 5), (1, 1), "SAME"),
    "same_strided": ((8, 8), (3, 3), (2, 2), "SAME"),
    "same_strided_odd": ((9, 7), (5, 5), (2, 2), "SAME"),
    "same_strided_5": ((8, 14), (5, 5), (2, 2), "SAME"),
    "explicit": ((8, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "explicit_odd": ((7, 9), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "explicit_wide": ((3, 4), (3, 3), (1, 1), ((4, 0), (0, 5))),
    "explicit_wide_strided": ((5, 4), (3, 3), (2, 2), ((4, 0), (3, 5))),
    "valid": ((5, 6), (3, 3), (1, 1), "VALID"),
    "valid_strided": ((8, 6), (3, 3), (2, 2), "VALID"),
    "one_pixel": ((1, 1), (5, 5), (1, 1), "SAME"),
    "one_pixel_strided": ((1, 1), (3, 3), (2, 2), "SAME"),
    "two_pixels": ((2, 2), (5, 5), (2, 2), "SAME"),
    "many_rows": ((29, 3), (3, 3), (1, 1), "SAME"),
    "many_rows_strided": ((37, 3), (3, 3), (2, 2), "SAME"),
    "prime": ((13, 13), (3, 3), (1, 1), "SAME"),
    "oblong": ((8, 7), (3, 2), (1, 3), "SAME"),
    "strides_beyond_the_kernel": ((9, 9), (2, 1), (3, 2), "VALID"),
    "even": ((6, 6), (4, 4), (2, 2), "SAME"),
}


@pytest.mark.parametrize(("size", "kernel_size", "strides", "padding"), CASES.values(), ids=CASES)
def test_values_and_gradients(size, kernel_size, strides, padding):
    x, kernel = arrays(size, kernel_size)
    dy = np.random.default_rng(1).normal(size=(2, 40, 40, 3))
    narrow = (a.astype(np.float32) for a in (x, kernel, dy))
    got = values_and_gradients(*narrow, strides, padding)
    explicit = lax.padtype_to_pads(size, kernel_size, strides, padding) if isinstance(padding, str) else padding
    for array, expected in zip(got, in_float64(x, kernel, dy, strides, explicit), strict=True):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_bfloat16_is_summed_in_float32(strides):
    x, kernel = (jnp.asarray(a, jnp.bfloat16) for a in arrays((16, 16), (5, 5), n=4))
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(4, 16, 16, 3)), jnp.bfloat16)
    got = values_and_gradients(x, kernel, dy, strides, "SAME")
    padding = lax.padtype_to_pads((16, 16), (5, 5), strides, "SAME")
    exact = in_float64(*(np.asarray(a, np.float64) for a in (x, kernel, dy)), strides, padding)
    for array, expected in zip(got, exact, strict=True):
        assert array.dtype == jnp.bfloat16
        # Rounded once, at the end.
        np.testing.assert_allclose(np.asarray(array, np.float64), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.slow
def test_gradients_that_are_not_used_are_not_computed(strides):
    x, kernel = jnp.ones((4, 16, 16, 8)), jnp.ones((3, 3, 1, 8))
    dy = jnp.ones((4, 16 // strides[0], 16 // strides[1], 8))

    def flops(*argnums):
        def run(x, kernel, dy):
            def of_some(*some):
                args = dict(enumerate((x, kernel))) | dict(zip(argnums, some, strict=True))
                return convolution(args[0], args[1], strides, "SAME")

            y, pull = jax.vjp(of_some, *((x, kernel)[at] for at in argnums))
            return y, pull(dy)

        analysis = jax.jit(run).lower(x, kernel, dy).compile().cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    products = 2 * 9 * 4 * (16 // strides[0]) ** 2 * 8
    assert flops() == pytest.approx(products, rel=0.1)
    assert flops(0) == pytest.approx(2 * products, rel=0.2)
    assert flops(1) == pytest.approx(2 * products, rel=0.2)
    assert flops(0, 1) == pytest.approx(3 * products, rel=0.2)


def test_a_convolution_of_flax_differs_in_nothing_else():
    def make(**kwargs):
        return nnx.Conv(6, 6, (3, 3), strides=2, padding=1, feature_group_count=6, rngs=nnx.Rngs(0), **kwargs)

    ours, theirs = make(conv_general_dilated=depthwise_convolution), make()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 8, 6)), jnp.float32)
    np.testing.assert_array_equal(ours.kernel[...], theirs.kernel[...])
    assert ours.kernel.shape == (3, 3, 1, 6)
    run = nnx.jit(lambda conv, x: conv(x))
    np.testing.assert_allclose(run(ours, x), run(theirs, x), rtol=1e-5, atol=1e-6)


def test_what_is_not_depthwise_is_left_to_jax():
    x, kernel = arrays((8, 8), (3, 3), channels=4)
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(np.concatenate([kernel, kernel], axis=2), jnp.float32)

    def primitives(**options):
        jaxpr = jax.make_jaxpr(lambda x, kernel: convolution(x, kernel, (1, 1), ((1, 1), (1, 1)), **options))(x, kernel)
        return {eqn.primitive.name for eqn in jaxpr.eqns}

    assert primitives(feature_group_count=2) == {"conv_general_dilated"}
    kernel = kernel[:, :, :1]
    assert primitives(rhs_dilation=(2, 2)) == {"conv_general_dilated"}
    assert primitives(lhs_dilation=(2, 2)) == {"conv_general_dilated"}
    assert "conv_general_dilated" not in primitives()


def test_other_backends_have_a_fast_convolution(monkeypatch):
    x, kernel = arrays((7, 8), (3, 3))
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    here = convolution(x, kernel, (2, 2), "SAME")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jaxpr = jax.make_jaxpr(lambda x, kernel: convolution(x, kernel, (2, 2), "SAME"))(x, kernel)
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["conv_general_dilated"]
    np.testing.assert_allclose(convolution(x, kernel, (2, 2), "SAME"), here, rtol=1e-5, atol=1e-6)


def test_derivatives_under_vmap_and_checkpoint():
    x, kernel = arrays((6, 6), (3, 3), n=3)
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)

    def loss(kernel, x):
        return jnp.sum(jnp.square(convolution(x[None], kernel, (1, 1), "SAME")))

    whole = jax.jit(jax.grad(lambda kernel: jnp.sum(jnp.square(convolution(x, kernel, (1, 1), "SAME")))))(kernel)
    each = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss)), (None, 0)))(kernel, x)
    assert_close(each.sum(0), whole)
