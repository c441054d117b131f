"""The harm of freezing a network that learns real digits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smartfrz_jax import Frozen, find_layers
from smartfrz_jax.learning.harm import branch_harm, swap_harm
from train import fashion_mnist

NAMES = ("a", "b", "c", "d")
# A network that really trains: four linear maps on images of clothes, 240 steps with cosine annealing.

WIDTHS, BATCH, TOTAL, PERIOD, BRANCH = (784, 32, 32, 32, 10), 64, 240, 24, 120


def classify(params, x):
    *hidden, head = params.values()
    for kernel in hidden:
        x = jax.nn.relu(x @ kernel)
    return x @ head


def cross_entropy(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(classify(params, x), y).mean()


@jax.jit
def train(params, momentum, active, rates, keys, x, y):
    """SGD with momentum of those parameters that are active."""

    def step(carry, rate_and_key):
        params, momentum = carry
        rate, key = rate_and_key
        chosen = jax.random.choice(key, len(x), (BATCH,))
        grads = jax.grad(cross_entropy)(params, x[chosen], y[chosen])
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        params = jax.tree.map(lambda p, m, on: jnp.where(on, p - rate * m, p), params, momentum, active)
        return (params, momentum), None

    return jax.lax.scan(step, (params, momentum), (rates, keys))[0]


@functools.cache
def trained():
    """Layers, snapshots of ``(step, params, momentum)`` by step, the held-out loss and a function that trains on."""
    training, test = fashion_mnist.load()
    x, y = jnp.asarray(training.images[:2000].reshape(2000, -1)), jnp.asarray(training.labels[:2000])
    held_out = jnp.asarray(test.images[:500].reshape(500, -1)), jnp.asarray(test.labels[:500])
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.standard_normal(shape) * np.sqrt(2 / shape[0]), jnp.float32)
        for name, shape in zip(NAMES, itertools.pairwise(WIDTHS), strict=True)
    }
    layers = find_layers(params, classify, x[:2])
    cross_entropy_of = jax.jit(lambda params: cross_entropy(params, *held_out))

    def rate(step):
        return 0.025 * (1 + np.cos(np.pi * step / TOTAL))

    def go_on(snapshot, frozen, rates, seed):
        step, params, momentum = snapshot
        active = {name: jnp.asarray(name not in frozen.names) for name in params}
        keys = jax.random.split(jax.random.key(seed), len(rates))
        return step + len(rates), *train(params, momentum, active, jnp.asarray(rates, jnp.float32), keys, x, y)

    def train_branch(snapshot, frozen):
        rates = rate(snapshot[0]) * (1 - np.arange(BRANCH) / BRANCH)
        return cross_entropy_of(go_on(snapshot, frozen, rates, seed=7)[1])

    snapshots = {0: (0, params, jax.tree.map(jnp.zeros_like, params))}
    for step in range(0, TOTAL, PERIOD):
        rates = rate(np.arange(step, step + PERIOD))
        snapshots[step + PERIOD] = go_on(snapshots[step], Frozen(layers), rates, seed=step)
    return layers, snapshots, cross_entropy_of, train_branch


class TestOnRealData:
    @pytest.mark.slow
    def test_swap_harm_falls_over_time_to_zero(self):
        layers, snapshots, loss, _ = trained()
        params = {step: snapshot[1] for step, snapshot in snapshots.items()}
        assert loss(params[TOTAL]) < 0.6
        steps = np.array(sorted(params))
        harm = swap_harm(layers, steps, params, params[TOTAL], loss, depths=layers.names)
        assert (harm[-1] == 0).all()
        assert (harm[0] > 0.5).all()
        # Not between any two moments: single iterates scatter as long as the learning rate is high.
        assert (np.diff(harm[[0, 1, 2, 8, 9]], axis=0) < 0).all()
        whole = [float(loss(params[step])) - float(loss(params[TOTAL])) for step in steps]
        np.testing.assert_allclose(harm[:, -1], whole, atol=1e-6)

    @pytest.mark.slow
    def test_branch_harm_rises_with_depth_and_falls_over_time(self):
        layers, snapshots, _, train_branch = trained()
        steps = np.array(sorted(snapshots))
        chosen = {step: snapshots[step] for step in (0, 48, 144, 240)}
        harm = branch_harm(layers, steps, chosen, train_branch, depths=layers.names)
        assert (np.diff(harm[0]) > 0.05).all(), "from scratch, each layer more that stays random costs more"
        front = harm[np.isin(steps, list(chosen)), :3]
        assert (np.diff(front, axis=0) < 0).all()
        np.testing.assert_allclose(front[-1], 0, atol=1e-6)
