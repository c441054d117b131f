"""Every kind of NNX module: our door against the stock one, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from tests.differential.nnx_models import MODELS, QUICK

pytestmark = [
    pytest.mark.usefixtures("jax_defaults"),
    pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning"),
]

TX = optax.sgd(0.1, momentum=0.9)

every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MODELS]
)


def variables(module, *filters):
    """Bits of every variable by path."""
    flat = nnx.to_flat_state(nnx.state(module, *filters))
    return {"/".join(map(str, path)): bits(leaf) for path, leaf in flat}


def bits(leaf):
    leaf = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
    (leaf,) = jax.tree.leaves(leaf)  # what is sown is in a tuple
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def assert_same(actual, expected, what):
    assert actual.keys() == expected.keys(), what
    for name, leaf in expected.items():
        assert actual[name].dtype == leaf.dtype, (what, name)
        np.testing.assert_array_equal(actual[name], leaf, err_msg=f"{what}: {name}")


def loss_fn(model, x, *streams):
    out = model(x, *streams)
    return jnp.square(out).mean(), nnx.pop(model, nnx.Intermediate)


def run(model, loss_fn, value_and_grad, optimizer, case, after=lambda: None):
    """Yields, for each of three steps, the loss, the gradients, what was sown, and then every variable."""
    streams = (nnx.Rngs(3),) if case.streams else ()

    def step(model, optimizer, *args):
        (loss, sown), grads = value_and_grad(optimizer)(loss_fn, has_aux=True)(model, *args)
        optimizer.update(model, grads)
        return loss, sown, grads

    step = nnx.jit(step) if case.compiled else step
    for _ in range(3):
        loss, sown, grads = step(model, optimizer, case.x, *streams)
        after()
        found = {"loss": bits(loss), **{f"sown {name}": leaf for name, leaf in variables(sown).items()}}
        found |= {f"grad {name}": leaf for name, leaf in variables(grads).items()}
        found |= {f"stream {name}": leaf for each in streams for name, leaf in variables(each).items()}
        yield found | variables(model)


def stock_value_and_grad(case):
    return lambda _: functools.partial(nnx.value_and_grad, argnums=nnx.DiffState(0, case.wrt))


def our_value_and_grad(optimizer):
    return optimizer.value_and_grad


@functools.cache
def layers_of(name):
    case = MODELS[name]
    forward = (lambda model, x: model(x, nnx.Rngs(3))) if case.streams else None
    return sfj.nnx.find_layers(case.network(), case.x, wrt=case.wrt, forward=forward)


def ours(name):
    case = MODELS[name]
    model = case.network()
    return model, sfj.nnx.Optimizer(model, TX, wrt=case.wrt, layers=layers_of(name))


@every_model
@pytest.mark.slow
def test_with_nothing_frozen_a_step_is_the_stock_one(name):
    case = MODELS[name]
    model, optimizer = ours(name)
    stock = case.network()
    stock_optimizer = nnx.Optimizer(stock, TX, wrt=case.wrt)
    expected = run(stock, loss_fn, stock_value_and_grad(case), stock_optimizer, case)
    for actual, each in zip(run(model, loss_fn, our_value_and_grad, optimizer, case), expected, strict=True):
        assert_same(actual, each, name)


def is_frozen(case, name):
    return name.startswith(tuple(f"{prefix}/" for prefix in case.frozen))


@every_model
@pytest.mark.slow
def test_a_frozen_layer_holds_still_and_the_others_train_as_with_stop_gradient(name):
    case = MODELS[name]
    model, optimizer = ours(name)
    params = variables(model, case.wrt)
    names = [layer.name for layer in optimizer.frozen.layers if any(is_frozen(case, p) for p in layer.params)]
    optimizer.freeze(model, names)
    assert optimizer.frozen.params == {param for param in params if is_frozen(case, param)}
    start = variables(model)

    stock = case.network()
    held = {
        "/".join(map(str, path)): (variable, variable.get_raw_value())
        for path, variable in nnx.to_flat_state(nnx.state(stock, nnx.Not(nnx.Any(nnx.RngState, nnx.Cache))))
        if is_frozen(case, "/".join(map(str, path))) and isinstance(variable, nnx.Variable)
    }

    def stopped(model, *args):
        for prefix in case.frozen:
            getattr(model, prefix).eval()
        for path, variable in nnx.to_flat_state(nnx.state(model, case.wrt)):
            if is_frozen(case, "/".join(map(str, path))):
                variable.set_raw_value(jax.lax.stop_gradient(variable.get_raw_value()))
        result = loss_fn(model, *args)
        model.train()
        return result

    def put_back():
        for variable, value in held.values():
            variable.set_raw_value(value)

    stock_optimizer = nnx.Optimizer(stock, TX, wrt=case.wrt)
    expected = run(stock, stopped, stock_value_and_grad(case), stock_optimizer, case, put_back)
    for actual, each in zip(run(model, loss_fn, our_value_and_grad, optimizer, case), expected, strict=True):
        assert_same(actual, each, name)
        assert_same({n: actual[n] for n in held}, {n: start[n] for n in held}, name)
