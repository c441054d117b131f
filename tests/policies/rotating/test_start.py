"""What a policy has frozen from the beginning, at every door."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import smartfrz_jax as sfj

X = jnp.ones((4, 8))
POLICIES = {
    "static_prefix": lambda: sfj.static_prefix([(0.0, 0.6)], total_steps=10),
    "badam": lambda: sfj.policies.badam(5, order="descending", keep=()),
    "lisa": lambda: sfj.policies.lisa(1, switch_every=5, keep=()),
    "slimfit": lambda: sfj.policies.slimfit(0.5, switch_every=5),
}
every = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)

pytestmark = pytest.mark.usefixtures("jax_defaults")


def model_of():
    return nnx.Sequential(*[nnx.Linear(8, 8, rngs=nnx.Rngs(number)) for number in range(4)])


def nnx_run(policy):
    model = model_of()
    optimizer = sfj.nnx.Optimizer(model, optax.adam(0.1), layers=sfj.nnx.find_layers(model, X))
    return model, optimizer, sfj.nnx.Freezer(model, optimizer, policy)


@nnx.jit
def nnx_step(model, optimizer):
    loss, grads = optimizer.value_and_grad(lambda model: (model(X) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss


def size(opt_state):
    return sum(leaf.size for leaf in jax.tree.leaves(opt_state))


@every
@pytest.mark.slow
def test_nnx(make):
    model, optimizer, freezer = nnx_run(make())
    whole = size(nnx.state(optimizer.opt_state))
    frozen = freezer.start()
    assert frozen.names
    assert frozen == optimizer.frozen == freezer.frozen
    assert freezer.events[0].step == 0
    assert size(nnx.state(optimizer.opt_state)) < 0.7 * whole
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    nnx_step(model, optimizer)
    freezer.step()
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    held = {name for name in freezer.layers.names if name in frozen.names}
    for number in range(4):
        same = np.array_equal(after["layers"][number]["kernel"], before["layers"][number]["kernel"])
        assert same == (f"layers/{number}" in held)
    assert freezer.frozen == frozen  # what the policy decides after the step is the same


@every
def test_bare_parameters(make):
    layers = sfj.find_layers(
        {str(n): jnp.ones((8, 8)) for n in range(4)}, lambda p, x: x @ p["0"] @ p["1"] @ p["2"] @ p["3"], X
    )
    params = {str(n): jnp.ones((8, 8)) for n in range(4)}
    freezer = sfj.Freezer(make(), layers, params)
    frozen = freezer.start()
    assert frozen.names
    assert freezer.start() is frozen
    assert freezer.observe(lambda: params) is frozen


@pytest.mark.slow
def test_linen():
    net = nn.Sequential([nn.Dense(8) for _ in range(4)])
    variables = net.init(jax.random.key(0), X)
    state = sfj.linen.TrainState.create(
        apply_fn=net.apply,
        params=variables["params"],
        tx=optax.adam(0.1),
        layers=sfj.linen.find_layers(net, variables, X),
    )
    whole = size(state.opt_state)
    freezer = sfj.linen.Freezer(state, POLICIES["badam"]())
    state = freezer.start(state)
    assert state.frozen.names == {"layers_0", "layers_1", "layers_2"}
    assert size(state.opt_state) < 0.5 * whole
    grads = jax.grad(state.with_frozen(lambda params: (state.apply_fn({"params": params}, X) ** 2).mean()))(
        state.params
    )
    state = freezer.step(state.apply_gradients(grads=grads))
    assert state.frozen == freezer.frozen


def test_what_is_frozen_by_hand_stays_so_and_is_not_undone():
    params = {name: jnp.ones((8, 8)) for name in "abcd"}
    layers = sfj.find_layers(params, lambda p, x: x @ p["a"] @ p["b"] @ p["c"] @ p["d"], X)
    frozen = sfj.Frozen(layers, frozenset("d"))
    freezer = sfj.Freezer(POLICIES["badam"](), layers, params, frozen=frozen)
    assert freezer.start().names == set("abcd")


@pytest.mark.parametrize("make", [sfj.policies.never, lambda: sfj.progress(total_steps=100)])
def test_policies_that_begin_with_nothing(make):
    params = {name: jnp.ones((8, 8)) for name in "ab"}
    layers = sfj.find_layers(params, lambda p, x: x @ p["a"] @ p["b"], X)
    freezer = sfj.Freezer(make(), layers, params)
    assert freezer.start().names == set()
    assert freezer.events == []


@pytest.mark.slow
def test_a_run_that_has_begun_is_left_as_it_is(tmp_path):
    _, _, freezer = nnx_run(POLICIES["badam"]())
    freezer.start()
    freezer.save(tmp_path / "run")
    _, optimizer, again = nnx_run(POLICIES["badam"]())
    again.start()
    again.restore(tmp_path / "run")
    assert again.start() == freezer.frozen == optimizer.frozen
    assert again.events == freezer.events


BY_HAND = {"never": (sfj.policies.never, {"layers/1"}), "badam": (POLICIES["badam"], {"layers/0", "layers/1"})}


@pytest.mark.parametrize(("make", "later"), BY_HAND.values(), ids=BY_HAND)
@pytest.mark.slow
def test_what_was_frozen_by_hand_after_the_freezer_was_made_stays_so(make, later):
    """For NNX, and for Linen; ``layers/0`` of badam is frozen by hand as well."""
    model, optimizer, freezer = nnx_run(make())
    optimizer.freeze(model, sorted(later))
    frozen = freezer.start()
    assert frozen == optimizer.frozen
    assert frozen.names >= later
    assert {name for event in freezer.events for name in event.names} == frozen.names
    params = {str(n): jnp.ones((8, 8)) for n in range(4)}
    layers = sfj.find_layers(params, lambda p, x: x @ p["0"] @ p["1"] @ p["2"] @ p["3"], X)
    state = sfj.linen.TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1), layers=layers)
    freezer = sfj.linen.Freezer(state, make())
    names = {name.removeprefix("layers/") for name in later}
    state = freezer.start(state.freeze(sorted(names)))
    assert state.frozen == freezer.frozen
    assert state.frozen.names == {name.removeprefix("layers/") for name in frozen.names}
    for _ in range(12):  # through three turns of badam
        state = freezer.step(state.apply_gradients(grads=params))
        assert state.frozen.names >= names
