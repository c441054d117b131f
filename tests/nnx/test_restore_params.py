"""Parts of a run's checkpoint in another model, and in a pytree."""

import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.linen import restore_params as into_pytree
from smartfrz_jax.nnx import restore_params
from smartfrz_jax.pytrees import paths

pytestmark = pytest.mark.usefixtures("jax_defaults")
X = np.ones((4, 2), np.float32)


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.linear = nnx.Linear(2, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


class Net(nnx.Module):
    def __init__(self, classes=3, depth=2, width=2, seed=0):
        rngs = nnx.Rngs(seed)
        self.body = nnx.List([Block(width, rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        for block in self.body:
            x = block(x)
        return self.head(x)


def variables(model):
    return {name: np.asarray(leaf) for name, leaf in paths.flatten(nnx.as_pure(nnx.state(model, WEIGHTS))).items()}


WEIGHTS = nnx.Any(nnx.Param, nnx.BatchStat)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint of a run with a frozen layer, and what its model holds."""
    path = tmp_path_factory.mktemp("runs") / "run"
    model = Net(seed=1)
    layers = sfj.nnx.find_layers(model, X)
    optimizer = sfj.nnx.Optimizer(model, optax.adam(0.1), layers=layers)
    optimizer.freeze(model, ["body/0/linear"])
    model.body[1].norm.mean[...] = jnp.full(2, 0.25)
    sfj.nnx.Freezer(model, optimizer, sfj.policies.never()).save(path)
    return path, variables(model)


@pytest.mark.parametrize(
    "select",
    ["body/*", ["body/0/*", re.compile("body/1/.*")], lambda layer: "head" not in layer.name, nnx.PathContains("body")],
    ids=["glob", "several", "predicate", "filter"],
)
def test_a_backbone_without_its_head(saved, select):
    path, weights = saved
    model = Net(classes=5)
    before = variables(model)
    restored = restore_params(path, model, select)
    after = variables(model)
    assert set(restored.names) == {name for name in weights if name.startswith("body/")}
    assert (restored.not_found, restored.left) == ((), ("head/bias", "head/kernel"))
    for name, array in after.items():
        np.testing.assert_array_equal(array, weights[name] if name.startswith("body/") else before[name])
    assert "body/1/norm/mean" in restored.names


def test_all_of_it_whatever_was_frozen_and_without_random_streams(saved):
    path, weights = saved
    model = Net()
    count = int(model.body[0].dropout.rngs.count[...])
    restored = restore_params(path, model)
    assert restored == (tuple(weights), (), ())
    for name, array in variables(model).items():
        np.testing.assert_array_equal(array, weights[name])
    assert int(model.body[0].dropout.rngs.count[...]) == count


def test_what_is_missing_on_either_side_is_an_error_and_left_out_on_request(saved):
    path, _ = saved
    for depth, words in (
        (
            3,
            "lacks 'body/2/linear/bias', 'body/2/linear/kernel', 'body/2/norm/bias' and 3 more, and "
            "params lack nothing; 12 are",
        ),
        (1, "lacks nothing, and params lack 'body/1/linear/bias'"),
    ):
        model = Net(depth=depth)
        before = variables(model)
        with pytest.raises(ValueError, match=rf"^select: .*{words}.*pass strict=False"):
            restore_params(path, model, "body/*")
        restored = restore_params(path, model, "body/*", strict=False)
        assert len(restored.not_found) == 6 * max(0, depth - 2)
        assert [name for name in restored.left if name.startswith("body/")] == [
            name for name in restored.left if name.startswith("body/1/") and depth == 1
        ]
        assert len(restored.names) == 6 * min(depth, 2)
        assert variables(model).keys() == before.keys()


def test_errors_name_the_array_and_nothing_has_changed(saved):
    path, _ = saved
    model = Net(classes=5)
    before = variables(model)
    for select, words in (
        (..., r"^path: .*\['head'\]\['bias'\] is float32\[3\] there, expected float32\[5\] \(2 of"),
        ("haed/*", "^select: got 'haed/\\*', which selects none of the 14 arrays .* such as 'head/"),
        ("body/7/*", "^select: got 'body/7/\\*', which selects none"),
    ):
        with pytest.raises(ValueError, match=words):
            restore_params(path, model, select)
    with pytest.raises(FileNotFoundError, match=r"^path: there is no directory"):
        restore_params(path / "nowhere", model)
    for name, array in variables(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_another_network_is_refused_strict_or_not(saved):
    with pytest.raises(ValueError, match=r"^select: .*lacks 'bias', 'kernel', .* 0 are in both"):
        restore_params(saved[0], nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "*", strict=False)


def test_a_pytree_from_a_module(saved):
    path, weights = saved
    params = nnx.as_pure(nnx.state(Net(classes=5), nnx.Param))
    new, restored = into_pytree(path, params, "body/*/kernel")
    assert restored.names == ("body/0/linear/kernel", "body/1/linear/kernel")
    np.testing.assert_array_equal(new["body"][1]["linear"]["kernel"], weights["body/1/linear/kernel"])
    assert new["head"]["kernel"] is params["head"]["kernel"]


@pytest.mark.parametrize("returning", ["fresh", "kept"])
def test_a_train_state_and_not_what_its_optimizer_calls_alike(tmp_path, returning):
    params = {"a": jnp.ones((2, 2)), "b/c": {"w": jnp.ones((2, 2))}}
    apply_fn = lambda params, x: x @ params["a"] @ params["b/c"]["w"]  # noqa: E731
    layers = sfj.find_layers(params, apply_fn, X)
    state = sfj.linen.TrainState.create(
        apply_fn=apply_fn, params=params, tx=optax.adam(0.1), layers=layers, returning=returning
    )
    sfj.linen.Freezer(state, sfj.policies.never()).save(tmp_path / "run", state)
    zeros = {"a": jnp.zeros((2, 2)), "b/c": {"w": jnp.zeros((2, 2))}}
    new, restored = into_pytree(tmp_path / "run", zeros)
    assert restored == (("a", "b/c/w"), (), ())
    np.testing.assert_array_equal(new["b/c"]["w"], params["b/c"]["w"])
