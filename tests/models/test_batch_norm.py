"""The batch normalisation of the convolutional networks against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.layers.batch_norm import BatchNorm
from tests.models.convnets import variables


def batch_norm_in_float64(x, scale, bias, epsilon=1e-5):
    mean, var = x.mean(axis=(0, 1)), x.var(axis=(0, 1))
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias, mean, var


def random_norm(features=3, **kwargs):
    norm = BatchNorm(features, rngs=nnx.Rngs(0), **kwargs)
    rng = np.random.default_rng(1)
    for variable in (norm.scale, norm.bias, norm.mean):
        variable[...] = jnp.asarray(rng.normal(size=features), variable.dtype)
    norm.var[...] = jnp.asarray(rng.uniform(0.5, 2, size=features), jnp.float32)
    return norm


@pytest.mark.slow
def test_batch_norm_normalizes_with_the_biased_and_keeps_the_unbiased_variance():
    x = np.random.default_rng(0).normal(1.5, 2, size=(2, 4, 3))
    norm = random_norm(momentum=0.7)
    before = [np.asarray(v[...], np.float64) for v in (norm.scale, norm.bias, norm.mean, norm.var)]
    expected, mean, var = batch_norm_in_float64(x, *before[:2])
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.7 * before[2] + 0.3 * mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(norm.var[...], 0.7 * before[3] + 0.3 * var * 8 / 7, rtol=1e-6)


def test_batch_norm_in_evaluation_mode_uses_and_does_not_touch_the_running_statistics():
    x = np.random.default_rng(0).normal(1.5, 2, size=(2, 4, 3))
    norm = random_norm()
    norm.eval()
    scale, bias, mean, var = (np.asarray(v[...], np.float64) for v in (norm.scale, norm.bias, norm.mean, norm.var))
    held = norm.mean.get_value(), norm.var.get_value()
    y = norm(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-5, atol=1e-5)
    assert norm.mean.get_value() is held[0]
    assert norm.var.get_value() is held[1]
    np.testing.assert_array_equal(norm(jnp.asarray(x, jnp.float32), use_running_average=True), y)
    norm(jnp.asarray(x, jnp.float32), use_running_average=False)
    assert norm.mean.get_value() is not held[0]


@pytest.mark.slow
def test_gradients_of_batch_norm_are_the_closed_form():
    rng = np.random.default_rng(0)
    x, dy = rng.normal(1.5, 2, size=(2, 6, 4, 3))
    norm = random_norm()

    def loss(norm, x):
        return jnp.sum(norm(x) * jnp.asarray(dy, jnp.float32))

    grads, dx = nnx.grad(loss, argnums=(0, 1))(norm, jnp.asarray(x, jnp.float32))
    deviation = np.sqrt(x.var(axis=(0, 1)) + 1e-5)
    normalized = (x - x.mean(axis=(0, 1))) / deviation
    scale = np.asarray(norm.scale[...], np.float64)
    centred = dy - dy.mean(axis=(0, 1)) - normalized * (dy * normalized).mean(axis=(0, 1))
    np.testing.assert_allclose(dx, scale / deviation * centred, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["scale"][...], (dy * normalized).sum(axis=(0, 1)), rtol=1e-4)
    np.testing.assert_allclose(grads["bias"][...], dy.sum(axis=(0, 1)), rtol=1e-4, atol=1e-5)


def test_batch_norm_is_exact_where_the_mean_is_far_from_zero():
    x = np.random.default_rng(0).normal(1000, 1, size=(16, 16, 3)).astype(np.float32)
    norm = BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    expected, _, var = batch_norm_in_float64(x.astype(np.float64), 1, 0)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-3)  # x itself is only known to 6e-5
    np.testing.assert_allclose(norm.var[...], var * 256 / 255, rtol=1e-5)


def test_batch_norm_in_bfloat16_has_statistics_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 1, size=(8, 32, 3)), jnp.bfloat16)
    norm = BatchNorm(3, momentum=0.0, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    assert {v.dtype for v in variables(norm).values()} == {jnp.dtype(jnp.float32)}
    wide = np.asarray(x, np.float64)
    expected, mean, var = batch_norm_in_float64(wide, 1, 0)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], var * 256 / 255, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-6)
    norm.eval()
    assert norm(x).dtype == jnp.bfloat16


def test_batch_norm_of_one_value_leaves_the_statistics_finite():
    norm = BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(norm(jnp.array([[3.0, 4.0]])), [[0, 0]])
    np.testing.assert_array_equal(norm.mean[...], [1.5, 2.0])
    np.testing.assert_array_equal(norm.var[...], [0.5, 0.5])


@pytest.mark.slow
def test_batch_norm_takes_its_statistics_over_a_named_axis_too():
    x = jnp.asarray(np.random.default_rng(0).normal(1, 2, size=(4, 5, 3)), jnp.float32)
    graphdef, state = nnx.split(random_norm(axis_name="devices"))

    def shard(x):
        norm = nnx.merge(graphdef, state, copy=True)
        y = norm(x)
        return y, norm.mean[...], norm.var[...]

    y, mean, var = jax.vmap(shard, axis_name="devices")(x)
    whole = random_norm()
    np.testing.assert_allclose(y.reshape(20, 3), whole(x.reshape(20, 3)), rtol=1e-5, atol=1e-5)
    for shards, expected in ((mean, whole.mean), (var, whole.var)):
        np.testing.assert_allclose(shards, np.broadcast_to(expected[...], (4, 3)), rtol=1e-6)
