"""Small losses of frozen layers, and what a cached step of them must give."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import smartfrz_jax as sfj
from smartfrz_jax.caching.prefix_cache import PrefixCache
from tests.support.rounding import assert_close

N = 4
RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(RNG.standard_normal((N, width)), jnp.float32) for width in (6, 2))
SIZES = (6, 5, 3, 4, 2)
PARAMS = {
    f"w{i}": jnp.asarray(RNG.standard_normal(shape), jnp.float32) for i, shape in enumerate(itertools.pairwise(SIZES))
}
IMAGES = jnp.asarray(RNG.standard_normal((N, 8, 8, 3)), jnp.float32)
LABELS = jnp.asarray(np.arange(N) % 3)
IDS = jnp.asarray(RNG.integers(0, 20, (N, 6)))
MASK = jnp.asarray(np.arange(6)[None] < np.array([6, 4, 3, 2])[:, None], jnp.int32)


def mlp(params, x, y):
    for name in sorted(params)[:-1]:
        x = jnp.tanh(x @ params[name])
    return jnp.square(x @ params[sorted(params)[-1]] - y).mean()


def frozen_of(loss_fn, params, inputs, names):
    return sfj.Frozen(sfj.find_layers(params, loss_fn, *inputs), frozenset(names))


def cached(loss_fn, params, inputs, names, **kwargs):
    return PrefixCache(params, frozen_of(loss_fn, params, inputs, names), loss_fn, *inputs, **kwargs)


def check(loss_fn, params, inputs, names, **kwargs):
    """Loss and gradients are those of the uncached frozen step; returns the cache."""
    cache = cached(loss_fn, params, inputs, names, **kwargs)
    frozen = cache.frozen
    activations = cache.activations(params, *inputs)
    left = [x if f"inputs:{i}" in cache.needed else None for i, x in enumerate(inputs)]
    got = jax.jit(sfj.value_and_grad(cache.loss, frozen))(params, activations, *left)
    assert_close(got, jax.jit(sfj.value_and_grad(loss_fn, frozen))(params, *inputs))
    return cache
