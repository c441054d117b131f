"""A network with statistics and dropout, and its training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths


class Block(nnx.Module):
    """Attributes set in an order that is not the forward order, nor is the alphabetical one."""

    def __init__(self, width, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.plain_norm = nnx.BatchNorm(width, use_scale=False, use_bias=False, rngs=rngs)
        self.a_second = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.b_first = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.plain_norm(self.b_first(x)))
        return x + nnx.relu(self.dropout(self.norm(self.a_second(y))))


class Net(nnx.Module):
    def __init__(self, rngs, blocks=2, width=4):
        self.head = nnx.Linear(width, 3, rngs=rngs)
        self.stem = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.stem_norm = nnx.BatchNorm(width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(blocks)])

    def __call__(self, x):
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


X = jax.random.normal(jax.random.key(0), (8, 6, 6, 1))
Y = jax.random.normal(jax.random.key(1), (8, 3))
# One object for all tests: another one would be another program.
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))


def loss_fn(model, x, y):
    out = model(x)
    return jnp.square(out - y).mean(), out


@nnx.jit
def train_step(model, optimizer, x, y):
    (loss, _), grads = optimizer.value_and_grad(loss_fn, has_aux=True)(model, x, y)
    optimizer.update(model, grads)
    return loss, optax.tree.norm(grads)


def make(optimizer_tx=None):
    model = Net(nnx.Rngs(0))
    layers = sfj.nnx.find_layers(model, X)
    return model, sfj.nnx.Optimizer(model, optimizer_tx or TX, layers=layers)


def arrays(module):
    """Every variable by path, random keys as their bits."""
    return {
        name: np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for name, leaf in paths.flatten(nnx.as_pure(nnx.state(module))).items()
    }
