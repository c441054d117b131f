"""Was saved what was predicted? Every mistake is made for real, in a small step, and told by its cause."""

import functools
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import smartfrz_jax as sfj
from smartfrz_jax.cost.check import SavingCheck, SavingWarning, check_saving
from tests.cost.measured_steps import (
    ADAM,
    LAYERS,
    PARAMS,
    account,
    check,
    every_grad,
    frozen_set,
    loss_fn,
    measured,
    program,
    shared_program,
    trained,
    unfrozen,
)

pytestmark = [pytest.mark.usefixtures("jax_defaults"), pytest.mark.slow]


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcd", "c", "ac"])
def test_the_right_way_is_not_reported(names):
    assert check_saving(account(), unfrozen(), shared_program(names), notable=0.5) is None


def more_work(frozen):
    """A step that does as much again beside the account's."""
    step, opt_state = trained(frozen)

    def doing_more(params, opt_state, x, y):
        return step(params, opt_state, x, y), jnp.sin(x) @ jnp.ones((24, 1000)) @ jnp.ones((1000, 1))

    return doing_more, opt_state


def test_work_that_the_account_does_not_know_is_left_out():
    before, after = (program(names, make=more_work) for names in ("", "ab"))
    assert after.cost.flops > 2 * unfrozen().cost.flops
    assert check_saving(account(), before, after, notable=0.5) is None


def test_an_account_of_another_batch():
    costs = sfj.account(PARAMS, LAYERS, loss_fn, jnp.ones((256, 24)), jnp.zeros(256, jnp.int32), tx=ADAM)
    assert check_saving(costs, unfrozen(), shared_program("ab"), notable=0.5) is None
    assert (
        check_saving(costs, unfrozen(), shared_program("ab", grads_of=every_grad, log=optax.tree.norm)).cause == "norm"
    )


# Norms and clips.


def test_a_norm_of_all_gradients():
    finding = check(shared_program("ab", grads_of=every_grad, log=optax.tree.norm))
    assert finding.cause == "norm"
    assert "logged" in finding.message
    assert check_saving(account(), unfrozen(), program("ab", log=optax.tree.norm)) is None


def test_norms_of_each_layer():
    def norms(grads):
        return {name: jnp.abs(leaf["kernel"]).sum() for name, leaf in grads.items()}

    assert check(program("ab", grads_of=every_grad, log=norms)).cause == "norm"
    assert check_saving(account(), unfrozen(), program("ab", log=norms)) is None


@pytest.mark.parametrize(
    "outside",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.apply_if_finite(tx, 5),
    ],
    ids=["clip", "finite"],
)
def test_a_clip_before_the_partition(outside):
    frozen = frozen_set("ab")
    finding = check(program("ab", grads_of=every_grad, tx=outside(sfj.freeze(ADAM, frozen))))
    assert finding.cause == "norm"
    assert "clip" in finding.message
    inside = program("ab", tx=sfj.freeze(outside(ADAM), frozen))
    assert check_saving(account(), unfrozen(), inside) is None


def test_gradients_that_nothing_reads_are_not_reported():
    """``multi_transform`` alone saves, by dead-code elimination."""
    assert check_saving(account(), unfrozen(), program("ab", grads_of=every_grad)) is None


# Scanned stacks.

DEPTH = 4
STACK = {f"block{i}": jnp.eye(32) for i in range(DEPTH)}


def scanned(params, x, groups=((0, 4),)):
    for start, end in groups:
        stacked = jnp.stack([params[f"block{i}"] for i in range(start, end)])
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stacked)
    return jnp.square(x).mean()


def scanned_program(layers, n, groups=((0, 4),), tx=ADAM):
    frozen = sfj.Frozen(layers, frozenset(layers.names[:n]))
    partition = sfj.freeze(tx, frozen)

    def step(params, opt_state, x):
        loss, grads = sfj.value_and_grad(functools.partial(scanned, groups=groups), frozen)(params, x)
        updates, opt_state = partition.update(grads, opt_state, params)
        return sfj.apply_updates(params, updates, frozen), opt_state, loss

    return measured(frozen, step, STACK, jax.eval_shape(partition.init, STACK), X32)


X32 = jnp.ones((64, 32))


def test_a_scan_over_frozen_and_active_blocks():
    layers = sfj.find_layers(STACK, scanned, X32)
    costs = sfj.account(STACK, layers, scanned, X32, tx=ADAM)
    before = scanned_program(layers, 0)
    finding = check_saving(costs, before, scanned_program(layers, 2))
    assert finding.cause == "scan"
    assert finding.layers == ("block0", "block1")
    assert check_saving(costs, before, scanned_program(layers, 2, groups=((0, 2), (2, 4)))) is None
    assert check_saving(costs, before, scanned_program(layers, 4)) is None
    assert check_saving(costs, before._replace(jaxpr=None), scanned_program(layers, 2)) is None, "cannot be compared"


# Layers behind active ones.


def test_frozen_layers_behind_active_ones():
    finding = check_saving(account(), unfrozen(), shared_program("bc"), notable=0.1)
    assert finding.cause == "behind"
    assert finding.layers == ("b", "c")
    assert "'a' before them train" in finding.message
    costs = account()
    saved, added = costs.saving(frozen_set("abc"), frozen_set("bc")), -costs.saving(frozen_set(""), frozen_set("bc"))
    assert f"{saved:.1%} cheaper" in finding.message
    assert f"{added:.1%} more expensive" in finding.message
    assert check_saving(account(), unfrozen(), shared_program("bc"), notable=0.5) is None
    assert check_saving(account(), unfrozen(), shared_program("ab"), notable=0.01) is None


# No cause.


def test_a_cause_that_is_not_known():
    def largest(grads):
        return jax.lax.top_k(jnp.concatenate([leaf["kernel"].ravel() for leaf in grads.values()]), 5)

    finding = check(program("ab", grads_of=every_grad, log=largest))
    assert finding.cause == "unknown"
    assert "could not be told" in finding.message


def test_without_a_jaxpr():
    after = shared_program("ab", grads_of=every_grad, log=optax.tree.norm)._replace(jaxpr=None)
    finding = check(after)
    assert finding.cause == "unknown"
    assert "pass the jaxpr" in finding.message


def test_without_a_jaxpr_what_the_account_may_be_off_by_is_not_reported():
    after = shared_program("d", grads_of=every_grad, log=optax.tree.norm)
    assert 0.01 < account().saving(frozen_set("d")) < 0.05
    assert check(after).cause == "norm"
    assert check_saving(account(), unfrozen(), after._replace(jaxpr=None), notable=0.5) is None


def test_nothing_is_asked_of_layers_that_return():
    assert check_saving(account(), shared_program("ab"), shared_program("a")) is None


def test_layers_that_change_places_while_a_counter_comes():
    before, after = shared_program("bcd"), shared_program("acd")
    counter, moments = 12, 8 * (32 * 32 + 32)  # of a dropout that is on; of b, beside those of a
    costs = [after.cost._replace(argument_bytes=after.cost.argument_bytes + counter)]
    costs.append(after.cost._replace(argument_bytes=before.cost.argument_bytes + moments))
    found = [check_saving(account(), before, after._replace(cost=cost), notable=1.0) for cost in costs]
    assert found[0] is None
    assert found[1].cause == "optimizer"


def test_a_frozen_set_of_another_network():
    other = sfj.Frozen(sfj.find_layers(STACK, scanned, X32))
    with pytest.raises(ValueError, match="frozen: got a set of a network of 4 layers"):
        check_saving(account(), unfrozen()._replace(frozen=other), unfrozen())


# Warnings.


def test_each_cause_is_warned_of_once():
    check_next = SavingCheck(account(), notable=0.1)
    assert check_next(unfrozen()) is None
    wrong = program("a", grads_of=every_grad, log=optax.tree.norm)
    with pytest.warns(SavingWarning, match="Cure") as caught:
        assert check_next(wrong).cause == "norm"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_next(shared_program("ab", grads_of=every_grad, log=optax.tree.norm)).cause == "norm"
        assert check_next(shared_program("a")) is None
    with pytest.warns(SavingWarning, match="'b', 'c' save less than they could"):
        check_next(shared_program("bc"))
    assert [finding.cause for finding in check_next.findings] == ["norm", "behind"]
