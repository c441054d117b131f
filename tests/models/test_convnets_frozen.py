"""The convolutional networks freeze: layers hold still, features are those of the layers, every policy decides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from models.layers.batch_norm import BatchNorm
from tests.models.convnets import TINY, every_tiny, normalisation_of, random_model, variables


@every_tiny
@pytest.mark.slow
def test_frozen_layers_are_held_and_the_others_train(make):
    model = random_model(make, num_classes=3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    layers = sfj.nnx.find_layers(model, x)
    assert set().union(*(layer.state for layer in layers)) == set(variables(model, nnx.BatchStat, nnx.RngState))
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))

    @nnx.jit
    def train_step(model, optimizer, x):
        _, grads = optimizer.value_and_grad(lambda model, x: jnp.square(model(x) - 1).mean())(model, x)
        optimizer.update(model, grads)

    third = len(layers) // 3
    # At the front, and behind layers that train.
    frozen = (layers.names[0], *layers.names[third + 1 : 2 * third + 1])
    optimizer = sfj.nnx.Optimizer(model, tx, wrt=nnx.Param, layers=layers)
    optimizer.freeze(model, list(frozen))
    before = jax.device_get(as_data(model))
    for _ in range(2):
        train_step(model, optimizer, x)
    after = jax.device_get(as_data(model))
    for layer in layers:
        for name in (*layer.params, *layer.state):
            if layer.name in frozen:
                np.testing.assert_array_equal(after[name], before[name], name)
            elif not name.endswith("rngs/key"):
                assert (after[name] != before[name]).any(), name


def as_data(model):
    leaves = variables(model, ...)
    return {name: jax.random.key_data(leaf) if name.endswith("key") else leaf for name, leaf in leaves.items()}


@every_tiny
@pytest.mark.slow
def test_features_are_the_outputs_of_the_normalisations(make):
    model = random_model(make, num_classes=3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    layers = sfj.nnx.find_layers(model, x)
    taps = sfj.nnx.features(model, layers, x)
    outputs = taps(model, x)
    assert tuple(outputs) == layers.names
    recorded = outputs_of_norms(model, x)
    for layer in layers:
        norm = normalisation_of(layer.name)
        if norm in recorded:
            np.testing.assert_allclose(outputs[layer.name], recorded.pop(norm), rtol=1e-4, atol=1e-5)
    assert not recorded


@pytest.mark.slow
def test_every_policy_decides():
    """For one network, as they see nothing of it but its layers, and the features, which are alike."""
    model = random_model(TINY["mobilenetv2"], num_classes=3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    layers = sfj.nnx.find_layers(model, x)
    taps = sfj.nnx.features(model, layers, x)
    outputs = taps(model, x)
    predictor = sfj.Predictor(
        sfj.predictor.PredictorConfig(size=16, hidden=8, features=4, head_hidden=4), rngs=nnx.Rngs(0)
    )
    predictor.classifier.layers[2].bias[...] = jnp.array([0.0, 100.0])  # always confident that a layer can be frozen
    policies = {
        "never": sfj.policies.never(),
        "linear": sfj.policies.freezeout(total_steps=6, t0=0.5),
        "autofreeze": sfj.policies.autofreeze(2),
        "similarity_guided": sfj.policies.similarity_guided(outputs, 2, window=2, tolerance=0.1),
        "smartfrz": sfj.policies.smartfrz(
            predictor, total_steps=6, schedule=sfj.policies.Schedule(record_every=1, evaluate_every=3, window=2)
        ),
        "static_prefix": sfj.policies.static_prefix([(0.5, 0.8)], total_steps=6),
        "random": sfj.policies.random(0.4, total_steps=6),
    }
    for name, policy in policies.items():
        optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param, layers=layers)
        freezer = sfj.nnx.Freezer(model, optimizer, policy, features=lambda model: taps(model, x))
        for step in range(1, 7):
            if optimizer.keep_grads:
                for param, grad in optimizer.grads.items():  # those of front layers change least
                    grad[...] = jnp.full_like(grad[...], 1 + layers.names.index(layers.owner[param]) / step)
            optimizer.step[...] += 1
            freezer.step(loss=jnp.float32(1))
        assert bool(freezer.frozen.names) == (name != "never"), name
        assert layers.head not in freezer.frozen.names


def outputs_of_norms(model, x):
    """Outputs of the BatchNorms on the way through the network in evaluation mode, by module."""
    graphdef, state = nnx.split(model)

    class Recording(BatchNorm):
        def __call__(self, x, use_running_average=None):
            recorded[names[id(self)]] = super().__call__(x, use_running_average)
            return recorded[names[id(self)]]

    def run(state, x):
        module = nnx.merge(graphdef, state, copy=True)
        module.eval()
        for path, inner in nnx.iter_modules(module):
            if isinstance(inner, BatchNorm):
                names[id(inner)] = "/".join(map(str, path))
                inner.__class__ = Recording
        module(x)
        return recorded

    names, recorded = {}, {}
    return dict(jax.jit(run)(state, x))
