"""The frozen set as a value: equal, hashable, and what it refuses."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smartfrz_jax import Frozen, find_layers
from smartfrz_jax.freezing import transform as freezing
from tests.freezing.mlp import LAYERS, NAMES, PARAMS, X, loss, mlp


def test_frozen_is_equal_and_hashable_by_value():
    frozen, same = Frozen(LAYERS, frozenset("ab")), Frozen(find_layers(PARAMS, mlp, X), frozenset("ba"))
    assert frozen == same
    assert hash(frozen) == hash(same)
    assert len({frozen, same, Frozen(LAYERS), Frozen(LAYERS, frozenset("a"))}) == 3
    assert frozen != frozenset("ab")
    other_order = find_layers(PARAMS, lambda p, x: x @ p["d"]["kernel"] @ p["a"]["kernel"], X)
    assert Frozen(other_order, frozenset("ab")) != frozen


def test_frozen_hashes_anew_where_it_is_unpickled():
    frozen = Frozen(LAYERS, frozenset("ab"))
    vars(frozen)["_hash"] = vars(frozen.layers)["_hash"] = 0  # as strings hash in another process
    try:
        copy = pickle.loads(pickle.dumps(frozen))
        same = Frozen(find_layers(PARAMS, mlp, X), frozenset("ab"))
        assert copy == same
        assert hash(copy) == hash(same)
    finally:
        del vars(frozen.layers)["_hash"]


def test_frozen_views():
    frozen = Frozen(LAYERS, frozenset("ca"))
    assert frozen.names == {"a", "c"}
    assert frozen.active == ("b", "d")
    assert frozen.mask.dtype == bool
    assert frozen.mask.tolist() == [True, False, True, False]
    assert Frozen.of_mask(LAYERS, frozen.mask) == frozen
    assert Frozen.of_mask(LAYERS, np.zeros(4, bool)) == Frozen(LAYERS)
    assert frozen.params == {"a/kernel", "a/bias", "c/kernel", "c/bias"}
    assert frozen.add(["d"]).names == {"a", "c", "d"}
    assert frozen.add([]) == frozen
    assert frozen.names == {"a", "c"}
    assert set(frozen.active_leaves(PARAMS)) == {"b/kernel", "b/bias", "d/kernel", "d/bias"}
    labels = frozen.labels(PARAMS)
    assert jax.tree.structure(labels) == jax.tree.structure(PARAMS)
    assert [labels[name]["kernel"] for name in NAMES] == ["frozen", "train", "frozen", "train"]


def test_names_of_a_single_layer():
    layers = find_layers({"conv": {"kernel": jnp.eye(4)}}, lambda p, x: x @ p["conv"]["kernel"], X)
    assert Frozen(layers).add("conv").names == {"conv"}


def test_frozen_validates():
    with pytest.raises(ValueError, match=r"names: no layer is called 'e'; did you mean"):
        Frozen(LAYERS, frozenset("ae"))
    with pytest.raises(TypeError, match=r"names: got int 0 among them, expected names of layers"):
        Frozen(LAYERS, frozenset({0, "a"}))
    with pytest.raises(ValueError, match=r"names: no layer is called 'a/kernel'; did you mean 'a'"):
        Frozen(LAYERS).add(["a/kernel"])
    for mask in (np.ones(3, bool), np.ones((4, 1), bool), np.array(True)):
        with pytest.raises(ValueError, match=r"mask: got shape .* expected \(4,\)"):
            Frozen.of_mask(LAYERS, mask)


def test_parameters_of_no_layer_are_refused():
    frozen = Frozen(LAYERS, frozenset("a"))
    more = PARAMS | {"lora": {"kernel": jnp.eye(4)}}
    for call in (
        frozen.labels,
        frozen.stop_gradient,
        frozen.active_leaves,
        freezing.freeze(optax.sgd(0.1), frozen).init,
        lambda params: freezing.value_and_grad(loss, frozen)(params, X),
    ):
        with pytest.raises(ValueError, match=r"params: 'lora/kernel' belongs to no layer.*find_layers"):
            call(more)
