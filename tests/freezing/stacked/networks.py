"""Equal blocks in a row, their weights stacked for a scan, or each for itself."""

import jax
import jax.numpy as jnp
import numpy as np

import smartfrz_jax as sfj

DEPTH, WIDTH = 5, 4
_RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(_RNG.standard_normal(shape) / 2, jnp.float32)


def like_params(*axes: int):
    """Arrays like the parameters, with further axes in front."""
    return {
        "stem": normal(*axes, WIDTH, WIDTH),
        "up": normal(*axes, DEPTH, WIDTH, 2 * WIDTH),
        "bias": normal(*axes, DEPTH, 2 * WIDTH),
        "down": normal(*axes, DEPTH, 2 * WIDTH, WIDTH),
        "head": normal(*axes, WIDTH, 3),
    }


def block(x, row):
    up, bias, down = row
    return x + jnp.tanh(x @ up + bias[None]) @ down


def by_scan(params, x):
    rows = params["up"], params["bias"], params["down"]
    x, means = jax.lax.scan(lambda x, row: (block(x, row), x.mean()), x @ params["stem"], rows)
    return x @ params["head"], means


def unrolled(params, x):
    """The same network, of parameters as :func:`rows` makes them."""
    x = x @ params["stem"]
    for i in range(DEPTH):
        x = block(x, [params[f"{name}[{i}]"] for name in ("up", "bias", "down")])
    return x @ params["head"]


def loss(params, x):
    out, _ = by_scan(params, x)
    return jnp.square(out).mean()


def unrolled_loss(params, x):
    return jnp.square(unrolled(params, x)).mean()


def rows(tree):
    """A tree like the parameters with each row for itself."""
    return LAYERS.unstacked(tree)


PARAMS, X = like_params(), normal(32, WIDTH)
LAYERS = sfj.find_layers(PARAMS, lambda params, x: by_scan(params, x)[0], X, rows=True)
BLOCKS = tuple(name for name in LAYERS.names if "/" in name)
# The same layers of parameters that are not stacked.
UNROLLED = sfj.Layers(tuple(sfj.Layer(layer.name, layer.params, layer.kernels) for layer in LAYERS))
SETS = {
    "prefix": ("stem", *BLOCKS[:3]),
    "one trains": tuple(name for name in LAYERS.names if name != BLOCKS[2]),
    "middle": BLOCKS[1:3],
    "every other": BLOCKS[::2],
    "stem alone": ("stem",),
    "last rows": BLOCKS[3:],
    "all blocks": BLOCKS,
}
