from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from hypothesis import given
from hypothesis import strategies as st

from smartfrz_jax.pytrees import paths

KEYS = st.text("abcxyz019_.-", min_size=1, max_size=4)
TREES = st.recursive(
    st.integers(),
    lambda inner: st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=12,
)


@given(TREES)
def test_every_leaf_has_a_name_of_its_own_in_the_order_of_the_pytree(tree):
    named = paths.flatten(tree)
    assert list(named.values()) == jax.tree.leaves(tree)
    assert list(named) == jax.tree.leaves(paths.tree_map(lambda name, _: name, tree))


def test_names_join_keys_indices_and_attributes():
    class Module(struct.PyTreeNode):
        kernel: Any

    tree = {"blocks": [{"conv1": Module(1)}, (2, 3)], "head": 4}
    assert paths.flatten(tree) == {"blocks/0/conv1/kernel": 1, "blocks/1/0": 2, "blocks/1/1": 3, "head": 4}


def test_root_leaf_and_empty_tree():
    assert paths.flatten(7) == {"": 7}
    assert paths.flatten({}) == {}


def test_value_is_left_out_below_a_name_alone():
    class Module(struct.PyTreeNode):
        value: Any

    assert paths.flatten(Module(1)) == {"value": 1}
    assert paths.flatten({"a": Module(1)}) == {"a": 1}


def test_nnx_state_pure_state_and_dict_have_the_same_names():
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(11)])

    state = nnx.state(Net(nnx.Rngs(0)))
    names = set(paths.flatten(state))
    assert names == {f"blocks/{i}/{leaf}" for i in range(11) for leaf in ("kernel", "bias")}
    assert set(paths.flatten(nnx.as_pure(state))) == names
    assert set(paths.flatten(nnx.to_pure_dict(state))) == names


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"tree: two leaves are called 'a/b'.*'/' inside a key"):
        paths.flatten({"a": {"b": 1}, "a/b": 2})


def test_tree_map_takes_several_trees_and_keeps_the_structure():
    first, second = {"a": [jnp.ones(2)], "b": jnp.zeros(3)}, {"a": [1], "b": 2}
    result = paths.tree_map(lambda name, x, y: (name, x.shape, y), first, second)
    assert result == {"a": [("a/0", (2,), 1)], "b": ("b", (3,), 2)}
    with pytest.raises(ValueError, match=r"(?i)mismatch|structure|key"):
        paths.tree_map(lambda name, x, y: x, first, {"a": [1]})


def test_names_of_key_paths_that_were_written_down():
    tree = {"a": [np.ones(1), (np.ones(1),)], "it's": {'"': np.ones(1), "\\'\"": np.ones(1)}, "b/c": {1: np.ones(1)}}
    tree["state"] = optax.adam(0.1).init({"w": jnp.ones(1)})
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        assert paths.of_keystr(jax.tree_util.keystr(path)) == paths.name(path)
