"""The scan over stacked blocks is split: no gradient for frozen rows, and no work for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smartfrz_jax as sfj
from smartfrz_jax.cost.step_program import StepProgram
from smartfrz_jax.freezing.parts.stop_gradient import split_rows
from tests.freezing.stacked.networks import LAYERS, PARAMS, SETS, UNROLLED, X, by_scan, loss, rows, unrolled_loss

pytestmark = pytest.mark.usefixtures("jax_defaults")
frozen_sets = pytest.mark.parametrize("names", SETS.values(), ids=SETS)


def cast(params, x):
    halves = {name: leaf.astype(jnp.bfloat16).astype(jnp.float32) for name, leaf in params.items()}
    return loss(halves, x)


def transposed(params, x):
    """As of ``nn.scan`` with ``variable_axes={"params": 1}``: the rows are not along the first axis."""
    return loss(params | {"up": jnp.swapaxes(jnp.swapaxes(params["up"], 0, 1), 0, 1)}, x)


def with_penalty(params, x):
    return loss(params, x) + 0.1 * sum(jnp.sum(leaf**2) for leaf in params.values())


def with_shared_scale(params, x):
    """Frozen rows are scaled by what trains."""
    return loss(params | {"up": params["up"] * params["head"][0, 0]}, x)


LOSSES = {
    "scan": loss,
    "jit": jax.jit(loss),
    "remat": jax.checkpoint(loss),
    "cast": cast,
    "transposed": transposed,
    "penalty": with_penalty,
    "shared scale": with_shared_scale,
}


@functools.cache
def reference(kind):
    return jax.jit(jax.value_and_grad(LOSSES[kind]))(PARAMS, X)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("names", [SETS["prefix"], pytest.param(SETS["every other"], marks=pytest.mark.slow)])
def test_gradients_of_active_rows_are_those_of_the_whole_scan_and_zero_of_frozen_ones(kind, names):
    frozen = sfj.Frozen(LAYERS, names)
    value, grads = jax.jit(sfj.value_and_grad(LOSSES[kind], frozen))(PARAMS, X)
    whole, of_all = reference(kind)
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    for name, grad in rows(grads).items():
        if name in frozen.params:
            assert not np.any(grad), name
        else:
            np.testing.assert_allclose(grad, rows(of_all)[name], rtol=2e-5, atol=1e-6, err_msg=name)


def flops(loss_fn, params, layers, names):
    """Of the loss and its gradients, loops as often as they run."""
    step = jax.jit(sfj.value_and_grad(loss_fn, sfj.Frozen(layers, names)))
    return StepProgram(jax.make_jaxpr(step)(params, X), "cpu").cost()


@frozen_sets
def test_flops_are_those_of_the_network_unrolled(names):
    assert flops(loss, PARAMS, LAYERS, names) == pytest.approx(
        flops(unrolled_loss, rows(PARAMS), UNROLLED, names), rel=0.02
    )


def equations(depth, frozen):
    """How many equations a step with so many blocks has, and how many of them are of a block."""
    params = PARAMS | {name: jnp.concatenate([PARAMS[name]] * 4)[:depth] for name in ("up", "bias", "down")}
    layers = sfj.find_layers(params, loss, X, rows=True)
    frozen = sfj.Frozen(layers, [name for row, name in enumerate(layers.names[1:-1]) if frozen(row)])
    tx = sfj.freeze(optax.adam(0.1), frozen)

    def step(params, opt_state):
        updates, opt_state = tx.update(sfj.value_and_grad(loss, frozen)(params, X)[1], opt_state, params)
        return sfj.apply_updates(params, updates, frozen), opt_state

    text = str(jax.make_jaxpr(step)(params, jax.eval_shape(tx.init, params)))
    return text.count(" = "), text.count("= tanh")


def test_the_program_of_every_other_row_does_not_grow_with_their_number():
    few = equations(8, lambda row: row % 2)
    assert few == equations(16, lambda row: row % 2)
    assert few[1] <= 4 * equations(8, lambda row: False)[1]


def test_without_split_rows_a_scan_saves_nothing():
    """Else the test above could not fail."""
    whole = flops(unrolled_loss, rows(PARAMS), UNROLLED, ())
    names = SETS["prefix"]
    stopped = jax.jit(jax.value_and_grad(lambda params, x: loss(sfj.Frozen(LAYERS, names).stop_gradient(params), x)))
    assert StepProgram(jax.make_jaxpr(stopped)(PARAMS, X), "cpu").cost() > 0.9 * whole
    assert flops(loss, PARAMS, LAYERS, names) < 0.65 * whole


def test_what_a_scan_returns_for_each_row_is_in_order_and_other_results_are_as_they_were():
    def with_aux(params, x):
        out, means = by_scan(params, x)
        return jnp.square(out).mean(), {"means": means, "count": 3, "name": "scan"}

    frozen = sfj.Frozen(LAYERS, SETS["every other"])
    (_, aux), _ = sfj.value_and_grad(with_aux, frozen, has_aux=True)(PARAMS, X)
    np.testing.assert_allclose(aux["means"], by_scan(PARAMS, X)[1], rtol=1e-5, atol=1e-6)
    assert aux["name"] == "scan"
    assert aux["count"] == 3


@pytest.mark.parametrize("names", [(), tuple(LAYERS.names)], ids=["nothing", "all"])
def test_what_need_not_be_split_is_the_very_function(names):
    assert split_rows(loss, sfj.Frozen(LAYERS, names)) is loss


@pytest.mark.parametrize("frozen", [(4, 3), (4, 2, 0)], ids=["prefix", "by turns"])
def test_a_scan_that_runs_backwards(frozen):
    def backwards(params, x):
        rows_of = params["up"], params["down"]
        body = lambda x, row: (x + jnp.tanh(x @ row[0]) @ row[1], x.sum())  # noqa: E731
        out, sums = jax.lax.scan(body, x, rows_of, reverse=True)
        return jnp.square(out).mean(), sums

    params = {name: PARAMS[name] for name in ("up", "down")}
    layers = sfj.find_layers(params, lambda params, x: backwards(params, x)[0], X, rows=True)
    assert layers.names == tuple(f"up+down/{row}" for row in (4, 3, 2, 1, 0))
    rows, training = list(frozen), [row for row in range(5) if row not in frozen]
    frozen = sfj.Frozen(layers, [f"up+down/{row}" for row in rows])
    (value, sums), grads = sfj.value_and_grad(backwards, frozen, has_aux=True)(params, X)
    (whole, of_all), every = jax.value_and_grad(backwards, has_aux=True)(params, X)
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    np.testing.assert_allclose(sums, of_all, rtol=1e-5, atol=1e-6)
    at = np.array(training)
    np.testing.assert_allclose(grads["up"][at], every["up"][at], rtol=1e-5, atol=1e-6)
    assert not np.any(grads["up"][np.array(rows)])


def test_forward_mode_goes_through():
    frozen = sfj.Frozen(LAYERS, SETS["prefix"])

    def held(params):
        return split_rows(loss, frozen)(frozen.stop_gradient(params), X)

    _, along = jax.jvp(held, (PARAMS,), (PARAMS,))
    grads = jax.grad(held)(PARAMS)
    np.testing.assert_allclose(along, sum(jnp.vdot(grads[name], PARAMS[name]) for name in PARAMS), rtol=1e-4)
