"""A network of three layers, as small as optimizers take it, with gradients for six steps."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from smartfrz_jax import Frozen, find_layers

NAMES = ("a", "b", "c")
_RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(_RNG.standard_normal(shape), jnp.float32)


def params_like(*axes: int):
    return {name: {"kernel": normal(*axes, 3, 3), "bias": normal(*axes, 3)} for name in NAMES}


def forward(params, x):
    for name in NAMES:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x


PARAMS = params_like()
X = normal(2, 3)
LAYERS = find_layers(PARAMS, forward, X)
GRADS = [params_like() for _ in range(6)]
PER_EXAMPLE_GRADS = [params_like(2) for _ in range(6)]


def loss(params):
    return jnp.mean(forward(params, X) ** 2)


def frozen(*names: str) -> Frozen:
    return Frozen(LAYERS, frozenset(names))


def arrays(tree) -> dict[str, tuple]:
    """Every leaf by key path: its dtype and bytes."""
    return {keystr(path): bits(leaf) for path, leaf in tree_leaves_with_path(tree)}


def bits(leaf) -> tuple:
    """Dtype, shape and bytes of an array."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()
