"""Runs of the policy ``smartfrz``, and what its predictor is shown."""

import jax.numpy as jnp
import numpy as np

from smartfrz_jax import Layer, Layers

NAMES = ("a", "b", "c", "d")
LAYERS = Layers(tuple(Layer(name, (name,), (name,)) for name in NAMES))
SIZE = 8
START = {name: jnp.full((4, 4), i, jnp.float32) for i, name in enumerate(NAMES)}


def weights_at(step):
    rng = np.random.default_rng(step)
    return {name: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for name in NAMES}


def run(policy, steps, loss=lambda step: None, first=1):
    state = policy.init(LAYERS, START)
    for step in range(first, first + steps):
        _, state = policy.update(state, LAYERS, step=step, params=lambda step=step: weights_at(step), loss=loss(step))
    return state


def loss_at(step):
    return np.float32(10 / step)
