"""Where parameters meet the data: their order, whatever the forward pass is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax.layers import dataflow
from tests.layers.small_functions import SQUARE, X, plain


def normal(*shape: int) -> jax.Array:
    """The same for every call, so that no test depends on which ran before it."""
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), jnp.float32)


def order(forward, params, *inputs) -> list[str]:
    first = dataflow.consumption(forward, params, *inputs).first
    return sorted(first, key=lambda name: first[name])


@jax.custom_jvp
def twice(w, x):
    return 2.0 * x @ w


@twice.defjvp
def _twice_jvp(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return twice(w, x), 2.0 * (x @ dw + dx @ w)


@jax.custom_vjp
def thrice(w, x):
    return 3.0 * x @ w


thrice.defvjp(lambda w, x: (thrice(w, x), (w, x)), lambda res, g: (3.0 * res[1].T @ g, 3.0 * g @ res[0].T))


def with_casts(p, x):
    p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)  # all casts come before the first use, in dict order
    return (x.astype(jnp.bfloat16) @ p["b"] @ p["c"] @ p["a"]).astype(jnp.float32)


def with_reparameterisation(p, x):
    p = {name: (w / jnp.sqrt(jnp.sum(w**2))).T.reshape(3, 3) for name, w in p.items()}  # weight normalisation
    return plain(p, x)


def with_masked_product(p, x):
    product = p["a"] @ p["c"]  # meets no data yet: the product is consumed after b
    return x @ p["b"] @ product


def with_jit(p, x):
    inner = jax.jit(lambda w, x: x @ w)
    return inner(p["a"], jax.jit(lambda p, x: inner(p["c"], inner(p["b"], x)))(p, x))


def with_remat(p, x):
    return jax.checkpoint(lambda p, x: jax.checkpoint(lambda x: jnp.sin(x @ p["b"]))(x) @ p["c"])(p, x) @ p["a"]


def with_custom_rules(p, x):
    return thrice(p["a"], twice(p["c"], jax.nn.relu(x @ p["b"])))


def with_cond(p, x):
    def both(p, x):
        return x @ p["b"] @ p["c"]

    return jax.lax.cond(x[0, 0] > 0, both, lambda p, x: x @ p["b"], p, x) @ p["a"]


def with_unused_arguments(p, x):
    @jax.custom_jvp
    def second(p, x):
        return x @ p["c"]

    second.defjvp(lambda primals, tangents: (second(*primals), second(*tangents)))
    first = jax.checkpoint(lambda p, x: x @ p["b"], policy=jax.checkpoint_policies.everything_saveable)
    return second(p, first(p, x)) @ p["a"]


def with_scan(p, x):
    def body(x, _):
        return x @ p["b"] @ p["c"], None

    return jax.lax.scan(body, x, None, length=2)[0] @ p["a"]


def with_while(p, x):
    def body(carry):
        i, x = carry
        return i + 1, x @ p["b"] @ p["c"]

    return jax.lax.while_loop(lambda carry: carry[0] < 2, body, (0, x))[1] @ p["a"]


def with_vmap_and_map(p, x):
    return jax.lax.map(lambda row: row @ p["b"] @ p["c"], x) @ p["a"]


def with_stacked_weights(p, x):
    def body(x, weights):
        return jnp.sin(x @ weights[0]) @ weights[1], None

    return jax.lax.scan(body, x, (p["b"][None], p["c"][None]))[0] @ p["a"]


def with_recurrence(p, x):
    def body(carry, row):  # neither part of the carry depends on data before the second turn
        new, _ = carry
        return (jnp.tanh(row @ p["b"]), new @ p["c"]), None

    old = jax.lax.scan(body, (jnp.zeros(3), jnp.zeros(3)), x)[0][1]
    return old @ p["a"]


FORWARDS = [
    plain,
    with_casts,
    with_reparameterisation,
    with_jit,
    with_remat,
    with_custom_rules,
    with_cond,
    with_unused_arguments,
    with_scan,
    with_while,
    with_vmap_and_map,
    with_stacked_weights,
    with_recurrence,
]


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["bare", "jit", "remat"])
def test_parameters_come_in_the_order_of_use(forward, wrap):
    assert order(wrap(forward), SQUARE, X) == ["b", "c", "a"]


@pytest.mark.parametrize("forward", FORWARDS[:6], ids=lambda forward: forward.__name__)
def test_sources_are_the_parameters_combined_just_before(forward):
    sources = dataflow.consumption(forward, SQUARE, X).sources
    assert sources == {"b": frozenset(), "c": frozenset("b"), "a": frozenset("c")}


def test_product_of_weights_is_used_where_it_meets_data():
    used = dataflow.consumption(with_masked_product, SQUARE, X)
    assert used.first["b"] < used.first["a"] == used.first["c"]
    assert used.sources["a"] == used.sources["c"] == {"b"}


def test_residual_branches_are_all_sources():
    def forward(p, x):
        return (x @ p["b"] + x @ p["c"]) @ p["a"]

    assert dataflow.consumption(forward, SQUARE, X).sources["a"] == {"b", "c"}


def test_unused_parameters_and_those_without_data_are_missing():
    def forward(p, x):
        return x @ p["b"], jnp.sum(p["a"] ** 2)

    assert set(dataflow.consumption(forward, SQUARE, X).first) == {"b"}


def test_shared_parameter_has_first_and_last_use():
    used = dataflow.consumption(lambda p, x: x @ p["a"] @ p["b"] @ p["a"].T, SQUARE, X)
    assert used.first["a"] < used.first["b"]
    assert used.last["a"] > used.last["b"]


def test_what_is_used_between_the_uses_of_a_shared_parameter():
    tied = dataflow.consumption(lambda p, x: x @ p["a"] @ p["b"] @ p["c"] @ p["a"].T, SQUARE, X)
    assert tied.between == {"a": {"b", "c"}}
    assert tied.used_again(["a", "b"]) == {"a": {"c"}}
    assert tied.used_again(["a", "b", "c"]) == {}
    # Blocks that share their weights all end later than they begin.
    shared = dataflow.consumption(lambda p, x: x @ p["a"] @ p["b"] @ p["a"] @ p["b"] @ p["c"], SQUARE, X)
    assert not shared.used_again(["a"])
    # Of two inputs, the second does not come from what the first has become.
    twins = dataflow.consumption(lambda p, x, y: (x @ p["a"] @ p["b"] @ p["c"], y @ p["a"] @ p["b"]), SQUARE, X, X)
    assert not any(twins.used_again([name]) for name in "abc")


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["bare", "jit", "remat"])
@pytest.mark.parametrize("name", ["penalty", "penalty of each example", "gradient"])
def test_backward_passes_and_penalties_are_no_uses_behind_the_others(name, wrap):
    def energy(p, x):
        return jnp.sum(jnp.tanh(twice(p["b"], jnp.sin(x @ p["a"]))) @ p["c"], 1)

    def penalised(p, x):
        return jnp.sum(energy(p, x)) + 0.1 * jnp.sum(p["a"] ** 2)

    forwards = {
        "penalty": penalised,
        "penalty of each example": lambda p, x: (energy(p, x) + 0.1 * jnp.sum(p["a"] ** 2)[None]).mean(),
        "gradient": lambda p, x: jax.grad(lambda x: jnp.sum(energy(p, x)))(x),
    }
    params = {name: normal(3, 3) for name in "abc"}
    used = dataflow.consumption(wrap(forwards[name]), params, X)
    assert sorted(used.last, key=lambda name: used.last[name]) == ["a", "b", "c"]
    assert not any(used.between.values())


def test_closed_over_data_count_when_no_input_is_given():
    assert order(lambda p: plain(p, X), SQUARE) == ["b", "c", "a"]


def test_closed_over_constants_are_not_data_when_inputs_are_given():
    constant = normal(3, 3)

    def forward(p, x):
        return x @ p["b"] @ (constant @ p["a"])

    assert order(forward, SQUARE, X) == ["b", "a"]


def test_abstract_arguments_and_random_keys():
    abstract = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), SQUARE)

    def forward(p, x, key):
        return plain(p, jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0))

    key = jax.eval_shape(lambda: jax.random.key(0))
    assert order(forward, abstract, jax.ShapeDtypeStruct((2, 3), jnp.float32), key) == ["b", "c", "a"]
