"""Losses of which activations cannot be kept are refused, and the error says why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax.caching.prefix_cache import PrefixCache
from tests.support.prefix_caches import PARAMS, N, X, Y, cached, check, frozen_of, mlp
from tests.support.rounding import assert_close

pytestmark = pytest.mark.usefixtures("jax_defaults")


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


def test_activations_that_depend_on_the_number_of_examples():
    def loss_fn(params, x, y):
        h = jax.jit(lambda x: jnp.tanh(x @ params["w0"]) / len(x))(x)
        return jnp.square(h @ params["w1"] @ params["w2"] @ params["w3"] - y).mean()

    cache = check(loss_fn, PARAMS, (X, Y), ["w0", "w1"])
    with pytest.raises(ValueError, match=r"a batch of 2 gives other .* of 4 \(2.0 stands where that has 4.0\); take"):
        cache.activations(PARAMS, X[:2], Y[:2])


def of_features(make):
    """A loss in which something is done to the first layer's results."""

    def loss_fn(params, x, y):
        h = make(jnp.tanh(x @ params["w0"]), params["w0"])
        return jnp.square(h @ params["w1"] @ params["w2"] @ params["w3"] - y).mean()

    return loss_fn


def in_a_loop(h):
    def body(carry, column):
        return carry + column / jnp.ones_like(column).sum(), None

    return h + jax.lax.scan(body, jnp.zeros(len(h)), h.T)[0][:, None]


COUNTS = {
    "mask": lambda h, w: h / jnp.ones(len(h)).sum(),
    "mask of all values": lambda h, w: h / jnp.ones_like(h).sum(),
    "mask by product": lambda h, w: h / (jnp.ones(len(h)) @ jnp.ones(len(h))),
    "positions": lambda h, w: h / jnp.arange(1.0, len(h) + 1).max(),
    "last position": lambda h, w: h / jnp.arange(1.0, len(h) + 1)[-1],
    "weights": lambda h, w: h * jnp.broadcast_to(w[0], h.shape).sum(0),
    "power": lambda h, w: h ** len(h),
    "shift": lambda h, w: jnp.roll(h, len(h), axis=1),
    "array": lambda h, w: h * np.full((5,), len(h), np.float32),
    "part of a table": lambda h, w: h * jnp.arange(8.0)[len(h)],
    "part of the weights": lambda h, w: h * w[: len(h), 0].sum(),
    "in a function": lambda h, w: jax.checkpoint(jax.jit(lambda h: h / jnp.ones(len(h)).sum()))(h),
    "given by a function": lambda h, w: h * jax.checkpoint(lambda h: (h.sum(1), float(len(h))))(h)[1],
    "branch in Python": lambda h, w: h + (w[0] if len(h) > N else w[1]),
    "in a loop": lambda h, w: in_a_loop(h),
    "reduced by a function of one's own": lambda h, w: h / jax.lax.reduce(
        jnp.ones(len(h)), jnp.float32(0), lambda a, b: a + 1.0 * b, (0,)
    ),
}  # fmt: skip
APART = {
    "mask": lambda h, w: jnp.where(jnp.ones_like(h, dtype=bool), h, 0.0),
    "token": lambda h, w: jnp.concatenate([jnp.broadcast_to(w[0, :1], (len(h), 1)), h], axis=1)[:, 1:],
    "share of a mask": lambda h, w: h * (jnp.ones_like(h) / jnp.ones_like(h).sum(1, keepdims=True)),
    "merged": lambda h, w: (h.reshape(len(h) * 5, 1) * jnp.ones((len(h) * 5, 1))).reshape(h.shape),
    "loop": lambda h, w: h + jax.lax.scan(lambda c, v: (c + v, None), jnp.zeros(len(h)), h.T)[0][:, None],
    "lookup": lambda h, w: h + jnp.eye(5)[jnp.zeros(len(h), int)] + w[h.argmax(1)],
    "reduced": lambda h, w: h + jax.lax.reduce(h, jnp.float32(-9), lambda a, b: jnp.logaddexp(a, b), (1,))[:, None],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_the_number_of_examples_is_noticed(name):
    loss_fn, many = of_features(COUNTS[name]), (jnp.tile(X, (2, 1)), jnp.tile(Y, (2, 1)))
    cache = check(loss_fn, PARAMS, many, ["w0", "w1"])
    assert cache._loss.part == 2 * N  # not a quarter
    with pytest.raises(ValueError, match="frozen layers compute with the number of examples"):
        cache.activations(PARAMS, X, Y)


@pytest.mark.slow
@pytest.mark.parametrize("name", APART)
def test_what_there_is_of_for_each_example_is_no_number_of_examples(name):
    loss_fn, many = of_features(APART[name]), (jnp.tile(X, (2, 1)), jnp.tile(Y, (2, 1)))
    cache = check(loss_fn, PARAMS, many, ["w0", "w1"])
    assert cache._loss.part == 2
    for few, all_of_it in zip(cache.activations(PARAMS, X, Y), cache.activations(PARAMS, *many), strict=True):
        assert_close(few, all_of_it[:N])


def test_a_loss_that_takes_batches_of_one_size_alone():
    cache = check(of_features(lambda h, w: h.reshape(N, 5)), PARAMS, (X, Y), ["w0", "w1"])
    assert cache._loss.part == N


def test_a_reduction_of_ones_own_over_the_examples():
    def over_examples(h, w):
        return h / jax.lax.reduce(h, jnp.float32(0), lambda a, b: a + 1.0 * b, (0,))

    with pytest.raises(ValueError, match="a reduction over the examples"):
        cached(of_features(over_examples), PARAMS, (X, Y), ["w0", "w1"])


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
