"""Gradients that are accumulated over several steps, and layers that freeze or return amid them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smartfrz_jax import freeze, linen, migrate_opt_state
from tests.optimizers.network import LAYERS, PARAMS, arrays, frozen, normal

pytestmark = pytest.mark.usefixtures("jax_defaults")


@jax.jit
def step(state, value):
    return state.apply_gradients(grads=jax.tree.map(lambda leaf: jnp.full_like(leaf, value), state.params))


def steps(state, values):
    """One step for each number: the gradient of every parameter."""
    for value in values:
        state = step(state, jnp.float32(value))
    return state


def moved(before, after):
    return float(before.params["b"]["kernel"][0, 0] - after.params["b"]["kernel"][0, 0])


def make(tx, returning="fresh"):
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    return linen.TrainState.create(apply_fn=None, params=params, tx=tx, layers=LAYERS, returning=returning)


MULTI_STEPS = optax.MultiSteps(optax.sgd(1.0), 4)


@pytest.mark.slow
@pytest.mark.parametrize("returning", ["fresh", "kept"])
@pytest.mark.parametrize("tx", [MULTI_STEPS, MULTI_STEPS.gradient_transformation()], ids=["object", "transformation"])
def test_a_layer_that_returns_amid_a_window_takes_the_average_of_its_own_gradients(tx, returning):
    state = steps(make(tx, returning), [-1.0, -1.0]).freeze(["b"])
    state = steps(state, 40 * [1.0]).freeze(frozen())
    end = steps(state, [1.0, 1.0])
    assert moved(state, end) == pytest.approx(1.0)
    assert moved(end, steps(end, 4 * [0.5])) == pytest.approx(0.5)  # whole windows are as ever


@pytest.mark.slow
@pytest.mark.parametrize("returns_at", [0, 1, 2, 3])
def test_the_average_is_over_the_steps_since_the_return(returns_at):
    """With gradients that differ; adam for an update that is not linear in them."""
    tx = optax.MultiSteps(optax.adam(1.0), 4)
    grads = [0.3, -2.0, 0.7, 1.1]
    state = steps(make(tx).freeze(["b"]), grads[:returns_at]).freeze(frozen())
    end = steps(state, grads[returns_at:])
    own = optax.MultiSteps(optax.adam(1.0), 4 - returns_at)
    alone = steps(make(own), grads[returns_at:])
    np.testing.assert_allclose(end.params["b"]["kernel"], alone.params["b"]["kernel"], rtol=1e-6)
    means = end.unfrozen_opt_state.inner_opt_state[0].mu["b"]["kernel"]
    np.testing.assert_allclose(means, 0.1 * np.mean(grads[returns_at:]), rtol=1e-5)


@pytest.mark.slow
def test_two_layers_that_return_at_different_steps_of_a_window():
    state = steps(make(MULTI_STEPS).freeze(["a", "b"]), [5.0])
    state = steps(state.freeze(frozen("b")), [5.0])
    end = steps(state.freeze(frozen()), [1.0, 2.0])
    assert float(-end.params["a"]["bias"][0]) == pytest.approx((5 + 1 + 2) / 3)
    assert float(-end.params["b"]["bias"][0]) == pytest.approx((1 + 2) / 2)
    assert float(-end.params["c"]["bias"][0]) == pytest.approx((5 + 5 + 1 + 2) / 4)


@pytest.mark.slow
def test_skipped_steps_do_not_count():
    tx = optax.MultiSteps(optax.sgd(1.0), 4, should_skip_update_fn=optax.skip_not_finite)
    state = steps(make(tx).freeze(["b"]), [1.0, jnp.nan, 1.0]).freeze(frozen())
    end = steps(state, [jnp.inf, 2.0, jnp.nan, 4.0])
    assert moved(state, end) == pytest.approx(3.0)


SUMS = {
    "apply_every": optax.chain(optax.sgd(1.0), optax.apply_every(4)),
    "MultiSteps": optax.MultiSteps(optax.sgd(1.0), 4, use_grad_mean=False),
    "in a chain": optax.chain(optax.scale(4.0), optax.MultiSteps(optax.sgd(1.0), 4).gradient_transformation()),
}


@pytest.mark.parametrize("returning", ["fresh", "kept"])
@pytest.mark.parametrize("tx", SUMS.values(), ids=SUMS.keys())
def test_where_gradients_are_summed_each_counts_once_and_none_of_before(tx, returning):
    state = steps(make(tx, returning), [-1.0, -1.0]).freeze(["b"])
    state = steps(state, 40 * [1.0]).freeze(frozen())
    assert moved(state, steps(state, [1.0, 0.5])) == pytest.approx(1.5)


@pytest.mark.slow
def test_without_a_return_amid_a_window_every_bit_is_that_of_optax():
    """Also in bfloat16, and compiled."""
    tx = optax.MultiSteps(optax.adamw(0.1), 2, accumulator_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    ours = freeze(tx, frozen())
    state, expected = ours.init(params), tx.init(params)
    update = jax.jit(lambda tx, *args: tx.update(*args), static_argnums=0)
    for _ in range(3):
        grads = jax.tree.map(lambda leaf: normal(*leaf.shape).astype(jnp.bfloat16), params)
        updates, state = update(ours, grads, state, params)
        stock, expected = jax.jit(tx.update)(grads, expected, params)
        assert arrays(updates) == arrays(stock)
    assert arrays(expected).items() <= arrays(state.inner_states["train"].inner_state.inner_state).items()


def test_the_return_can_be_compiled():
    """What the number of missed steps is copied from may be a tracer."""
    state = steps(make(MULTI_STEPS).freeze(["b"]), [1.0])
    migrated = jax.jit(functools.partial(migrate_opt_state, tx=MULTI_STEPS, frozen=frozen()))(
        state.opt_state, params=state.params
    )
    missed = migrated.inner_states["train"].inner_state.missed
    assert [int(missed[name]["bias"]) for name in "abc"] == [0, 1, 0]
