"""Scans that carry more than activations: running statistics, a cache that blocks write, keys of random streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smartfrz_jax as sfj
from tests.freezing.stacked.networks import BLOCKS, DEPTH, PARAMS, SETS, X, block

pytestmark = [pytest.mark.usefixtures("jax_defaults"), pytest.mark.slow]


def with_statistics(params, x, running):
    """Each block normalises by statistics that a block before it has moved on, in the carry."""

    def body(carry, row):
        x, running = carry
        running = 0.9 * running + 0.1 * jnp.square(x).mean(axis=0)
        return (block(x / jnp.sqrt(1.0 + running)[None], row), running), running

    rows = params["up"], params["bias"], params["down"]
    (x, running), each = jax.lax.scan(body, (x @ params["stem"], running), rows)
    return jnp.square(x @ params["head"]).mean(), (running, each)


def with_cache(params, x, cache):
    """Each block writes what it computes to its place in a cache that goes round, and reads what is there."""

    def body(carry, row):
        x, cache, index = carry
        x = block(x + cache.mean(axis=(0, 1))[None], row)
        return (x, jax.lax.dynamic_update_index_in_dim(cache, x, index, 0), index + 1), None

    rows = params["up"], params["bias"], params["down"]
    (x, cache, index), _ = jax.lax.scan(body, (x @ params["stem"], cache, jnp.int32(0)), rows)
    return jnp.square(x @ params["head"]).mean(), (cache, index)


def with_own_cache(params, x, cache):
    """Each block has a cache of its own, which is run over and stacked again, as that of a decoder."""

    def body(x, row):
        *weights, cache = row
        x = block(x + cache, weights)
        return x, 0.5 * cache + x

    rows = params["up"], params["bias"], params["down"], cache
    x, cache = jax.lax.scan(body, x @ params["stem"], rows)
    return jnp.square(x @ params["head"]).mean(), cache


def with_keys(params, x, key):
    """One stream goes round, and each block has a key of its own; a broadcast mask is the same for all."""
    same = jax.random.bernoulli(key, 0.9, X.shape)

    def body(carry, row):
        x, key = carry
        *weights, own = row
        key, drawn = jax.random.split(key)
        kept = jax.random.bernoulli(drawn, 0.8, x.shape) & jax.random.bernoulli(own, 0.8, x.shape) & same
        return (block(jnp.where(kept, x, 0.0), weights), key), kept

    rows = params["up"], params["bias"], params["down"], jax.random.split(key, DEPTH)
    (x, key), kept = jax.lax.scan(body, (x @ params["stem"], key), rows)
    return jnp.square(x @ params["head"]).mean(), (kept, jax.random.key_data(key))


CARRIED = {
    "statistics": (with_statistics, jnp.ones(X.shape[1])),
    "cache": (with_cache, jnp.zeros((DEPTH, *X.shape))),
    "cache of each row": (with_own_cache, jnp.ones((DEPTH, *X.shape))),
    "random streams": (with_keys, jax.random.key(3)),
}


@functools.cache
def reference(kind):
    loss, more = CARRIED[kind]
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS, X, more)


@pytest.mark.parametrize("names", [SETS["prefix"], BLOCKS[1::2]], ids=["prefix", "every other"])
@pytest.mark.parametrize("kind", CARRIED)
def test_what_is_carried_is_that_of_the_whole_scan(kind, names):
    loss, more = CARRIED[kind]
    layers = sfj.find_layers(PARAMS, lambda params, x: loss(params, x, more)[0], X, rows=True)
    frozen = sfj.Frozen(layers, names)
    (value, carried), grads = jax.jit(sfj.value_and_grad(loss, frozen, has_aux=True))(PARAMS, X, more)
    (expected, of_all), every = reference(kind)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal if kind == "random streams" else close, carried, of_all)
    for name, grad in layers.unstacked(grads).items():
        if name in frozen.params:
            assert not np.any(grad), name
        else:
            close(grad, layers.unstacked(every)[name], err_msg=name)
