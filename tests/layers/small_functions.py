"""Small functions of parameters."""

import jax.numpy as jnp

SQUARE = {name: jnp.eye(3) for name in "cab"}
X = jnp.ones((2, 3))


def plain(p, x):
    return x @ p["b"] @ p["c"] @ p["a"]
