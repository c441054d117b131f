"""The same loop with freezing: the lines that differ from ``nnx_stock`` are the front door."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import smartfrz_jax as sfj


class CNN(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 8, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(8, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(16, rngs=rngs)
        self.linear1 = nnx.Linear(784, 64, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.linear2 = nnx.Linear(64, 10, rngs=rngs)
        self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))

    def __call__(self, x):
        x = self.avg_pool(nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x)))))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.dropout2(self.linear1(x)))
        return self.linear2(x)


def train(images: jax.Array, labels: jax.Array, epochs: int, batch_size: int, policy):
    model = CNN(rngs=nnx.Rngs(0))
    optimizer = sfj.nnx.Optimizer(model, optax.adamw(0.005, 0.9), layers=sfj.nnx.find_layers(model, images[:1]))
    freezer = sfj.nnx.Freezer(model, optimizer, policy)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    def loss_fn(model: CNN, batch):
        logits = model(batch["image"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits=logits, labels=batch["label"]).mean()
        return loss, logits

    @nnx.jit
    def train_step(model: CNN, optimizer: nnx.Optimizer, metrics: nnx.MultiMetric, batch):
        grad_fn = optimizer.value_and_grad(loss_fn, has_aux=True)
        (loss, logits), grads = grad_fn(model, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])
        optimizer.update(model, grads)

    history = []
    model.train()
    for _ in range(epochs):
        for start in range(0, len(labels) - batch_size + 1, batch_size):
            batch = {
                "image": jnp.asarray(images[start : start + batch_size]),
                "label": jnp.asarray(labels[start : start + batch_size]),
            }
            train_step(model, optimizer, metrics, batch)
            freezer.step()
        history.append({name: float(value) for name, value in metrics.compute().items()})
        metrics.reset()
    return model, optimizer, history
