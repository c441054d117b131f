"""DeiT and BERT freeze: their features are those of the layers, every policy decides."""

import functools
from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from tests.models.transformers import IDS, IMAGES, MASK, call, evaluated, lively, tiny_bert, tiny_deit

TINY = {
    "deit": (partial(tiny_deit, drop_path=0.2, scan=True), (IMAGES,)),
    "bert": (partial(tiny_bert, scan=False), (IDS, MASK)),
}


@functools.cache
def with_features(network):
    """A network, its layers, the function for its features, and these."""
    make, inputs = TINY[network]
    model = lively(make)
    layers = sfj.nnx.find_layers(model, *inputs)
    features = sfj.nnx.features(model, layers, *inputs)
    return model, layers, features, features(model, *inputs)


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize("network", TINY)
def test_the_last_of_the_features_are_the_logits(network):
    model, layers, _, outputs = with_features(network)
    logits = call(evaluated(nnx.clone(model)), *TINY[network][1])
    np.testing.assert_allclose(outputs[layers.head], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_every_policy_freezes_them():
    """One of them: policies see nothing of a network but its layers, and their features, which are alike."""
    _, inputs = TINY["deit"]
    model, layers, features, outputs = with_features("deit")
    predictor = sfj.Predictor(sfj.predictor.PredictorConfig(size=8), rngs=nnx.Rngs(3))
    predictor.classifier.layers[2].bias[...] = jnp.array([0.0, 100.0])
    policies = [
        sfj.policies.never(),
        sfj.freezeout(total_steps=4),
        sfj.autofreeze(2),
        sfj.static_prefix([(0.5, 1.0)], total_steps=4),
        sfj.policies.random(0.5, total_steps=4),
        sfj.smartfrz(
            predictor, schedule=sfj.policies.Schedule(record_every=1, evaluate_every=2, window=2, min_records=2)
        ),
        sfj.policies.similarity_guided(outputs, evaluate_every=2, window=2, tolerance=0.9),
    ]
    for policy in policies:
        optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=layers)
        freezer = sfj.nnx.Freezer(model, optimizer, policy, features=lambda model: features(model, *inputs))
        for step in range(4):
            for name, grad in optimizer.grads.items():  # the further back, the more they change
                grad[...] = jnp.full_like(grad[...], 1 + step * layers.names.index(layers.owner[name]))
            optimizer.step[...] += 1
            freezer.step(loss=jnp.float32(1))
        assert bool(optimizer.frozen.names) == (policy is not policies[0]), policy
