"""Patterns of Flax's toy examples in NNX, at toy size: one function makes one run."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tests.clients.doors import NnxRun

IMAGES = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
LABELS = jnp.array([0, 2, 1, 2])


class Loss(nnx.Variable):
    pass


class Encoder(nnx.Module):
    """Leaves its share of the loss in a variable."""

    def __init__(self, rngs):
        self.linear1 = nnx.Linear(64, 16, rngs=rngs)
        self.linear_mean = nnx.Linear(16, 4, rngs=rngs)
        self.linear_std = nnx.Linear(16, 4, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x):
        x = jax.nn.relu(self.linear1(x))
        mean, std = self.linear_mean(x), jnp.exp(self.linear_std(x))
        self.kl_loss = Loss(jnp.mean(0.5 * jnp.mean(-jnp.log(std**2) - 1.0 + std**2 + mean**2, axis=-1)))
        return mean + std * jax.random.normal(self.rngs.noise(), mean.shape)


class Vae(nnx.Module):
    def __init__(self, rngs):
        self.encoder = Encoder(rngs)
        self.decoder = nnx.Sequential(nnx.Linear(4, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 64, rngs=rngs))

    def __call__(self, x):
        return self.decoder(self.encoder(x.reshape(x.shape[0], -1)))


def vae(door):
    """Variables that the forward pass makes are popped in the loss."""
    model = Vae(nnx.Rngs(0, noise=1))
    optimizer = door.optimizer(model, optax.adam(1e-3), IMAGES[:1])

    def train_step(model, optimizer, x):
        def loss_fn(model):
            logits = model(x)
            kl_loss = sum(jax.tree.leaves(nnx.pop(model, Loss)), 0.0)
            return optax.sigmoid_binary_cross_entropy(logits, x.reshape(logits.shape)).mean() + 0.1 * kl_loss

        loss, grads = door.grads_of(optimizer, loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    modules = {"model": model, "optimizer": optimizer}
    return NnxRun(door.jit(train_step, model), modules, (IMAGES > 0.5,), {("model", "optimizer"): ("encoder/linear1",)})


class ScannedBlock(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.gelu(self.norm(self.linear(x))))


class Scanned(nnx.Module):
    """Blocks made by ``nnx.vmap`` and run by ``nnx.scan``, as in the toy examples."""

    def __init__(self, blocks, *, rngs):
        self.stem = nnx.Linear(64, 8, rngs=rngs)

        @nnx.split_rngs(splits=blocks)
        @nnx.vmap(axis_size=blocks)
        def make(rngs):
            return ScannedBlock(rngs)

        self.blocks = make(rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan
        def run(x, block):
            return block(x), None

        x, _ = run(self.stem(x.reshape(len(x), -1)), self.blocks)
        return self.head(x)


def scan_over_layers(door):
    """Parameters, BatchNorms and random streams are stacked."""
    model = Scanned(3, rngs=nnx.Rngs(0, dropout=1))
    optimizer = door.optimizer(model, optax.adam(1e-2), IMAGES)

    def train_step(model, optimizer, images, labels):
        def loss_fn(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

        loss, grads = door.grads_of(optimizer, loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    modules = {"model": model, "optimizer": optimizer}
    return NnxRun(door.jit(train_step, model), modules, (IMAGES, LABELS), {("model", "optimizer"): ("stem",)})


EXAMPLES = (vae, scan_over_layers)
