"""The frozen set in functions that differentiate other than the front doors' own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import dynamic_scale

import smartfrz_jax as sfj

pytestmark = pytest.mark.usefixtures("jax_defaults")

X = jax.random.normal(jax.random.key(0), (4, 4))
TX = optax.sgd(0.1)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(4, name="first")(x))
        return nn.Dense(1, name="second")(nn.relu(x))


def linen():
    """A loss of parameters, and a state whose first layer is frozen."""
    net = LinenNet()
    variables = net.init(jax.random.key(0), X)
    params, statistics = variables["params"], {"batch_stats": variables["batch_stats"]}
    layers = sfj.linen.find_layers(net, variables, X)

    def loss_fn(params):
        out, updates = net.apply({"params": params, **statistics}, X, mutable=["batch_stats"])
        return jnp.square(out).mean(), updates

    state = sfj.linen.TrainState.create(apply_fn=net.apply, params=params, tx=TX, layers=layers)
    return loss_fn, state.freeze(["first"]), statistics


def scaled(loss_fn, params):
    scale = dynamic_scale.DynamicScale(scale=jnp.float32(8.0))
    _, is_finite, (loss, aux), grads = scale.value_and_grad(loss_fn, has_aux=True)(params)
    assert is_finite
    return loss, aux, grads


def pulled_back(loss_fn, params):
    loss, pullback, aux = jax.vjp(loss_fn, params, has_aux=True)
    return loss, aux, pullback(jnp.ones_like(loss))[0]


def of_jax(loss_fn, params):
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return loss, aux, grads


@pytest.mark.parametrize("differentiate", [scaled, pulled_back, of_jax])
@pytest.mark.slow
def test_in_linen_any_function_that_differentiates_leaves_frozen_layers_out(differentiate):
    loss_fn, state, statistics = linen()
    (loss, _), grads = state.value_and_grad(loss_fn, has_aux=True)(state.params)
    other_loss, updates, other_grads = differentiate(state.with_frozen(loss_fn), state.params)
    np.testing.assert_array_equal(other_loss, loss)
    jax.tree.map(np.testing.assert_array_equal, other_grads, grads)  # a scale that is a power of two rounds nothing
    jax.tree.map(np.testing.assert_array_equal, updates, statistics)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((grads["first"], grads["norm"])))
    assert np.any(grads["second"]["kernel"])


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.second = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


def loss_fn(model):
    return jnp.square(model(X)).mean(), nnx.as_pure(nnx.state(model, nnx.BatchStat))


def frozen():
    model = Net()
    optimizer = sfj.nnx.Optimizer(model, TX, layers=sfj.nnx.find_layers(model, X))
    optimizer.freeze(model, ["first"])
    return model, optimizer


@pytest.mark.parametrize("differentiate", [scaled, pulled_back, of_jax])
def test_in_nnx_any_function_that_differentiates_leaves_frozen_layers_out(differentiate):
    model, optimizer = frozen()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, statistics = nnx.as_pure(params), nnx.as_pure(rest)

    def of_params(params):
        return optimizer.with_frozen(loss_fn)(nnx.merge(graphdef, params, rest, copy=True))

    loss, updates, grads = differentiate(of_params, params)
    (expected, _), model_grads = optimizer.value_and_grad(loss_fn, has_aux=True)(model)
    np.testing.assert_array_equal(loss, expected)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(grads), nnx.to_pure_dict(model_grads))
    jax.tree.map(np.testing.assert_array_equal, updates, statistics)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((grads["first"], grads["norm"])))
    assert np.any(grads["second"]["kernel"])


def test_the_model_may_be_any_of_the_arguments():
    model, optimizer = frozen()
    loss = optimizer.with_frozen(lambda x, model: jnp.square(model(x)).mean(), argnum=1)
    grads = nnx.grad(loss, argnums=1)(X, model)
    assert not np.any(grads["first"]["kernel"][...])
    assert np.any(grads["second"]["kernel"][...])


def test_afterwards_the_model_is_as_before_whatever_happens():
    model, optimizer = frozen()
    before = nnx.as_pure(nnx.state(model))

    def failing(model):
        assert model.norm.use_running_average
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.with_frozen(failing)(model)
    assert not model.norm.use_running_average
    jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(nnx.state(model)), before)


def test_what_a_loss_writes_to_frozen_parameters_is_taken_back_and_to_others_not():
    model, optimizer = frozen()
    before = nnx.to_pure_dict(nnx.state(model))

    def writing(model):
        for layer in (model.first, model.second):
            layer.kernel[...] = 2 * layer.kernel[...]
        return model(X).mean()

    optimizer.value_and_grad(writing)(model)
    np.testing.assert_array_equal(model.first.kernel[...], before["first"]["kernel"])
    np.testing.assert_array_equal(model.second.kernel[...], 2 * before["second"]["kernel"])
