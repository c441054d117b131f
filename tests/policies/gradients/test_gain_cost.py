"""What measurements of gain cost, in FLOPs that XLA counts, and whose shares of the cost of a step it takes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths

WIDTHS = (16, 32, 32, 32, 8)
X = jnp.asarray(np.random.default_rng(0).normal(size=(32, WIDTHS[0])), jnp.float32)


def loss_fn(model, x):
    return jnp.mean(jnp.square(model(x)))


@pytest.fixture(scope="module")
def model():
    rngs = nnx.Rngs(0)
    parts = [nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(WIDTHS)]
    return nnx.Sequential(*[part for linear in parts for part in (linear, jnp.tanh)])


@pytest.fixture(scope="module")
def account(model):
    layers = sfj.nnx.find_layers(model, X)
    return sfj.nnx.account(model, layers, loss_fn, X, tx=optax.sgd(0.1, momentum=0.9))


@pytest.mark.slow
@pytest.mark.parametrize("returns", [False, True])
def test_measurements_take_about_a_hundredth_of_the_run(model, account, returns):
    gradients = sfj.nnx.gradient_probe(model, loss_fn, lambda number: (X,))
    params, total_steps, measured = nnx.to_pure_dict(nnx.state(model, nnx.Param)), 3000, []

    def counted(params, number):
        measured.append(number)
        return gradients(params, number)

    policy = sfj.policies.gain(counted, total_steps=total_steps, factor=0.0, returns=returns)
    state = policy.init(account.layers, params)
    for step in range(1, total_steps + 1):
        _, state = policy.update(state, account.layers, step=step, params=lambda: params)
    each = sfj.program_cost(jax.jit(lambda params: gradients(params, 0)), params).flops
    step = account.flops().total
    assert 0.8 * step < each < step  # the update is not in it
    assert 0.007 < len(measured) * each / (total_steps * step) < 0.01
    assert measured == list(range(len(measured)))


def test_short_runs_have_room_for_two_windows():
    def steps(total_steps, **options):
        policy = sfj.policies.gain(lambda params, number: params, total_steps=total_steps, **options)
        return policy.options["measure_every"]

    assert [steps(n) for n in (100_000, 1600, 1335, 160)] == [100, 100, 83, 10]
    assert steps(1335, measuring=sfj.policies.Measuring(window=4)) == 100
    assert steps(1335, measuring=sfj.policies.Measuring(every=7)) == 7


@pytest.mark.parametrize("told", [True, False])
def test_what_a_front_saves_is_the_accounts_where_there_is_one(model, account, told):
    """Of the second layer the first one's freezing saves the gradient that leads to it: more than twice its forward."""
    layers = account.layers
    falls = dict(zip(layers.names, (0.16, 0.5, 0.17, 0.17), strict=True))
    forward = {name: account.flops().by_layer[name].forward for name in layers.names}
    first = sfj.Frozen(layers, frozenset(layers.names[:1]))
    assert 2 * forward[layers.names[0]] / (3 * sum(forward.values())) < 0.16 < account.saving(first)

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    of_layer = {param: layer for layer in layers for param in layer.params}
    sizes = {layer.name: sum(paths.flatten(params)[param].size for param in layer.params) for layer in layers}

    def gradients(params, number):
        def slope(name, leaf):  # against an update of -1
            return jnp.full(leaf.shape, falls[of_layer[name].name] / sizes[of_layer[name].name])

        return paths.tree_map(slope, params)

    measuring = sfj.policies.Measuring(every=2, window=2, errors=0.0)
    costs = None if told else forward
    policy = sfj.policies.gain(gradients, total_steps=8, factor=1.0, measuring=measuring, costs=costs)
    freezer = sfj.Freezer(policy, layers, params, saving=account.saving)
    for _ in range(7):
        params = jax.tree.map(lambda leaf: leaf - 1, params)
        freezer.observe(lambda now=params: now)
    assert freezer.frozen.names == (first.names if told else frozenset())
