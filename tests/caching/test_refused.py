"""Losses of which activations cannot be kept are refused, and the error says why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax.caching.prefix_cache import PrefixCache
from tests.support.prefix_caches import PARAMS, N, X, Y, cached, check, frozen_of, mlp

pytestmark = pytest.mark.usefixtures("jax_defaults")


def test_batch_statistics_in_the_prefix():
    def loss_fn(params, x, y):
        h = x @ params["w0"]
        h = (h - h.mean(0)) / h.std(0)
        return jnp.square(h @ params["w1"] @ params["w2"] @ params["w3"] - y).mean()

    with pytest.raises(
        ValueError, match=r"'w1'.*layer 'w0', reduce_sum: a reduction over the examples.*evaluation mode"
    ):
        cached(loss_fn, PARAMS, (X, Y), ["w0", "w1"])
    check(loss_fn, PARAMS, (X, Y), ["w0"])  # they are behind the last frozen layer, and taken in every step


def test_random_numbers_in_the_prefix():
    def loss_fn(params, x, y, key):
        h = x @ params["w0"]
        h = h * jax.random.bernoulli(key, 0.5, h.shape)
        return jnp.square(h @ params["w1"] @ params["w2"] @ params["w3"] - y).mean()

    inputs = (X, Y, jax.random.key(3))
    with pytest.raises(ValueError, match=r"inputs:2.*no axis counts the 4 examples"):
        cached(loss_fn, PARAMS, inputs, ["w0", "w1"])
    assert check(loss_fn, PARAMS, inputs, ["w0"]).needed == {"inputs:1", "inputs:2"}

    def fixed(params, x, y):
        return loss_fn(params, x, y, jax.random.key(0))

    with pytest.raises(ValueError, match="random"):
        cached(fixed, PARAMS, (X, Y), ["w0", "w1"])


def test_inputs_that_are_the_same_for_all_examples_may_change():
    def loss_fn(params, x, y, scale):
        return mlp(params, x * scale, y)

    with pytest.raises(ValueError, match="inputs:2"):
        cached(loss_fn, PARAMS, (X, Y, jnp.float32(2.0)), ["w0"])


def test_activations_that_depend_on_the_number_of_examples():
    def loss_fn(params, x, y):
        h = jax.jit(lambda x: jnp.tanh(x @ params["w0"]) / len(x))(x)
        return jnp.square(h @ params["w1"] @ params["w2"] @ params["w3"] - y).mean()

    cache = check(loss_fn, PARAMS, (X, Y), ["w0", "w1"])
    with pytest.raises(ValueError, match=r"a batch of 2 gives other .* of 4 \(2.0 stands where that has 4.0\); take"):
        cache.activations(PARAMS, X[:2], Y[:2])


def test_augmentation():
    with pytest.raises(ValueError, match=r"augmented.*views"):
        cached(mlp, PARAMS, (X, Y), ["w0"], augmented=True)
    assert cached(mlp, PARAMS, (X, Y), ["w0"], augmented=True, views=3).views == 3


@pytest.mark.parametrize("names", [[], ["w1"], ["w2", "w3"]])
def test_nothing_to_keep(names):
    with pytest.raises(ValueError, match="nothing is worth keeping"):
        cached(mlp, PARAMS, (X, Y), names)


def test_what_a_custom_rule_hides():
    @jax.custom_vjp
    def network(w0, w1, x):
        return x @ w0 @ w1

    network.defvjp(lambda w0, w1, x: (x @ w0 @ w1, None), lambda _, g: (None, None, None))
    with pytest.raises(ValueError, match="differentiation rule of its own"):
        cached(lambda p, x: network(p["w0"], p["w1"], x).mean(), {k: PARAMS[k] for k in ("w0", "w1")}, (X,), ["w0"])


def test_wrong_arguments():
    frozen = frozen_of(mlp, PARAMS, (X, Y), ["w0"])
    with pytest.raises(ValueError, match="got none"):
        PrefixCache(PARAMS, frozen, mlp)
    with pytest.raises(ValueError, match="at least 2 examples"):
        PrefixCache(PARAMS, frozen, mlp, X[:1], Y[:1])
    cache = PrefixCache(PARAMS, frozen, mlp, X, Y)
    with pytest.raises(ValueError, match="of another frozen set"):
        cache.loss(PARAMS, (jnp.ones((N, 3)),), X, Y)
    with pytest.raises(ValueError, match="call keep"):
        cache.fetch(PARAMS, np.arange(N), X, Y)
