"""A stock Flax Linen loop, after the MNIST example of Flax: a CNN, TrainState, SGD with momentum."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(features=8, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.Conv(features=16, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.Dense(features=64)(x)
        x = nn.relu(x)
        return nn.Dense(features=10)(x)


def create_train_state(rng, learning_rate, momentum):
    cnn = CNN()
    params = cnn.init(rng, jnp.ones([1, 28, 28, 1]))["params"]
    tx = optax.sgd(learning_rate, momentum)
    return train_state.TrainState.create(
        apply_fn=cnn.apply,
        params=params,
        tx=tx,
    )


@jax.jit
def train_step(state, images, labels):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits=logits, labels=labels).mean()
        return loss, logits

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, logits), grads = grad_fn(state.params)
    accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
    return state.apply_gradients(grads=grads), loss, accuracy


def train(images: jax.Array, labels: jax.Array, epochs: int, batch_size: int):
    state = create_train_state(jax.random.key(0), 0.05, 0.9)
    history = []
    for _ in range(epochs):
        losses = []
        for start in range(0, len(labels) - batch_size + 1, batch_size):
            batch = slice(start, start + batch_size)
            state, loss, accuracy = train_step(state, images[batch], labels[batch])
            losses.append((float(loss), float(accuracy)))
        means = jnp.array(losses).mean(0)
        history.append({"loss": float(means[0]), "accuracy": float(means[1])})
    return state, history
