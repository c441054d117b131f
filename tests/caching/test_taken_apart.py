"""A model is taken apart once for a batch, in however many parts its activations are computed."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import smartfrz_jax as sfj

pytestmark = pytest.mark.usefixtures("jax_defaults")

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)


def loss(model, x):
    return (model(x) ** 2).mean()


@pytest.mark.slow
def test_once_for_a_batch_and_once_for_all_that_grows(monkeypatch):
    model = nnx.Sequential(*[nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(4)])
    layers = sfj.nnx.find_layers(model, X)
    cache = sfj.nnx.PrefixCache(model, sfj.Frozen(layers, frozenset(layers.names[:1])), loss, X)
    cache.keep(32)
    taken, split = [], nnx.split
    monkeypatch.setattr(nnx, "split", lambda *args: taken.append(args) or split(*args))
    for start in (0, 16):
        cache.fetch(model, np.arange(start, start + 16), X + start)
    assert len(taken) == 2  # not four times, though a quarter is computed at a time
    cache.fetch(model, np.arange(16), X)
    assert len(taken) == 2  # all of it is stored
    whole = cache.activations(model, X)
    np.testing.assert_allclose(cache.fetch(model, np.arange(16), X)[0], whole[0], rtol=1e-6)

    grown = cache.follow(model, sfj.Frozen(layers, frozenset(layers.names[:2])))
    taken.clear()
    (activations,) = grown.fetch(model, np.arange(16), X)
    assert len(taken) == 1
    np.testing.assert_allclose(activations, model.layers[1](model.layers[0](X)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_model_that_has_changed_is_another():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    model.layers.append(nnx.Linear(4, 4, rngs=nnx.Rngs(2)))
    layers = sfj.nnx.find_layers(model, X)
    cache = sfj.nnx.PrefixCache(model, sfj.Frozen(layers, frozenset(layers.names[:1])), loss, X)
    before = cache.activations(model, X)
    model.layers[0].kernel[...] = 2 * model.layers[0].kernel[...]
    np.testing.assert_allclose(cache.activations(model, X)[0], 2 * before[0], rtol=1e-6)
    model.layers[0].dot_general = lambda *args, **kwargs: 0 * jnp.dot(args[0], args[1])
    with pytest.raises(ValueError, match="the model, its mode or the shape of the inputs has changed"):
        cache.activations(model, X)
