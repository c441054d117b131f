"""Outputs of layers, taken from the forward pass of any function."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax.layers.outputs import layer_outputs
from smartfrz_jax.pytrees import paths
from tests.layers.small_functions import SQUARE, X, plain
from tests.support.rounding import assert_close


def normal(*shape: int) -> jax.Array:
    """The same for every call, so that no test depends on which ran before it."""
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), jnp.float32)


class Net(nn.Module):
    """A convolutional network whose names sort wrongly, with a residual branch."""

    train: bool
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(self, x):
        def norm(name, x):
            return nn.BatchNorm(use_running_average=not self.train, dtype=self.dtype, name=name)(x)

        x = nn.relu(norm("z_bn", nn.Conv(4, (3, 3), dtype=self.dtype, name="z_stem")(x)))
        y = nn.Conv(4, (3, 3), dtype=self.dtype, name="m_conv")(x)
        shortcut = nn.Conv(4, (1, 1), dtype=self.dtype, name="b_short")(x)
        x = nn.relu(norm("m_bn", y) + norm("b_bn", shortcut))
        x = nn.LayerNorm(dtype=self.dtype, name="y_ln")(
            x[:, 2, 3]
        )  # not the mean, whose channels are so alike that the normalisation amplifies rounding
        return nn.Dense(3, dtype=self.dtype, name="a_head")(x)


MODULES = ("z_stem", "z_bn", "m_conv", "m_bn", "b_short", "b_bn", "y_ln", "a_head")


def linen_case(train: bool, dtype=jnp.float32):
    net = Net(train, jnp.dtype(dtype))
    x = normal(4, 6, 6, 2)
    variables = net.init(jax.random.key(0), x)
    stats = jax.tree.map(lambda leaf: leaf + 0.3, variables["batch_stats"])
    params = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])

    def forward(params, x):
        mutable = ["batch_stats"] if train else False
        return net.apply({"params": params, "batch_stats": stats}, x, mutable=mutable)

    _, captured = net.apply(
        {"params": params, "batch_stats": stats},
        x,
        mutable=["intermediates", "batch_stats"],
        capture_intermediates=True,
    )
    expected = {name: captured["intermediates"][name]["__call__"][0] for name in MODULES}
    groups = {name: [f"{name}/{leaf}" for leaf in params[name]] for name in MODULES}
    return forward, groups, params, x, expected


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.slow
def test_tapped_outputs_are_the_intermediates_of_a_linen_net(train, jitted):
    forward, groups, params, x, expected = linen_case(train)
    outputs = layer_outputs(params, groups, forward, x)
    got = (jax.jit(outputs) if jitted else outputs)(params, x)
    assert set(got) == set(MODULES)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_tapped_outputs_follow_new_parameters_and_data():
    forward, groups, params, x, _ = linen_case(train=False)
    outputs = layer_outputs(params, groups, forward, x)
    params, x = jax.tree.map(lambda leaf: leaf * 1.5, (params, x))
    assert_close(outputs(params, x)["a_head"], forward(params, x))
    grads = jax.grad(lambda params: jnp.sum(outputs(params, x)["m_conv"] ** 2))(params)
    assert jnp.any(grads["z_stem"]["kernel"] != 0)
    assert not jnp.any(grads["a_head"]["kernel"])


@pytest.mark.slow
def test_tapped_outputs_in_bfloat16():
    with jax.numpy_dtype_promotion("standard"):  # as Flax's BatchNorm needs it
        forward, groups, params, x, expected = linen_case(train=False, dtype=jnp.bfloat16)
        got = layer_outputs(params, groups, forward, x)(params, x)
    for name in MODULES:  # the normalisations compute in float32 and cast what they return
        chex.assert_trees_all_equal(got[name].astype(jnp.bfloat16), expected[name])


@pytest.mark.slow
def test_tapped_groups_end_after_their_last_member():
    forward, _, params, x, expected = linen_case(train=True)
    groups = {
        "conv": [name for name in paths.flatten(params) if name.startswith("m_")],
        "stem": [name for name in paths.flatten(params) if name.startswith("z_")],
    }
    got = layer_outputs(params, groups, forward, x)(params, x)
    chex.assert_trees_all_close(got, {"conv": expected["m_bn"], "stem": expected["z_bn"]}, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["bare", "jit", "remat"])
def test_tapped_outputs_of_a_plain_function(wrap):
    params = {name: 0.5 * (i + 1) * normal(3, 3) for i, name in enumerate("cab")}
    x = normal(5, 3)

    def forward(p, x):
        return jnp.sum(wrap(lambda p, x: jnp.tanh(jnp.sin(x @ p["b"]) @ p["c"]) @ p["a"])(p, x))

    got = jax.jit(layer_outputs(params, {name: [name] for name in "abc"}, forward, x))(params, x)
    b = np.asarray(x, np.float64) @ np.asarray(params["b"], np.float64)
    c = np.sin(b) @ np.asarray(params["c"], np.float64)
    a = np.tanh(c) @ np.asarray(params["a"], np.float64)
    for name, expected in {"a": a, "b": b, "c": c}.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)


def test_tapped_computes_only_what_is_asked_for():
    params = {name: jnp.ones((64, 64)) for name in "bca"}
    x = jnp.ones((8, 64))

    def flops(groups):
        outputs = jax.jit(layer_outputs(params, groups, plain, x))
        return outputs.lower(params, x).compile().cost_analysis()["flops"]

    assert flops({"b": ["b"]}) == 2 * 8 * 64 * 64
    assert flops({"a": ["a"]}) == 3 * flops({"b": ["b"]})


def test_tapped_outputs_of_flattened_tokens_have_a_row_per_example():
    params = {"a": normal(3, 4)}

    def forward(p, x):
        return jnp.sum(x.reshape(-1, 3) @ p["a"])

    x = normal(2, 5, 3)
    got = layer_outputs(params, {"a": ["a"]}, forward, x)(params, x)["a"]
    assert_close(got, (np.asarray(x) @ np.asarray(params["a"])).reshape(2, 20))


@jax.custom_jvp
def standardized(x):
    return (x - x.mean(0, keepdims=True)) / x.std(0, keepdims=True)


standardized.defjvp(lambda primals, tangents: (standardized(*primals), tangents[0]))
# By name: a forward function, and the output of layer "w" that it should have, from x of shape (4, 8, 3).
AXES = {
    "last": (lambda p, x: p["w"] @ x[:, 0].T, lambda w, x: x[:, 0] @ w.T),
    "last, then first": (lambda p, x: (p["w"] @ x[:, 0].T).T, lambda w, x: x[:, 0] @ w.T),
    "behind the time": (lambda p, x: x.swapaxes(0, 1) @ p["w"].T, lambda w, x: x @ w.T),
    "behind the time, in a loop": (
        lambda p, x: jax.lax.scan(lambda h, x: (h + x @ p["w"].T,) * 2, jnp.zeros((4, 8)), x.swapaxes(0, 1))[1] * 1.0,
        lambda w, x: (x @ w.T).sum(1),
    ),
    "merged with the time": (lambda p, x: x.reshape(-1, 3) @ p["w"].T, lambda w, x: (x @ w.T).reshape(4, -1)),
    "merged, in a batch norm with rules": (
        lambda p, x: standardized(x.reshape(-1, 3)) @ p["w"].T,
        lambda w, x: (((x - x.mean((0, 1))) / x.std((0, 1))) @ w.T).reshape(4, -1),
    ),
    "mixed up, then added": (
        lambda p, x: x[:, 0] + x[::-1, 0] @ p["w"][:3].T,
        lambda w, x: x[:, 0] + x[::-1, 0] @ w[:3].T,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AXES)
def test_tapped_outputs_have_the_examples_in_front(name):
    forward, expected = AXES[name]
    params, x = {"w": normal(8, 3)}, normal(4, 8, 3)
    got = layer_outputs(params, {"w": ["w"]}, forward, x)(params, x)["w"]
    np.testing.assert_allclose(got, expected(np.asarray(params["w"]), np.asarray(x)), rtol=1e-4, atol=1e-5)


def test_tapped_outputs_where_inputs_are_as_long_by_chance():
    """The statistics have as many channels as there are examples; a key comes first, and another batch last."""
    params, x, y, mean = {"a": normal(3, 3), "b": normal(2, 5)}, normal(3, 3), normal(3, 2), normal(3)

    def forward(p, key, x, mean, y):
        return (x - mean[None]) @ p["a"], y @ p["b"]

    inputs = jax.random.key(0), x, mean, y
    got = layer_outputs(params, {"a": ["a"], "b": ["b"]}, forward, *inputs)(params, *inputs)
    assert_close(got["a"], (x - mean[None]) @ params["a"])
    assert_close(got["b"], y @ params["b"])


def test_tapped_output_for_one_example():
    params, x = {"a": normal(3, 4)}, normal(1, 5, 3)
    got = layer_outputs(params, {"a": ["a"]}, lambda p, x: x.reshape(5, 3) @ p["a"], x)(params, x)["a"]
    assert_close(got, (x[0] @ params["a"]).reshape(1, 20))


def test_tapped_output_of_a_tied_embedding_is_that_of_its_first_use():
    params, tokens = {"embed": normal(7, 3), "bias": normal(7), "a": normal(3, 3)}, jnp.array([2, 0, 6, 2])

    def forward(p, tokens):
        return jnp.tanh(p["embed"][tokens] @ p["a"]) @ p["embed"].T + p["bias"][None]

    got = layer_outputs(params, {"tied": ["embed", "bias"], "a": ["a"]}, forward, tokens)(params, tokens)
    np.testing.assert_array_equal(got["tied"], params["embed"][tokens])
    assert_close(got["a"], params["embed"][tokens] @ params["a"])


def test_tapped_output_of_layers_inside_a_loop_is_that_of_the_loop():
    params = {"a": 0.5 * normal(3, 3), "b": normal(3, 3)}
    x = normal(2, 3)

    def forward(p, x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ p["a"]), None), x, None, length=3)[0] @ p["b"]

    got = layer_outputs(params, {"a": ["a"], "b": ["b"]}, forward, x)(params, x)
    expected = x
    for _ in range(3):
        expected = jnp.tanh(expected @ params["a"])
    assert_close(got["a"], expected)
    assert_close(got["b"], expected @ params["b"])


def test_tapped_errors():
    with pytest.raises(ValueError, match="inputs: got none"):
        layer_outputs(SQUARE, {"b": ["b"]}, plain)
    with pytest.raises(ValueError, match=r"forward: does not use any parameter of layer 'a'"):
        layer_outputs(SQUARE, {"a": ["a"]}, lambda p, x: x @ p["b"], X)
    with pytest.raises(ValueError, match="inputs: the batch has 2 examples"):
        layer_outputs(SQUARE, {"b": ["b"]}, lambda p, x: p["b"] @ x.T[:, 0], X)
    with pytest.raises(
        ValueError, match=r"layer 'b', or of what follows from it, counts them \(reshape: a reshape that"
    ):
        layer_outputs(SQUARE, {"b": ["b"]}, lambda p, x: x.T.reshape(2, 3) @ p["b"], X)
    with pytest.raises(ValueError, match="inputs: none of them has a first axis"):
        layer_outputs(SQUARE, {"b": ["b"]}, lambda p, x: x * p["b"], jnp.array(1.0))
    with pytest.raises(ValueError, match=r"inputs: got a batch of shape \(0, 3\), expected at least one example"):
        layer_outputs(SQUARE, {"b": ["b"]}, plain, X[:0])
