"""The optimizer's own state, for optax's functions that read it, and for code that sets a hyperparameter by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax import apply_updates, linen, migrate_opt_state
from tests.optimizers.network import GRADS, LAYERS, PARAMS, arrays, frozen, loss

pytestmark = pytest.mark.usefixtures("jax_defaults")


def make(tx, **options):
    return linen.TrainState.create(apply_fn=None, params=PARAMS, tx=tx, layers=LAYERS, **options)


def advance(state, grads):
    for grad in grads:
        state = state.apply_gradients(grads=grad)
    return state


@pytest.mark.parametrize("returning", ["fresh", "kept"])
def test_schedule_free_evaluates_with_the_weights_of_frozen_layers(returning):
    tx = optax.contrib.schedule_free_sgd(0.1)
    state = advance(make(tx, returning=returning), GRADS[:2])
    stock_params, stock = PARAMS, tx.init(PARAMS)
    for grads in GRADS[:2]:
        updates, stock = tx.update(grads, stock, stock_params)
        stock_params = optax.apply_updates(stock_params, updates)
    expected = optax.contrib.schedule_free_eval_params(stock, stock_params)
    got = optax.contrib.schedule_free_eval_params(state.unfrozen_opt_state, state.params)
    assert arrays(got) == arrays(expected)
    state = state.freeze(["b"])
    got = optax.contrib.schedule_free_eval_params(state.unfrozen_opt_state, state.params)
    for name in "ac":
        assert arrays(got[name]) == arrays(expected[name])
    for leaf, weights in zip(jax.tree.leaves(got["b"]), jax.tree.leaves(state.params["b"]), strict=True):
        np.testing.assert_allclose(leaf, weights, rtol=1e-6)


def test_schedule_free_of_an_nnx_model():
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(1)))
    layers = sfj.nnx.find_layers(model, jnp.ones((1, 2)))
    optimizer = sfj.nnx.Optimizer(model, optax.contrib.schedule_free_sgd(0.1), layers=layers)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    optimizer.freeze(model, ["layers/0"])
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    got = optax.contrib.schedule_free_eval_params(optimizer.unfrozen_opt_state(model), params)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    np.testing.assert_allclose(got["layers"][0]["kernel"], params["layers"][0]["kernel"], rtol=1e-6)
    z = optimizer.unfrozen_opt_state(model).z["layers"][1]["kernel"]
    expected = (params["layers"][1]["kernel"] - (1 - 0.9) * z) / 0.9
    np.testing.assert_allclose(got["layers"][1]["kernel"], expected, rtol=1e-6)


INJECTED = optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.1)


def test_optax_finds_and_sets_what_it_finds_in_its_own_state():
    state = advance(make(INJECTED).freeze(["b"]), GRADS[:1])
    assert optax.tree.get(state.opt_state, "learning_rate") == jnp.float32(0.1)
    state = state.replace(opt_state=optax.tree.set(state.opt_state, learning_rate=jnp.float32(0.02)))
    assert state.unfrozen_opt_state.hyperparams["learning_rate"] == jnp.float32(0.02)
    assert int(state.unfrozen_opt_state.count) == 1
    assert [int(count) for _, count in optax.tree.get_all_with_path(state.opt_state, "count")] == [1, 1]


@pytest.mark.parametrize("then", [frozen(), frozen("a", "b")], ids=["returns", "freezes"])
def test_a_hyperparameter_set_by_hand_is_kept_when_the_frozen_set_changes(then):
    state = advance(make(INJECTED).freeze(["b"]), GRADS[:1])
    own = state.unfrozen_opt_state
    own.hyperparams["learning_rate"] = jnp.float32(0.0)
    state = state.replace(opt_state=migrate_opt_state(own, INJECTED, state.params, state.frozen)).freeze(then)
    moved = advance(state, GRADS[1:2])
    assert arrays(moved.params) == arrays(state.params)
    assert moved.unfrozen_opt_state.hyperparams["learning_rate"] == 0


@pytest.mark.slow
def test_the_own_state_goes_back_where_it_came_from():
    """Nothing is lost on the way but what frozen layers do not have anyway."""
    for tx in (INJECTED, optax.MultiSteps(optax.adam(0.1), 4), optax.contrib.prodigy()):
        state = advance(make(tx).freeze(["b"]), GRADS[:2])
        own = state.unfrozen_opt_state
        assert jax.tree.structure(own) == jax.tree.structure(tx.init(PARAMS))
        assert arrays(migrate_opt_state(own, tx, state.params, state.frozen)) == arrays(state.opt_state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5, store_grad=True)),
        optax.lbfgs(memory_size=2),
    ],
    ids=["backtracking", "lbfgs"],
)
def test_value_and_grad_from_state(tx):
    """With the own state: the value and gradient of the line search are used again, zero for frozen layers."""
    calls = []

    @jax.jit
    def step(state):
        def held(params):
            calls.append(None)
            return loss(state.frozen.stop_gradient(params))

        value, grads = optax.value_and_grad_from_state(held)(state.params, state=state.unfrozen_opt_state)
        updates, opt_state = state.tx.update(
            grads, state.opt_state, state.params, value=value, grad=grads, value_fn=held
        )
        params = apply_updates(state.params, updates, state.frozen)
        return state.replace(params=params, opt_state=opt_state), value, grads

    state = make(tx).freeze(["b"])
    for _ in range(3):
        before = state
        state, value, grads = step(before)
        expected, expected_grads = jax.value_and_grad(loss)(before.params)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for name in "ac":
            for got, leaf in zip(jax.tree.leaves(grads[name]), jax.tree.leaves(expected_grads[name]), strict=True):
                np.testing.assert_allclose(got, leaf, rtol=1e-4, atol=1e-7)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["b"]))
        assert arrays(state.params["b"]) == arrays(PARAMS["b"])
    assert loss(state.params) < loss(PARAMS)
    # What the line search found goes on when a layer returns, and is as wrong for that layer as it was: not used.
    assert np.isfinite(optax.tree.get(state.opt_state, "value"))
