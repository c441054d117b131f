"""A loss split at the end of its frozen layers gives the same, and computes only what trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smartfrz_jax as sfj
from smartfrz_jax.caching.prefix_cache import PrefixCache
from tests.support.prefix_caches import PARAMS, N, X, Y, cached, check, frozen_of, mlp
from tests.support.rounding import assert_close

pytestmark = pytest.mark.usefixtures("jax_defaults")


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
