"""Savings that did not come: masks, zeros and optimizers that read the gradients of frozen layers."""

import jax
import jax.numpy as jnp
import optax
import pytest

import smartfrz_jax as sfj
from smartfrz_jax.cost.check import check_saving
from tests.cost.measured_steps import ADAM, PARAMS, account, check, every_grad, frozen_set, loss_fn, program, unfrozen

pytestmark = [pytest.mark.usefixtures("jax_defaults"), pytest.mark.slow]


def whole_tree(_, tx, grads_of=every_grad):
    """The usual loop, without a frozen set."""

    def step(params, opt_state, x, y, *args):
        loss, grads = grads_of(params, x, y, *args)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step, jax.eval_shape(tx.init, PARAMS)


# Masks.

BOOLS = {name: name in "ab" for name in "abcd"}


def masked_by_bools(params, x, y, mask):
    loss, grads = every_grad(params, x, y)
    return loss, {n: jax.tree.map(lambda g, n=n: jnp.where(mask[n], 0, g), grads[n]) for n in grads}


def masked_by_numbers(params, x, y, mask):
    loss, grads = every_grad(params, x, y)
    return loss, {n: jax.tree.map(lambda g, n=n: g * mask[n], grads[n]) for n in grads}


def masked_by_vector(params, x, y, mask):
    loss, grads = every_grad(params, x, y)
    return loss, {n: jax.tree.map(lambda g, i=i: g * mask[i], grads[n]) for i, n in enumerate(grads)}


def masked_by_stage(params, x, y, stage):
    loss, grads = every_grad(params, x, y)
    return loss, {n: jax.tree.map(lambda g, i=i: jnp.where(i < stage, 0, g), grads[n]) for i, n in enumerate(grads)}


def masked_before(params, x, y, mask):
    def loss(params):
        stopped = {
            n: jax.tree.map(lambda p, n=n: jnp.where(mask[n], jax.lax.stop_gradient(p), p), params[n]) for n in params
        }
        return loss_fn(stopped, x, y)

    return jax.value_and_grad(loss)(params)


def masked_by_cond(params, x, y, mask):
    loss, grads = every_grad(params, x, y)
    return loss, {
        n: jax.lax.cond(mask[n], lambda g: jax.tree.map(jnp.zeros_like, g), lambda g: g, grads[n]) for n in grads
    }


@pytest.mark.parametrize("tx", [optax.sgd(0.1), ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize(
    ("grads_of", "mask"),
    [
        (masked_by_bools, BOOLS),
        (masked_by_vector, jnp.array([0.0, 0.0, 1.0, 1.0])),
        (masked_by_stage, 2),
        (masked_before, BOOLS),
        (masked_by_cond, BOOLS),
        (masked_by_numbers, {name: float(name not in "ab") for name in "abcd"}),
    ],
)
def test_a_mask_that_is_known_only_when_the_step_runs(grads_of, mask, tx):
    finding = check(program("ab", make=whole_tree, tx=tx, grads_of=grads_of, extra=(mask,)))
    assert finding.cause == "mask"
    assert "static" in finding.message


def test_a_mask_of_whole_arrays():
    def grads_of(params, x, y, mask):
        loss, grads = every_grad(params, x, y)
        return loss, jax.tree.map(jnp.multiply, grads, mask)

    mask = jax.tree.map(jnp.ones_like, PARAMS)
    assert check(program("ab", make=whole_tree, tx=ADAM, grads_of=grads_of, extra=(mask,))).cause == "mask"


def test_gradients_times_zero():
    partition = optax.multi_transform({"train": ADAM, "frozen": optax.scale(0.0)}, frozen_set("ab").labels)
    assert check(program("ab", make=whole_tree, tx=partition)).cause == "mask"


# Gradients and update apart.


def test_gradients_jitted_apart():
    after = program("ab", grads_of=every_grad, returned=lambda grads: grads)
    finding = check(after)
    assert finding.cause == "apart"
    assert "returns the gradients" in finding.message
    right = program("ab", returned=frozen_set("ab").active_leaves)
    assert check_saving(account(), unfrozen(), right) is None


def test_the_update_jitted_apart():
    def update(frozen):
        tx = sfj.freeze(ADAM, frozen)
        state = jax.eval_shape(tx.init, PARAMS)
        return lambda grads, state, x, y: tx.update(grads, state), state

    before, after = (program(names, make=update) for names in ("", "ab"))
    finding = check_saving(account(), before, after)
    assert finding.cause == "apart"
    assert "Predicted: " in finding.message
    assert "the update alone" in finding.message


# The optimizer.


def test_an_optimizer_that_reads_frozen_gradients():
    mask = {name: name in "ab" for name in "abcd"}
    finding = check(program("ab", make=whole_tree, tx=optax.chain(ADAM, optax.freeze(mask))))
    assert finding.cause == "optimizer"
    assert "smartfrz_jax.freeze(tx, frozen)" in finding.message


@pytest.mark.parametrize(
    "tx",
    [
        optax.inject_hyperparams(optax.adamw)(1e-3),
        optax.sgd(optax.cosine_decay_schedule(0.1, 100), momentum=0.9),
        optax.MultiSteps(ADAM, 2),
        optax.adafactor(1e-3),
    ],
    ids=["inject_hyperparams", "schedule", "MultiSteps", "adafactor"],
)
def test_rates_and_counters_are_not_taken_for_masks(tx):
    """What freezes here is nothing at all."""
    assert check(program("ab", make=whole_tree, tx=tx)).cause == "optimizer"


def test_optimizer_state_of_frozen_layers():
    finding = check(program("ab", tx=ADAM))
    assert finding.cause == "optimizer"
    assert f"Predicted: {4 * 2 * (24 * 32 + 32 + 32 * 32 + 32):,} bytes less" in finding.message
    assert "measured: 0 bytes" in finding.message
