"""Layers are a hashable sequence that checks names; what cannot be layers is refused."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax import Layer, find_layers
from tests.layers.networks import LINEAR, ROW, linear


def test_layers_are_a_sequence_equal_and_hashable_by_value():
    layers, same = find_layers(LINEAR, linear, ROW), find_layers(LINEAR, linear, ROW)
    assert layers == same
    assert hash(layers) == hash(same)
    assert len({layers, same}) == 1
    other = find_layers(LINEAR, lambda p, x: x @ p["a"]["kernel"], ROW)
    assert layers != other
    assert layers != layers.entries
    assert len(layers) == 3
    assert [layer.name for layer in layers] == list(layers.names)
    assert layers[-1] == Layer("a", ("a/kernel",), ("a/kernel",))
    assert layers[:2] == layers.entries[:2]
    assert layers.head == "a"
    with pytest.raises(dataclasses.FrozenInstanceError):
        layers.entries = ()


def test_layers_hash_anew_where_they_are_unpickled():
    layers = find_layers(LINEAR, linear, ROW)
    hash(layers), layers.names, layers.owner  # all of it is cached
    copy = pickle.loads(pickle.dumps(layers))
    assert vars(copy) == {"entries": layers.entries}
    assert copy == layers
    assert hash(copy) == hash(layers)


def test_equal_layers_do_not_recompile():
    traces = []

    @jax.tree_util.Partial
    def count(x, layers):
        traces.append(layers)
        return x

    jitted = jax.jit(count, static_argnums=1)
    for _ in range(3):
        jitted(1.0, find_layers(LINEAR, linear, ROW))
    assert len(traces) == 1


def test_check_orders_names_and_suggests():
    layers = find_layers(
        {"encoder": {"conv1": {"w": jnp.eye(2)}, "conv2": {"w": jnp.eye(2)}}, "decoder": {"w": jnp.eye(2)}},
        lambda p, x: x @ p["encoder"]["conv2"]["w"] @ p["encoder"]["conv1"]["w"] @ p["decoder"]["w"],
        ROW,
    )
    assert layers.check(["decoder", "encoder/conv2", "decoder"], "names") == ("encoder/conv2", "decoder")
    assert layers.check("decoder", "names") == ("decoder",)
    assert layers.check((), "names") == ()
    with pytest.raises(
        ValueError, match=r"keep: no layer is called 'encoder/conv3'; did you mean 'encoder/conv[12]' or"
    ):
        layers.check(["encoder/conv3"], "keep")
    with pytest.raises(ValueError, match=r"keep: no layer is called '@@@'; did you mean 'encoder/conv2'.*3 layers"):
        layers.check(["@@@"], "keep")


def test_empty_pytree():
    with pytest.raises(ValueError, match=r"params: got a pytree without leaves .*variables\['params'\]"):
        find_layers({}, lambda p, x: x, ROW)


@pytest.mark.parametrize("params", [jnp.eye(2), {"": jnp.eye(2)}])
def test_an_array_without_a_name(params):
    with pytest.raises(ValueError, match=r"params: got float32\[2, 2\] without a name, .*; put it in a dict"):
        find_layers(params, lambda p, x: x @ jax.tree.leaves(p)[0], ROW)


@pytest.mark.parametrize("leaf", ["relu", 3, 0.5])
def test_leaf_that_is_no_array(leaf):
    with pytest.raises(TypeError, match=r"params: leaf 'b' is (str|int|float), expected an array"):
        find_layers({"a": jnp.ones(2), "b": leaf}, lambda p, x: x, ROW)


@pytest.mark.parametrize("leaf", [jnp.arange(2), jnp.ones(2, bool), jax.random.key(0)], ids=["int", "bool", "key"])
def test_leaf_that_cannot_be_differentiated(leaf):
    with pytest.raises(TypeError, match=r"params: leaf 'b' is .*expected floating-point numbers.*make it an input"):
        find_layers({"a": jnp.ones(2), "b": leaf}, lambda p, x: x, ROW)


def test_numpy_and_abstract_parameters():
    concrete = jax.tree.map(np.asarray, LINEAR)
    abstract = jax.eval_shape(lambda: LINEAR)
    assert find_layers(concrete, linear, ROW) == find_layers(abstract, linear, ROW) == find_layers(LINEAR, linear, ROW)
