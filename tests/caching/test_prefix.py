"""A loss split at the end of its frozen layers gives the same, and computes only what trains."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import smartfrz_jax as sfj
from models.bert import Bert
from models.deit import DeiT
from models.resnet import BasicBlock, ResNet
from smartfrz_jax.caching.break_even import break_even
from smartfrz_jax.caching.prefix_cache import PrefixCache
from smartfrz_jax.jaxprs import example_axis
from smartfrz_jax.jaxprs.digests import digests
from smartfrz_jax.jaxprs.example_rules import Axis, Mixed, Value
from smartfrz_jax.jaxprs.min_cut import min_cut
from smartfrz_jax.nnx.prefix_cache import PrefixCache as NNXPrefixCache
from smartfrz_jax.pytrees import paths
from tests.support.rounding import assert_close

pytestmark = pytest.mark.usefixtures("jax_defaults")

N = 4
RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(RNG.standard_normal((N, width)), jnp.float32) for width in (6, 2))
SIZES = (6, 5, 3, 4, 2)
PARAMS = {
    f"w{i}": jnp.asarray(RNG.standard_normal(shape), jnp.float32) for i, shape in enumerate(itertools.pairwise(SIZES))
}
IMAGES = jnp.asarray(RNG.standard_normal((N, 8, 8, 3)), jnp.float32)
LABELS = jnp.asarray(np.arange(N) % 3)
IDS = jnp.asarray(RNG.integers(0, 20, (N, 6)))
MASK = jnp.asarray(np.arange(6)[None] < np.array([6, 4, 3, 2])[:, None], jnp.int32)


def mlp(params, x, y):
    for name in sorted(params)[:-1]:
        x = jnp.tanh(x @ params[name])
    return jnp.square(x @ params[sorted(params)[-1]] - y).mean()


def frozen_of(loss_fn, params, inputs, names):
    return sfj.Frozen(sfj.find_layers(params, loss_fn, *inputs), frozenset(names))


def cached(loss_fn, params, inputs, names, **kwargs):
    return PrefixCache(params, frozen_of(loss_fn, params, inputs, names), loss_fn, *inputs, **kwargs)


def check(loss_fn, params, inputs, names, **kwargs):
    """Loss and gradients are those of the uncached frozen step; returns the cache."""
    cache = cached(loss_fn, params, inputs, names, **kwargs)
    frozen = cache.frozen
    activations = cache.activations(params, *inputs)
    left = [x if f"inputs:{i}" in cache.needed else None for i, x in enumerate(inputs)]
    got = jax.jit(sfj.value_and_grad(cache.loss, frozen))(params, activations, *left)
    assert_close(got, jax.jit(sfj.value_and_grad(loss_fn, frozen))(params, *inputs))
    return cache


# The cut


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_no_cut_is_cheaper(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 8))
    costs = {i: int(rng.integers(0, 9)) for i in range(n)}
    edges = [(i, j) for i in range(n) for j in range(i + 1, n) if rng.random() < 0.4]
    sources, sinks = [0, *rng.integers(0, n, 1).tolist()], [n - 1, *rng.integers(0, n, 1).tolist()]

    def separates(cut):
        reached = set(sources) - set(cut)
        for i, j in sorted(edges):
            if i in reached and j not in cut:
                reached.add(j)
        return not reached.intersection(sinks)

    subsets = itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(n + 1))
    best = min(sum(costs[i] for i in subset) for subset in subsets if separates(subset))
    cut = min_cut(costs, edges, sources, sinks)
    assert separates(cut)
    assert sum(costs[i] for i in cut) == best


def test_of_equal_cuts_the_last_is_taken():
    assert min_cut({"a": 2, "b": 2, "c": 2}, [("a", "b"), ("b", "c")], ["a"], ["c"]) == ["c"]


# Which axis counts the examples

KEEPS = {
    "elementwise": lambda x: jnp.exp(x) + x * jnp.arange(6.0)[None],
    "row added": lambda x: x + jnp.ones((N, 6)),
    "softmax": lambda x: jax.nn.softmax(x),
    "layer norm": lambda x: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True),
    "transposed": lambda x: (x.T * 2).T @ jnp.ones((6, 2)),
    "product": lambda x: jnp.einsum("nd,de->en", x, jnp.ones((6, 2))),
    "attention": lambda x: jnp.einsum("nd,ne->nde", x, x),
    "merged and split again": lambda x: (x.reshape(N * 2, 3) @ jnp.ones((3, 5))).reshape(N, 2, 5),
    "unstacked": lambda x: jnp.add(*jnp.moveaxis(x.reshape(N, 2, 3), 1, 0)),
    "heads": lambda x: jnp.moveaxis(x.reshape(N, 3, 2), 1, 0)[2],
    "slice": lambda x: x[:, 2:4],
    "dynamic slice": lambda x: jax.lax.dynamic_slice_in_dim(x, 1, 3, axis=1),
    "class token": lambda x: jnp.concatenate([jnp.broadcast_to(jnp.arange(2.0), (N, 2)), x], axis=1),
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 2))),
    "stacked": lambda x: jnp.stack([x, x * 2], axis=0),
    "sorted": lambda x: jnp.sort(x, axis=1),
    "cumulative": lambda x: jnp.cumsum(x, axis=1),
    "top k": lambda x: jax.lax.top_k(x, 2)[0],
    "argmax": lambda x: x.argmax(1),
    "embedded": lambda x: jnp.eye(9)[x.argmax(1)],
    "embedded with constants": lambda x: jnp.eye(9)[jnp.zeros((N, 3), int)].sum() * x + jnp.eye(6)[jnp.zeros(N, int)],
    "taken along": lambda x: jnp.take_along_axis(x, x.argsort(1), 1),
    "masked": lambda x: jnp.where(x > 0, x, -1.0),
    "scan over features": lambda x: jax.lax.scan(lambda c, v: (c + v, c * v), jnp.zeros(N), x.T)[1],
    "loop": lambda x: jax.lax.fori_loop(0, 3, lambda _, v: jnp.sin(v), x),
    "branches": lambda x: jax.lax.cond(jnp.array(True), jnp.sin, jnp.cos, x),
    "map over steps": lambda x: jax.lax.map(lambda a: a * x, jnp.arange(3.0)),
    "relu, jit, checkpoint": lambda x: jax.checkpoint(jax.jit(jax.nn.relu))(x),
    "fixed mean": lambda x: x + jnp.arange(6.0).mean(),
}
MIXES = {
    "batch norm": lambda x: (x - x.mean(0)) / x.std(0),
    "maximum of all": lambda x: x / x.max(),
    "position in the batch": lambda x: x + jnp.arange(4.0)[:, None],
    "similarities": lambda x: x @ x.T,
    "sum by product": lambda x: jnp.ones((2, N)) @ x,
    "flipped": lambda x: x[::-1],
    "rolled": lambda x: jnp.roll(x, 1, axis=0),
    "mixup": lambda x: 0.5 * x + 0.5 * jnp.concatenate([x[1:], x[:1]]),
    "first": lambda x: x - x[:1],
    "merged the wrong way": lambda x: x.T.reshape(-1),
    "cumulative": lambda x: jnp.cumsum(x, axis=0),
    "sorted": lambda x: jnp.sort(x, axis=0),
    "padded": lambda x: jnp.pad(x, ((1, 0), (0, 0))),
    "taken": lambda x: x[jnp.array([0, 0, 1, 1])],
    "scan over examples": lambda x: jax.lax.scan(lambda c, v: (c + v, c), jnp.zeros(6), x)[1],
    "dropout": lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape),
    "loop until": lambda x: jax.lax.while_loop(lambda v: (v < 3).all(), lambda v: v + 1, x),
    "branch by the batch": lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    "position by one-hot": lambda x: x + jnp.eye(6)[jnp.arange(N)],
    "unknown": lambda x: jnp.linalg.cholesky(jnp.einsum("nd,ne->nde", x, x)),
}


def axes_of(function):
    return example_axis.of_jaxpr(jax.make_jaxpr(function)(X).jaxpr, [Value(Axis(0))])


@pytest.mark.parametrize("name", KEEPS)
def test_examples_apart(name):
    (value,) = axes_of(KEEPS[name])
    out = np.asarray(KEEPS[name](X))
    others = np.asarray(KEEPS[name](X.at[1:].set(7.0)[jnp.array([1, 2, 0, 3])]))  # the first of them is now the third
    rows, other_rows = (np.moveaxis(a, value.axis.position, 0).reshape(N, -1) for a in (out, others))
    assert_close(other_rows[2], rows[0])


@pytest.mark.parametrize("name", MIXES)
def test_examples_mixed(name):
    with pytest.raises(Mixed):
        axes_of(MIXES[name])


@pytest.mark.parametrize("name", KEEPS)
def test_the_axis_is_the_same_where_examples_may_depend_on_each_other(name):
    assert axis_if_dependent(KEEPS[name]) == axes_of(KEEPS[name])[0].axis


@pytest.mark.parametrize("name", MIXES)
def test_the_axis_where_examples_do_depend_on_each_other(name):
    dependent = {"batch norm", "maximum of all", "position in the batch", "first", "mixup", "dropout",
                 "branch by the batch", "position by one-hot"}  # fmt: skip
    found = axis_if_dependent(MIXES[name])
    assert found == Axis(0) if name in dependent else isinstance(found, str)


def axis_if_dependent(function):
    jaxpr = jax.make_jaxpr(function)(X).jaxpr
    return example_axis.axes(jaxpr, [Axis(0)])[jaxpr.outvars[0]]


def test_convolution_and_pooling_keep_examples_apart():
    def function(x):
        x = jax.lax.conv_general_dilated(x, jnp.ones((3, 3, 3, 4)), (2, 2), "SAME", dimension_numbers=NHWC)
        return nnx.max_pool(x, (2, 2), (2, 2)) + nnx.avg_pool(x, (2, 2), (2, 2))

    closed = jax.make_jaxpr(function)(IMAGES)
    assert example_axis.of_jaxpr(closed.jaxpr, [Value(Axis(0))])[0].axis == Axis(0)


NHWC = ("NHWC", "HWIO", "NHWC")


# The split


@pytest.mark.slow
def test_frontier_loss_and_gradients_of_a_plain_network():
    cache = check(mlp, PARAMS, (X, Y), ["w0", "w1"])
    assert [(value.shape, value.dtype) for value in cache.frontier] == [((3,), jnp.float32)]
    assert cache.bytes_per_example == 12
    assert cache.needed == {"inputs:1"}
    assert cache.build_flops == 2 * (6 * 5 + 5 * 3)
    assert cache.saved_flops == cache.build_flops
    expected = np.tanh(np.tanh(np.float64(X) @ np.float64(PARAMS["w0"])) @ np.float64(PARAMS["w1"]))
    assert_close(cache.activations(PARAMS, X, Y)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["w0"], ["w0", "w1", "w2"], ["w0", "w1", "w3"]])
def test_operation_by_operation_it_is_the_same_in_every_bit(names):
    cache = cached(mlp, PARAMS, (X, Y), names)
    with jax.disable_jit():
        activations = cache._loss.split.frozen_part(PARAMS, (X, Y))
        got = sfj.value_and_grad(cache.loss, cache.frozen)(PARAMS, activations, None, Y)
        expected = sfj.value_and_grad(mlp, cache.frozen)(PARAMS, X, Y)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_costs_only_the_live_part():
    cache = cached(mlp, PARAMS, (X, Y), ["w0", "w1"])

    def by_hand(params, h, y):
        return mlp({name: params[name] for name in ("w2", "w3")}, h, y)

    activations = cache.activations(PARAMS, X, Y)
    step = jax.jit(sfj.value_and_grad(cache.loss, cache.frozen))
    hand = jax.jit(sfj.value_and_grad(by_hand, cache.frozen))
    expected = sfj.program_cost(hand, PARAMS, activations[0], Y).flops
    assert sfj.program_cost(step, PARAMS, activations, None, Y).flops == expected
    uncached = jax.jit(sfj.value_and_grad(mlp, cache.frozen))
    assert sfj.program_cost(uncached, PARAMS, X, Y).flops == expected + N * cache.saved_flops


def test_activations_do_not_depend_on_the_rest_of_the_batch():
    cache = cached(mlp, PARAMS, (X, Y), ["w0", "w1"])
    (every,) = cache.activations(PARAMS, X, Y)
    (two,) = cache.activations(PARAMS, X[2:], Y[2:])
    assert_close(two, every[2:])
    (back,) = cache.activations(PARAMS, X[::-1], Y[::-1])
    assert_close(back[::-1], every)


@pytest.mark.slow
def test_other_batch_sizes():
    cache = cached(mlp, PARAMS, (X, Y), ["w0", "w1"])
    x, y = jnp.concatenate([X, X[:2]]), jnp.concatenate([Y, Y[:2]])
    assert_close(cache.loss(PARAMS, cache.activations(PARAMS, x, y), None, y), mlp(PARAMS, x, y))


def random_network(seed):
    """A random graph of products, sums, activations and normalisations; its parameters and layers to freeze."""
    rng = np.random.default_rng(seed)
    width, n_params = 3, int(rng.integers(2, 6))
    params = {f"w{i}": jnp.asarray(rng.normal(size=(width, width)), jnp.float32) for i in range(n_params)}
    plan = [("product", f"w{i}") for i in range(n_params)]
    plan += [
        (str(rng.choice(["add", "tanh", "norm", "gather", "heads"])), None) for _ in range(int(rng.integers(2, 7)))
    ]
    rng.shuffle(plan)
    reads = [rng.random(2) for _ in plan]

    def loss_fn(params, x, y):
        values = [x, y]
        for (kind, name), at in zip(plan, reads, strict=True):
            a, b = (values[int(u * len(values))] for u in at)
            match kind:
                case "product":
                    values.append(values[-1] @ params[name] + a)
                case "add":
                    values.append(a + b)
                case "tanh":
                    values.append(jnp.tanh(a))
                case "norm":
                    values.append((a - a.mean(1, keepdims=True)) / (1 + a.std(1, keepdims=True)))
                case "gather":
                    values.append(jnp.take_along_axis(a, jnp.argsort(b, axis=1), 1))
                case "heads":
                    values.append(jnp.einsum("nd,ne->nde", a, b).reshape(a.shape[0] * width, width)[::1].reshape(
                        a.shape[0], width, width).sum(1))  # fmt: skip
        return jnp.square(values[-1]).mean() + sum(jnp.sin(value).mean() for value in values[2:])

    order = sorted(params)
    names = [name for name in order if rng.random() < 0.7] or order[:1]
    return loss_fn, params, names[: n_params - 1]


@pytest.mark.slow
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_random_networks(seed):
    loss_fn, params, names = random_network(seed)
    x, y = (jnp.asarray(np.random.default_rng(seed + i).normal(size=(N, 3)), jnp.float32) for i in range(2))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.disable_jit():
        frozen = frozen_of(loss_fn, params, (x, y), names)
        try:
            cache = PrefixCache(params, frozen, loss_fn, x, y)
        except ValueError as error:
            if "nothing is worth keeping" not in str(error):
                raise
            return
        got = sfj.value_and_grad(cache.loss, frozen)(params, cache._loss.split.frozen_part(params, (x, y)), x, y)
        expected = sfj.value_and_grad(loss_fn, frozen)(params, x, y)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_cheap_values_are_computed_again_where_that_needs_fewer_bytes():
    def loss_fn(params, x, y):
        h = x @ params["w0"]
        wide = jnp.concatenate([jnp.sin(h), jnp.cos(h), h], axis=1)
        return jnp.square(wide @ params["w1"] - y).mean()

    params = {"w0": jnp.ones((6, 3)), "w1": jnp.ones((9, 2))}
    cache = check(loss_fn, params, (X, Y), ["w0"])
    assert [value.shape for value in cache.frontier] == [(3,)]

    def smaller(params, x, y):
        return jnp.square((x @ params["w0"]).max(1, keepdims=True) * params["w1"] - y).mean()

    cache = check(smaller, {"w0": jnp.ones((6, 3)), "w1": jnp.ones((1, 2))}, (X, Y), ["w0"])
    assert [value.shape for value in cache.frontier] == [(1,)]


def test_half_precision_is_stored_before_it_is_widened():
    def loss_fn(params, x, y):
        h = jax.nn.relu(x.astype(jnp.bfloat16) @ params["w0"].astype(jnp.bfloat16)).astype(jnp.float32)
        return jnp.square(h @ params["w1"] - y).mean()

    cache = check(loss_fn, {"w0": jnp.ones((6, 3)), "w1": jnp.ones((3, 2))}, (X, Y), ["w0"])
    assert cache.bytes_per_example == 6


def test_values_with_the_examples_on_another_axis():
    def loss_fn(params, x, y):
        q, k = jnp.moveaxis((x @ params["w0"]).reshape(N, 3, 2), 1, 0)[:2]
        merged = (q.reshape(N * 2, 1) * params["w1"]).reshape(N, 2)
        return jnp.square(merged + params["w1"] * k - y).mean()

    check(loss_fn, {"w0": PARAMS["w0"][:, :1] * jnp.ones((1, 6)), "w1": jnp.ones((1, 1))}, (X, Y), ["w0"])


@pytest.mark.slow
def test_auxiliary_outputs_and_batches_as_dictionaries():
    def loss_fn(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["w0"])
        out = hidden @ params["w1"]
        return jnp.square(out - batch["y"]).mean(), {"out": out, "penalty": jnp.square(params["w0"]).sum()}

    params = {"w0": PARAMS["w0"], "w1": jnp.ones((5, 2))}
    layers = sfj.find_layers(params, lambda params, batch: loss_fn(params, batch)[0], {"x": X, "y": Y})
    frozen = sfj.Frozen(layers, frozenset({"w0"}))
    cache = PrefixCache(params, frozen, loss_fn, {"x": X, "y": Y})
    assert cache.needed == {"inputs:0/y"}
    activations = cache.activations(params, {"x": X, "y": Y})
    assert_close(cache.loss(params, activations, {"x": None, "y": Y}), loss_fn(params, {"x": X, "y": Y}))
    with pytest.raises(ValueError, match=r"inputs:0/y: got None"):
        cache.loss(params, activations, {"x": X, "y": None})


def checkpoints(cache):
    """Number of checkpointed functions in the part that trains."""
    live = jax.make_jaxpr(cache.loss)(PARAMS, cache.activations(PARAMS, X, Y), None, Y)
    return sum(eqn.primitive.name in ("checkpoint", "remat2") for eqn in live.eqns)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_checkpointed_blocks_and_losses_split(policy):
    def block(w, x):
        return jnp.tanh(x @ w)

    def loss_fn(params, x, y):
        for name in ("w0", "w1", "w2"):
            x = jax.checkpoint(block, policy=policy)(params[name], x)
        return jnp.square(x @ params["w3"] - y).mean()

    cache = check(loss_fn, PARAMS, (X, Y), ["w0", "w1"])
    assert [value.shape for value in cache.frontier] == [(3,)]
    assert checkpoints(cache) == 1
    whole = check(jax.checkpoint(mlp, policy=policy), PARAMS, (X, Y), ["w0", "w1"])
    assert [value.shape for value in whole.frontier] == [(3,)]
    assert checkpoints(whole) == 1


@pytest.mark.slow
def test_scans_split():
    params = {f"w{i}": jax.random.normal(jax.random.key(i), (6, 6)) for i in range(4)} | {"w9": jnp.ones((6, 2))}

    def loss_fn(params, x, y):
        stacked = jnp.stack([params[f"w{i}"] for i in range(4)])
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stacked)
        return jnp.square(x @ params["w9"] - y).mean()

    cache = check(loss_fn, params, (X, Y), ["w0", "w1"])
    assert cache.build_flops == 2 * 2 * 36
    stacked = {"stack": jnp.stack([params[f"w{i}"] for i in range(4)]), "w9": params["w9"]}

    def of_stack(params, x, y):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
        return jnp.square(x @ params["w9"] - y).mean()

    assert check(of_stack, stacked, (X, Y), ["stack"]).build_flops == 4 * 2 * 36


# What is refused


def test_batch_statistics_in_the_prefix():
    def loss_fn(params, x, y):
        h = x @ params["w0"]
        h = (h - h.mean(0)) / h.std(0)
        return jnp.square(h @ params["w1"] @ params["w2"] @ params["w3"] - y).mean()

    with pytest.raises(
        ValueError, match=r"'w1'.*layer 'w0', reduce_sum: a reduction over the examples.*evaluation mode"
    ):
        cached(loss_fn, PARAMS, (X, Y), ["w0", "w1"])
    check(loss_fn, PARAMS, (X, Y), ["w0"])  # they are behind the last frozen layer, and taken in every step


def test_random_numbers_in_the_prefix():
    def loss_fn(params, x, y, key):
        h = x @ params["w0"]
        h = h * jax.random.bernoulli(key, 0.5, h.shape)
        return jnp.square(h @ params["w1"] @ params["w2"] @ params["w3"] - y).mean()

    inputs = (X, Y, jax.random.key(3))
    with pytest.raises(ValueError, match=r"inputs:2.*no axis counts the 4 examples"):
        cached(loss_fn, PARAMS, inputs, ["w0", "w1"])
    assert check(loss_fn, PARAMS, inputs, ["w0"]).needed == {"inputs:1", "inputs:2"}

    def fixed(params, x, y):
        return loss_fn(params, x, y, jax.random.key(0))

    with pytest.raises(ValueError, match="random"):
        cached(fixed, PARAMS, (X, Y), ["w0", "w1"])


def test_inputs_that_are_the_same_for_all_examples_may_change():
    def loss_fn(params, x, y, scale):
        return mlp(params, x * scale, y)

    with pytest.raises(ValueError, match="inputs:2"):
        cached(loss_fn, PARAMS, (X, Y, jnp.float32(2.0)), ["w0"])


def test_augmentation():
    with pytest.raises(ValueError, match=r"augmented.*views"):
        cached(mlp, PARAMS, (X, Y), ["w0"], augmented=True)
    assert cached(mlp, PARAMS, (X, Y), ["w0"], augmented=True, views=3).views == 3


@pytest.mark.parametrize("names", [[], ["w1"], ["w2", "w3"]])
def test_nothing_to_keep(names):
    with pytest.raises(ValueError, match="nothing is worth keeping"):
        cached(mlp, PARAMS, (X, Y), names)


def test_what_a_custom_rule_hides():
    @jax.custom_vjp
    def network(w0, w1, x):
        return x @ w0 @ w1

    network.defvjp(lambda w0, w1, x: (x @ w0 @ w1, None), lambda _, g: (None, None, None))
    with pytest.raises(ValueError, match="differentiation rule of its own"):
        cached(lambda p, x: network(p["w0"], p["w1"], x).mean(), {k: PARAMS[k] for k in ("w0", "w1")}, (X,), ["w0"])


def test_wrong_arguments():
    frozen = frozen_of(mlp, PARAMS, (X, Y), ["w0"])
    with pytest.raises(ValueError, match="got none"):
        PrefixCache(PARAMS, frozen, mlp)
    with pytest.raises(ValueError, match="at least 2 examples"):
        PrefixCache(PARAMS, frozen, mlp, X[:1], Y[:1])
    cache = PrefixCache(PARAMS, frozen, mlp, X, Y)
    with pytest.raises(ValueError, match="of another frozen set"):
        cache.loss(PARAMS, (jnp.ones((N, 3)),), X, Y)
    with pytest.raises(ValueError, match="call keep"):
        cache.fetch(PARAMS, np.arange(N), X, Y)


# Networks


def cross_entropy(model, *inputs):
    *inputs, labels = inputs
    return optax.softmax_cross_entropy_with_integer_labels(model(*inputs), labels).mean()


def resnet():
    return ResNet((1, 1), (4, 8), BasicBlock, num_classes=3, stem="cifar", rngs=nnx.Rngs(0))


def started(make):
    """The network with values from NumPy, which saves compiling its initialisers."""
    rng, (graphdef, state) = np.random.default_rng(0), nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    streams = iter(jax.random.split(jax.random.key(0), 99))

    def draw(name, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return next(streams)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(np.zeros(leaf.shape, leaf.dtype))
        if name.endswith(("scale", "depth")):
            return jnp.asarray(rng.uniform(0.5, 1, leaf.shape), leaf.dtype)
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, paths.tree_map(draw, nnx.as_pure(state)))


def deit(**kwargs):
    sizes = {"image_size": 8, "patch_size": 4, "dim": 8, "depth": 2, "heads": 2, "num_classes": 3}
    return started(partial(DeiT, **{**sizes, "dropout": 0.1, "drop_path": 0.2, **kwargs}))


def bert():
    sizes = {"vocab_size": 20, "max_positions": 8, "dim": 8, "depth": 2, "heads": 2, "hidden": 12, "num_classes": 3}
    return started(partial(Bert, **sizes))


RESNET_STEM = ["conv1", "stages/0/0/conv1", "stages/0/0/conv2"]
NETWORKS = {
    "resnet": (resnet, (IMAGES, LABELS), ("stages/1", "fc"), [(8, 8, 4)], {"inputs:1"}),
    "resnet, all": (resnet, (IMAGES, LABELS), ("fc",), [(8,)], {"inputs:1"}),
    "deit": (deit, (IMAGES, LABELS), ("blocks/1", "norm", "head"), [(5, 8)], {"inputs:1"}),
    "deit, all": (lambda: deit(drop_path=0.0), (IMAGES, LABELS), ("head",), [(8,)], {"inputs:1"}),
    "deit, scan": (
        lambda: deit(depth=3, scan=True),
        (IMAGES, LABELS),
        ("blocks/1", "blocks/2", "norm", "head"),
        [(5, 8)],
        {"inputs:1"},
    ),
    "bert": (
        bert,
        (IDS, MASK, LABELS),
        ("encoder/layer/1", "pooler", "classifier"),
        [(6, 8)],
        {"inputs:1", "inputs:2"},
    ),
    "bert, all": (bert, (IDS, MASK, LABELS), ("classifier",), [(8,)], {"inputs:2"}),
}


@nnx.jit(static_argnums=2)
def uncached_step(model, optimizer, loss_fn, *inputs):
    return optimizer.value_and_grad(loss_fn)(model, *inputs)


@nnx.jit(static_argnums=2)
def cached_step(model, optimizer, cache, activations, *inputs):
    return optimizer.value_and_grad(cache.loss)(model, activations, *inputs)


def optimizer_for(model, inputs, active):
    layers = sfj.nnx.find_layers(model, *inputs[:-1])
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=layers)
    optimizer.freeze(model, [name for name in layers.names if not name.startswith(active)])
    return optimizer


def variables(module):
    leaves = paths.flatten(nnx.as_pure(nnx.state(module)))
    return {name: leaf for name, leaf in leaves.items() if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    make, inputs, active, frontier, needed = NETWORKS[name]
    model, other = make(), make()
    optimizer = optimizer_for(model, inputs, active)
    cache = NNXPrefixCache(model, optimizer.frozen, cross_entropy, *inputs)
    assert [value.shape for value in cache.frontier] == frontier
    assert cache.needed == needed
    activations = cache.activations(model, *inputs)
    left = [x if f"inputs:{i}" in needed else None for i, x in enumerate(inputs)]
    expected = uncached_step(model, optimizer, cross_entropy, *inputs)
    got = cached_step(other, optimizer, cache, activations, *left)
    assert_close(got[0], expected[0])
    gradients, references = (paths.flatten(nnx.as_pure(pair[1])) for pair in (got, expected))
    for leaf in [leaf for leaf in references if "/query/" in leaf or "/key/" in leaf]:
        # Softmax's derivative is a difference of what the values' gradients are sums of, and has its last bits from
        # there; of a key's bias, which softmax does not see, it has nothing else.
        scale = float(np.abs(references[leaf.split("/self/")[0] + "/self/value/kernel"]).max())
        assert_close(gradients.pop(leaf), references.pop(leaf), scale)
    assert_close(gradients, references)
    assert_close(variables(other), variables(model))  # statistics, and the counts of random streams


@pytest.mark.slow
def test_frontier_of_a_residual_network_is_its_last_relu_and_the_step_is_that_of_the_rest():
    model = resnet()
    optimizer = optimizer_for(model, (IMAGES, LABELS), ("stages/1", "fc"))
    assert sorted(optimizer.frozen.names) == RESNET_STEM
    cache = NNXPrefixCache(model, optimizer.frozen, cross_entropy, IMAGES, LABELS)
    (activations,) = cache.activations(model, IMAGES, LABELS)
    model.eval()
    expected = model.stages[0][0](nnx.relu(model.bn1(model.conv1(IMAGES))))
    model.train()
    assert_close(activations, expected)

    def rest(model, x, labels):
        logits = model.fc(jnp.mean(model.stages[1][0](x), axis=(1, 2)))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    by_hand = sfj.program_cost(uncached_step, model, optimizer, rest, activations, LABELS).flops
    got = sfj.program_cost(cached_step, model, optimizer, cache, (activations,), None, LABELS).flops
    assert got == pytest.approx(by_hand, rel=1e-3)


class Norms(nnx.Module):
    """A layer whose own counter changes what it does, and a statistic that no BatchNorm holds."""

    def __init__(self, rngs, kind):
        self.first, self.second = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)
        self.kind, self.seen = kind, nnx.BatchStat(jnp.zeros(()) if kind == "count" else jnp.zeros(5))

    def __call__(self, x):
        x = self.first(x)
        if self.kind == "count":
            self.seen[...] += 1
            x = x * (1 + self.seen[...])
        elif self.kind == "average":
            x = x - self.seen[...]
            self.seen[...] = 0.9 * self.seen[...] + 0.1 * x.mean(0)
        return self.head(nnx.relu(self.second(x)))


@pytest.mark.parametrize("kind", ["count", "average"])
def test_variables_that_frozen_layers_change_are_held_so_activations_can_be_kept(kind):
    model = Norms(nnx.Rngs(0), kind)
    layers = sfj.nnx.find_layers(model, X)
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=layers)
    optimizer.freeze(model, ["first", "second"])
    before = np.asarray(model.seen[...])

    def loss_fn(model, x):
        return model(x).mean()

    cache = NNXPrefixCache(model, optimizer.frozen, loss_fn, X)
    for _ in range(2):
        got = cache.loss(model, cache.activations(model, X), X)
        assert_close(got, optimizer.with_frozen(loss_fn)(model, X))
        np.testing.assert_array_equal(model.seen[...], before)


def test_a_batch_norm_told_to_train_is_refused():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(6, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)
            self.second, self.head = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.second(self.norm(self.first(x), use_running_average=False)))

    model = Net(nnx.Rngs(0))
    frozen = sfj.Frozen(sfj.nnx.find_layers(model, X), frozenset({"first", "second"}))
    with pytest.raises(ValueError, match=r"BatchNorm of 'norm/mean' with use_running_average=False, .* model.eval\(\)"):
        NNXPrefixCache(model, frozen, lambda model, x: model(x).mean(), X)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm0")(nn.Dense(5, name="dense0")(x)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm1")(nn.Dense(4, name="dense1")(x)))
        return nn.Dense(2, name="head")(x)


@pytest.mark.slow
def test_linen():
    net = LinenNet()
    init = jax.jit(net.init)({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    layers = sfj.linen.find_layers(net, init, X, train=False)

    def loss_fn(params, stats, x, y, key):
        variables = {"params": params, "batch_stats": stats}
        out, updates = net.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})
        return jnp.square(out - y).mean(), updates["batch_stats"]

    state = sfj.linen.TrainState.create(apply_fn=net.apply, params=init["params"], tx=optax.sgd(0.1), layers=layers)
    state = state.freeze(["dense0"])
    inputs = (init["batch_stats"], X, Y, jax.random.key(2))
    cache = PrefixCache(state.params, state.frozen, loss_fn, *inputs, hold=sfj.linen.hold, state_inputs=[0])
    assert [value.shape for value in cache.frontier] == [(5,)]
    activations = cache.activations(state.params, *inputs)
    step = jax.jit(state.value_and_grad(cache.loss, has_aux=True))
    got = step(state.params, activations, inputs[0], None, *inputs[2:])
    assert_close(got, jax.jit(state.value_and_grad(loss_fn, has_aux=True))(state.params, *inputs))
    both = state.freeze(["dense1"]).frozen
    assert PrefixCache(state.params, both, loss_fn, *inputs, hold=sfj.linen.hold, state_inputs=[0]).needed
    with pytest.raises(ValueError, match=r"dense1.*evaluation mode"):  # without `hold` its input is dropped from
        PrefixCache(state.params, both, loss_fn, *inputs, state_inputs=[0])


@pytest.mark.slow
def test_the_model_must_stay_as_it_was():
    model = resnet()
    optimizer = optimizer_for(model, (IMAGES, LABELS), ("stages/1", "fc"))
    cache = NNXPrefixCache(model, optimizer.frozen, cross_entropy, IMAGES, LABELS)
    activations = cache.activations(model, IMAGES, LABELS)
    model.stages[0][0].bn1.epsilon = 0.5
    with pytest.raises(ValueError, match="make a new PrefixCache"):
        cache.loss(model, activations, IMAGES, LABELS)


# Growing and shrinking


def run_epoch(cache, params, x, y):
    parts = np.split(np.arange(len(x)), 2)
    return jnp.concatenate([cache.fetch(params, rows, x[rows], y[rows])[0] for rows in parts])


@pytest.mark.slow
def test_when_the_prefix_grows_only_the_new_layers_are_run():
    cache = cached(mlp, PARAMS, (X, Y), ["w0"])
    cache.keep(N)
    first = run_epoch(cache, PARAMS, X, Y)
    assert_close(first, np.tanh(X @ PARAMS["w0"]))
    old = cache.store
    new = cache.follow(PARAMS, cache.frozen.add(["w1", "w2"]))
    assert cache.store is None
    grown = new.grown_from(cache)
    flops = sfj.program_cost(jax.jit(lambda a: grown(PARAMS, (a,), None, Y)), first).flops
    assert flops == 2 * N * (5 * 3 + 3 * 4)
    # The inputs are not needed any more: the activations come from the old ones.
    for rows in np.split(np.arange(N), 2):
        new.fetch(PARAMS, rows, None, Y[rows])
    assert new.store.is_complete
    assert new._source is None
    assert old.is_complete
    from_inputs = new.activations(PARAMS, X, Y)
    assert_close(new.store.take(np.arange(N))[0], from_inputs[0])


@pytest.mark.slow
def test_growth_of_a_network():
    model = resnet()
    optimizer = optimizer_for(model, (IMAGES, LABELS), ("stages", "fc"))
    first = NNXPrefixCache(model, optimizer.frozen, cross_entropy, IMAGES, LABELS)
    second = first.follow(model, optimizer.frozen.add(RESNET_STEM))
    grown = second.grown_from(first)(model, first.activations(model, IMAGES, LABELS), None, LABELS)
    assert_close(grown, second.activations(model, IMAGES, LABELS))
    assert second.follow(model, second.frozen) is second


def test_a_cache_stays_as_it_was_if_the_next_cannot_be(tmp_path):
    cache = cached(mlp, PARAMS, (X, Y), ["w0"])
    store = cache.keep(N, place=tmp_path / "first")
    with pytest.raises(FileExistsError, match="place"):  # without a place, it would be the same directory
        cache.follow(PARAMS, cache.frozen.add(["w1"]))
    assert cache.store is store
    new = cache.follow(PARAMS, cache.frozen.add(["w1"]), place=tmp_path / "second")
    assert cache.store is None
    assert new._source.store is store


def test_when_the_prefix_shrinks_what_was_kept_is_dropped():
    cache = cached(mlp, PARAMS, (X, Y), ["w0", "w1"])
    cache.keep(N)
    run_epoch(cache, PARAMS, X, Y)
    new = cache.follow(PARAMS, sfj.Frozen(cache.frozen.layers, frozenset({"w0"})))
    assert new.grown_from(cache) is None
    assert new._source is None
    assert not new.store.filled.any()
    changed = {**PARAMS, "w1": 2 * PARAMS["w1"]}  # it trains again
    got = run_epoch(new, changed, X, Y)
    assert_close(got, np.tanh(X @ PARAMS["w0"]))


def test_where_the_old_values_are_not_enough_they_are_computed_from_the_inputs():
    def two_branches(params, x, y):
        left = jnp.tanh(x @ params["w0"])
        right = jnp.tanh(x @ params["w9"])
        return jnp.square((left * right) @ params["w1"] @ params["w2"] @ params["w3"] - y).mean()

    params = PARAMS | {"w9": 2 * PARAMS["w0"]}
    cache = cached(two_branches, params, (X, Y), ["w0"])
    new = cache.follow(params, cache.frozen.add(["w9"]))
    grown = new.grown_from(cache)  # the other branch is new work, and reads the input
    assert_close(grown(params, cache.activations(params, X, Y), X, Y), new.activations(params, X, Y))
    with pytest.raises(ValueError, match="inputs:0"):
        grown(params, cache.activations(params, X, Y), None, Y)
    other = cached(
        lambda params, x, y: mlp({k: v for k, v in params.items() if k != "w9"}, x + 1, y), PARAMS, (X, Y), ["w0"]
    )
    assert new.grown_from(other) is None


def test_digests_tell_values_apart():
    def function(w, x):
        a = jax.nn.relu(x @ w)
        return a, jax.nn.relu(x @ w), jnp.tanh(x @ w), a + 1.0, a + 2.0

    def of(function):
        closed = jax.make_jaxpr(function)(PARAMS["w0"], X)
        known = digests(closed, ("w", "x"), closed.jaxpr.eqns)
        return [known[var] for var in closed.jaxpr.outvars]

    first, again, *others = of(function)
    assert first == again
    assert len({first, *others}) == 4
    assert of(function) == of(lambda w, x: function(w, x))


# Break-even


def test_break_even():
    inputs = (X, Y)
    frozen = frozen_of(mlp, PARAMS, inputs, ["w0", "w1"])
    account = sfj.account(PARAMS, frozen.layers, mlp, *inputs)
    cache = PrefixCache(PARAMS, frozen, mlp, *inputs)
    examples = 100
    epoch = examples // N
    answer = break_even(account, cache, examples=examples, steps=2 * epoch)
    assert answer.pays
    assert answer.build_flops == examples * 90
    assert answer.saved_flops == N * 90
    assert answer.steps == epoch + 1
    assert answer.nbytes == examples * 12
    whole = account.flops(frozen).total
    assert answer.step_ratio == (whole - N * 90) / whole
    # In the first epoch everything is computed anyway.
    assert not break_even(account, cache, examples=examples, steps=epoch).pays
    assert break_even(account, cache, examples=examples, steps=epoch + 1).pays
    assert not break_even(account, cache, examples=examples, steps=10 * epoch, budget=1199).pays
    assert break_even(account, cache, examples=examples, steps=10 * epoch, budget=1200).pays
    # Moving 12 bytes costs a third of what it saves: 90 + 30 for the first, 60 saved from then on.
    slow = break_even(account, cache, examples=examples, steps=2 * epoch, flops_per_byte=2.5)
    assert (slow.steps, slow.pays) == (2 * epoch + 1, False)
    assert break_even(account, cache, examples=examples, steps=10**6, flops_per_byte=7.5).steps is None
    views = PrefixCache(PARAMS, frozen, mlp, *inputs, views=3)
    assert break_even(account, views, examples=examples, steps=4 * epoch).steps == 3 * epoch + 1
    with pytest.raises(ValueError, match="steps: got -1"):
        break_even(account, cache, examples=examples, steps=-1)
