"""Patterns of Flax's NNX examples whose loss changes more than the model, at toy size: one function makes one run."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tests.clients.doors import NnxRun

IMAGES = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
LABELS = jnp.array([0, 2, 1, 2])


class Cnn(nnx.Module):
    """Of the MNIST tutorial: dropouts get their random stream with the call."""

    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(1, 4, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025)
        self.conv2 = nnx.Conv(4, 6, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(6, rngs=rngs)
        self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(24, 8, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.025)
        self.linear2 = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = self.avg_pool(nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x), rngs=rngs))))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        x = nnx.relu(self.dropout2(self.linear1(x.reshape(x.shape[0], -1)), rngs=rngs))
        return self.linear2(x)


def mnist(door):
    """The tutorial's loss takes the random streams as an argument, its step the metrics."""
    model = Cnn(rngs=nnx.Rngs(0))
    optimizer = door.optimizer(
        model, optax.adamw(0.005, 0.9), IMAGES[:1], forward=lambda model, x: model(x, nnx.Rngs(0))
    )
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    def loss_fn(model, rngs, batch):
        logits = model(batch["image"], rngs)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, logits

    def train_step(model, optimizer, metrics, rngs, batch):
        grad_fn = door.grads_of(optimizer, loss_fn, has_aux=True)
        (loss, logits), grads = grad_fn(model, rngs, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])
        optimizer.update(model, grads)
        return loss

    modules = {"model": model, "optimizer": optimizer, "metrics": metrics, "rngs": nnx.Rngs(dropout=1)}
    batch = ({"image": IMAGES, "label": LABELS},)
    return NnxRun(door.jit(train_step, model), modules, batch, {("model", "optimizer"): ("conv1", "conv2")})


def gan(door):
    """Two networks with an optimizer each; either loss runs the other's network, and BatchNorms of both change.

    What the other optimizer has frozen must hold still in this loss too, so both frozen sets go into it.
    """
    rngs = nnx.Rngs(0)
    generator = nnx.Sequential(
        nnx.Linear(5, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs), nnx.relu, nnx.Linear(16, 64, rngs=rngs), nnx.tanh
    )
    discriminator = nnx.Sequential(
        nnx.Linear(64, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs), nnx.leaky_relu, nnx.Linear(16, 1, rngs=rngs)
    )
    g_optimizer = door.optimizer(generator, optax.adam(1e-3, b1=0.5), jnp.ones((1, 5)))
    d_optimizer = door.optimizer(discriminator, optax.adam(1e-3, b1=0.5), jnp.ones((1, 64)))
    bce = optax.sigmoid_binary_cross_entropy

    def d_loss(discriminator, generator, real, noise):
        fake = discriminator(generator(noise))
        true = discriminator(real)
        return bce(true, jnp.ones_like(true)).mean() + bce(fake, jnp.zeros_like(fake)).mean()

    def g_loss(generator, discriminator, noise):
        fake = discriminator(generator(noise))
        return bce(fake, jnp.ones_like(fake)).mean()

    def train_step(generator, discriminator, g_optimizer, d_optimizer, rngs, real):
        noise = jax.random.normal(rngs.noise(), (len(real), 5))
        of_both = door.loss_of(g_optimizer, d_loss, argnum=1)
        loss_d, grads = door.grads_of(d_optimizer, of_both)(discriminator, generator, real, noise)
        d_optimizer.update(discriminator, grads)
        of_both = door.loss_of(d_optimizer, g_loss, argnum=1)
        loss_g, grads = door.grads_of(g_optimizer, of_both)(generator, discriminator, noise)
        g_optimizer.update(generator, grads)
        return loss_d + loss_g

    modules = {
        "generator": generator,
        "discriminator": discriminator,
        "g_optimizer": g_optimizer,
        "d_optimizer": d_optimizer,
        "rngs": nnx.Rngs(noise=3),
    }
    frozen = {("discriminator", "d_optimizer"): ("layers/0",), ("generator", "g_optimizer"): ("layers/0",)}
    return NnxRun(door.jit(train_step, generator), modules, (IMAGES.reshape(4, 64),), frozen)


EXAMPLES = (mnist, gan)
