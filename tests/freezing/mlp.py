"""A small network, its layers and gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from smartfrz_jax import find_layers

RNG = np.random.default_rng(0)
NAMES = ("a", "b", "c", "d")


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def mlp_params():
    return {name: {"kernel": normal(4, 4), "bias": normal(4)} for name in NAMES}


def mlp(params, x):
    for name in NAMES:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x


PARAMS = mlp_params()
X = normal(5, 4)
LAYERS = find_layers(PARAMS, mlp, X)


def loss(params, x):
    return jnp.mean(mlp(params, x) ** 2)
