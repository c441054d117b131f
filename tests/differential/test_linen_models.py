"""Every kind of Linen module: our door against the stock one, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths
from tests.differential.linen_models import MODELS, QUICK

pytestmark = pytest.mark.usefixtures("jax_defaults")

TX = optax.sgd(0.1, momentum=0.9)

every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MODELS]
)


def bits(tree):
    return {name: np.asarray(leaf) for name, leaf in paths.flatten(tree).items()}


def assert_same(actual, expected, what):
    assert actual.keys() == expected.keys(), what
    for name, leaf in expected.items():
        assert actual[name].dtype == leaf.dtype, (what, name)
        np.testing.assert_array_equal(actual[name], leaf, err_msg=f"{what}: {name}")


@functools.cache
def start(name):
    """A network, its variables, and its layers."""
    case = MODELS[name]
    net = case.network()
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = dict(jax.jit(net.init)(rngs, case.x))
    variables.pop("intermediates", None)
    return net, variables, sfj.linen.find_layers(net, variables, case.x)


def stock(name):
    net, others, _ = start(name)
    others = dict(others)
    return net, train_state.TrainState.create(apply_fn=net.apply, params=others.pop("params"), tx=TX), others


def ours(name):
    net, others, layers = start(name)
    others = dict(others)
    params = others.pop("params")
    return net, sfj.linen.TrainState.create(apply_fn=net.apply, params=params, tx=TX, layers=layers), others


def run(
    net, state, others, value_and_grad, case, *, train=True, hold=lambda params: params, put_back=lambda others: others
):
    """Yields, for each of three steps, the loss, the gradients, and then every variable."""

    def loss_fn(params, others, key):
        variables, mutable = {"params": hold(params), **others}, [*others, "intermediates"]
        out, updates = net.apply(variables, case.x, train, mutable=mutable, rngs={"dropout": key})
        return jnp.square(out).mean(), updates

    @jax.jit
    def step(state, others, key):
        (loss, others), grads = value_and_grad(loss_fn, has_aux=True)(state.params, others, key)
        sown = others.pop("intermediates", {})
        others = put_back(others)
        state = state.apply_gradients(grads=grads)
        return state, others, {"loss": loss, "grads": grads, "sown": sown}

    for key in jax.random.split(jax.random.key(2), 3):
        state, others, found = step(state, others, key)
        yield bits({"params": state.params, "others": others, **found})


@every_model
@pytest.mark.slow
def test_with_nothing_frozen_a_step_is_the_stock_one(name):
    case = MODELS[name]
    net, state, others = ours(name)
    expected = run(*stock(name), jax.value_and_grad, case)
    for actual, each in zip(run(net, state, others, state.value_and_grad, case), expected, strict=True):
        assert_same(actual, each, name)


@every_model
@pytest.mark.slow
def test_a_frozen_layer_holds_still_and_the_others_train_as_with_stop_gradient(name):
    case = MODELS[name]

    def is_frozen(name):
        return name.startswith(tuple(f"{prefix}/" for prefix in case.frozen))

    net, state, others = ours(name)
    names = [layer.name for layer in state.frozen.layers if any(map(is_frozen, layer.params))]
    state = state.freeze(names)
    assert state.frozen.params == set(filter(is_frozen, paths.flatten(state.params)))

    stock_net, stock_state, stock_others = stock(name)

    def hold(params):
        return paths.tree_map(lambda name, leaf: jax.lax.stop_gradient(leaf) if is_frozen(name) else leaf, params)

    def put_back(others):
        """State of the frozen layers, but for caches."""
        held = {name: stock_others[name] for name in others if name not in ("cache", "perturbations")}
        return others | {
            collection: paths.tree_map(lambda name, new, old: old if is_frozen(name) else new, others[collection], old)
            for collection, old in held.items()
        }

    expected = run(
        stock_net, stock_state, stock_others, jax.value_and_grad, case, train=False, hold=hold, put_back=put_back
    )
    before = {name: leaf for name, leaf in bits(state.params).items() if is_frozen(name)}
    for actual, each in zip(run(net, state, others, state.value_and_grad, case), expected, strict=True):
        assert_same(actual, each, name)
        assert_same({param: actual[f"params/{param}"] for param in before}, before, name)
