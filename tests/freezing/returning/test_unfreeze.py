"""Layers that the user lets train again, beside what a policy decides and what is frozen by hand."""

import jax
import numpy as np
import optax
import pytest

import smartfrz_jax as sfj
from smartfrz_jax import FreezeEvent, Frozen
from tests.freezing.test_freezer import PARAMS, Linen, apply_fn, both, decided

pytestmark = pytest.mark.usefixtures("jax_defaults")


def advance(run, steps):
    for _ in range(steps):
        run.step()


@both
def test_layers_that_were_unfrozen_freeze_when_the_policy_names_them_anew(door):
    run = door(decided({1: ("a", "b"), 3: ("b",), 4: ("a", "b")}))
    run.step()
    run.unfreeze("a")
    assert run.frozen.names == {"b"}
    advance(run, 1)
    assert run.frozen.names == {"b"}
    advance(run, 2)  # at 3 it lets go of the layer, at 4 it decides anew
    assert run.frozen.names == {"a", "b"}
    assert run.freezer.events == [FreezeEvent(1, ("a", "b")), FreezeEvent(1, (), ("a",)), FreezeEvent(4, ("a",))]


@both
def test_without_names_the_last_freeze_is_taken_back_and_then_the_one_before(door):
    run = door(decided({1: ("a",), 2: ("a", "b")}), before=["c"])
    advance(run, 2)
    run.unfreeze()
    assert run.frozen.names == {"a", "c"}
    run.unfreeze()
    assert run.frozen.names == {"c"}
    with pytest.raises(
        ValueError, match=r"names: got none, and nothing .* is frozen now \(c from its start\), expected"
    ):
        run.unfreeze()
    advance(run, 1)
    assert run.frozen.names == {"c"}


@both
def test_what_was_frozen_by_hand_can_be_unfrozen_and_is_the_policys_from_then_on(door):
    run = door(decided({3: ("c",)}), before=["c"])
    run.step()
    run.unfreeze("c")
    advance(run, 1)
    assert run.frozen.names == set()
    run.step()
    assert run.frozen.names == {"c"}
    run.unfreeze("c")
    run.freeze(["c"])
    run.step()
    assert run.frozen.names == {"c"}


@both
def test_a_pending_decision_goes_on_without_what_was_unfrozen(door):
    run = door(decided({1: ("a", "b")}), lead=2)
    run.step()
    run.unfreeze("b")
    assert run.freezer.pending == (3, Frozen(run.frozen.layers, frozenset("a")))
    advance(run, 2)
    assert run.frozen.names == {"a"}
    run = door(decided({1: ("a", "b")}), lead=2)
    run.step()
    run.unfreeze("*")
    assert run.freezer.pending is None
    advance(run, 3)
    assert run.freezer.events == []


@both
def test_unknown_layers_change_nothing(door):
    run = door(decided({1: ("a",)}))
    run.step()
    with pytest.raises(ValueError, match="names: no layer is called 'd'"):
        run.unfreeze(["d"])
    assert run.frozen.names == run.freezer.frozen.names == {"a"}


@both
@pytest.mark.slow
def test_a_checkpoint_knows_what_was_unfrozen(door, tmp_path):
    policy = {1: ("a", "b")}
    run = door(decided(policy))
    run.step()
    run.unfreeze("a")
    run.save(tmp_path / "run")
    again = door(decided(policy))
    again.restore(tmp_path / "run")
    again.step()
    assert again.frozen.names == {"b"}


def test_the_optimizer_goes_on_with_what_it_kept():
    state = Linen(decided()).state
    state = sfj.linen.TrainState.create(
        apply_fn=apply_fn, params=PARAMS, tx=optax.adam(0.1), layers=state.frozen.layers, returning="kept"
    )
    grads = jax.tree.map(np.ones_like, PARAMS)
    freezer = sfj.linen.Freezer(state, decided({1: ("a",)}))
    trained = state.apply_gradients(grads=grads)
    back = freezer.unfreeze(freezer.step(trained))
    jax.tree.map(np.testing.assert_array_equal, back.opt_state, trained.opt_state)
