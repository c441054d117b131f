"""An optimizer that is made with layers frozen: no state of them at any time, and the same run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.core import Tracer

import smartfrz_jax as sfj
from smartfrz_jax.freezing import migrate

pytestmark = pytest.mark.usefixtures("jax_defaults")

X = jnp.ones((4, 8))
TX = optax.adamw(0.1)
POLICIES = {
    "static_prefix": lambda: sfj.static_prefix([(0.0, 0.6)], total_steps=10),
    "badam": lambda: sfj.policies.badam(2, order="descending", keep=()),
    "lisa": lambda: sfj.policies.lisa(1, switch_every=2, keep=()),
    "slimfit": lambda: sfj.policies.slimfit(0.5, switch_every=2),
}
every = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
kept_or_not = pytest.mark.parametrize("returning", ["fresh", "kept"])


def nnx_run(policy, returning, *, begins):
    model = nnx.Sequential(*[nnx.Linear(8, 8, rngs=nnx.Rngs(number)) for number in range(4)])
    layers = sfj.nnx.find_layers(model, X)
    optimizer = sfj.nnx.Optimizer(model, TX, layers=layers, returning=returning, frozen=policy if begins else ())
    return model, optimizer, sfj.nnx.Freezer(model, optimizer, policy)


def train(model, optimizer, freezer, steps=7):
    for _ in range(steps):
        _, grads = optimizer.value_and_grad(lambda model: (model(X) ** 2).mean())(model)
        optimizer.update(model, grads)
        freezer.step()


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def elements(optimizer):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(optimizer.opt_state)))


@every
@kept_or_not
@pytest.mark.slow
def test_the_run_is_that_of_an_optimizer_that_is_made_with_all(make, returning):
    model, optimizer, freezer = nnx_run(make(), returning, begins=True)
    other, whole, another = nnx_run(make(), returning, begins=False)
    held = elements(optimizer)
    assert freezer.start() == another.start() == optimizer.frozen
    assert freezer.frozen.names
    assert freezer.events == another.events
    assert held == elements(optimizer) == elements(whole)
    for each in ((model, optimizer, freezer), (other, whole, another)):
        train(*each)
    assert freezer.events == another.events
    for got, expected in ((model, other), (optimizer.opt_state, whole.opt_state)):
        for a, b in zip(arrays(nnx.state(got)), arrays(nnx.state(expected)), strict=True):
            np.testing.assert_array_equal(a, b)


@every
def test_without_start_the_policy_goes_on_deciding(make):
    model, optimizer, freezer = nnx_run(make(), "fresh", begins=True)
    other, whole, another = nnx_run(make(), "fresh", begins=True)
    another.start()
    for each in ((model, optimizer, freezer), (other, whole, another)):
        train(*each)
    assert optimizer.frozen == whole.frozen
    assert freezer.events == another.events[1:]
    for a, b in zip(arrays(nnx.state(model)), arrays(nnx.state(other)), strict=True):
        np.testing.assert_array_equal(a, b)


@every
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_freezer_that_is_made_later_goes_on_deciding(make, by_hand):
    """As where a first step compiles, or a run goes on from a checkpoint that is not the library's."""
    model, optimizer, freezer = nnx_run(make(), "fresh", begins=True)
    other, later, _ = nnx_run(make(), "fresh", begins=True)
    active = [layer.name for layer in optimizer.frozen.layers if layer.name not in optimizer.frozen.names]
    if by_hand:  # of that it does not decide
        optimizer.freeze(model, active[:1])
        later.freeze(other, active[:1])
    train(model, optimizer, freezer, steps=8)
    for _ in range(3):
        _, grads = later.value_and_grad(lambda model: (model(X) ** 2).mean())(other)
        later.update(other, grads)
    after = sfj.nnx.Freezer(other, later, make())
    train(other, later, after, steps=5)
    assert later.frozen == optimizer.frozen
    assert not by_hand or active[0] in later.frozen.names


def test_another_policy_may_follow_on_the_one_with_which_it_began():
    model, optimizer, freezer = nnx_run(POLICIES["static_prefix"](), "fresh", begins=True)
    train(model, optimizer, freezer, steps=2)
    frozen = optimizer.frozen
    train(model, optimizer, sfj.nnx.Freezer(model, optimizer, sfj.policies.never()), steps=2)
    assert optimizer.frozen == frozen  # to the new one they are frozen by hand


@pytest.mark.parametrize("begins", [["layers/0"], "layers/[01]", sfj.policies.badam(5, order="ascending", keep=())])
def test_linen_and_nnx_begin_with_the_same(begins):
    model, _, _ = nnx_run(sfj.policies.never(), "fresh", begins=False)
    graphdef, params = nnx.split(model)
    params = nnx.as_pure(params)
    layers = sfj.nnx.find_layers(model, X)
    optimizer = sfj.nnx.Optimizer(model, TX, layers=layers, frozen=begins)
    state = sfj.linen.TrainState.create(
        apply_fn=lambda params, x: nnx.merge(graphdef, params)(x), params=params, tx=TX, layers=layers, frozen=begins
    )
    assert optimizer.frozen == state.frozen
    assert optimizer.frozen.names
    made = jax.tree.leaves(nnx.as_pure(nnx.state(optimizer.opt_state)))
    assert sum(leaf.size for leaf in made) == sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    # Two moments of each active parameter, and the count of adamw.
    assert elements(optimizer) == 1 + 2 * sum(leaf.size for leaf in optimizer.frozen.active_leaves(params).values())


def test_linen_goes_on_by_the_policy():
    policy = sfj.policies.badam(1, order="descending", keep=())
    params = {name: jnp.eye(8) for name in "abcd"}

    def apply_fn(params, x):
        return x @ params["a"] @ params["b"] @ params["c"] @ params["d"]

    layers = sfj.find_layers(params, apply_fn, X)
    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=params, tx=TX, layers=layers, frozen=policy)
    assert state.frozen.names == set("abc")
    freezer = sfj.linen.Freezer(state, policy)
    state = freezer.start(state)
    assert [event.names for event in freezer.events] == [("a", "b", "c")]
    state = freezer.step(state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params)))
    assert state.frozen.names == set("abd")


@kept_or_not
@pytest.mark.slow
def test_rows_of_stacked_blocks(returning):
    def loss(params, x):
        x, _ = jax.lax.scan(lambda x, row: (jnp.tanh(x @ row), None), x, params["blocks"])
        return jnp.square(x @ params["head"]).mean()

    params = {"blocks": jnp.stack([jnp.eye(8)] * 4), "head": jnp.ones((8, 8))}
    layers = sfj.find_layers(params, loss, X, rows=True)
    grads, runs = jax.tree.map(jnp.ones_like, params), []
    for begins in (True, False):
        policy = sfj.policies.badam(2, order="descending")
        state = sfj.linen.TrainState.create(
            apply_fn=loss, params=params, tx=TX, layers=layers, returning=returning, frozen=policy if begins else ()
        )
        freezer = sfj.linen.Freezer(state, policy)
        held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
        assert held == 1 + 2 * 64 * (2 if begins else 5)  # the count; two moments of the last row, or of all, and head
        state = freezer.start(state)
        for _ in range(9):
            state = freezer.step(state.apply_gradients(grads=grads))
        runs.append((arrays((state.params, state.opt_state)), freezer.events))
    (got, events), (expected, others) = runs
    assert events == others
    assert len(events) > 4
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_layers_by_name_are_frozen_by_hand():
    policy = sfj.policies.badam(1, order="descending", keep=())
    model, _, _ = nnx_run(policy, "fresh", begins=False)
    layers = sfj.nnx.find_layers(model, X)
    optimizer = sfj.nnx.Optimizer(model, TX, layers=layers, frozen=["layers/3"])
    freezer = sfj.nnx.Freezer(model, optimizer, policy)
    assert freezer.start().names == set(layers.names)
    train(model, optimizer, freezer, steps=1)
    assert optimizer.frozen.names == {"layers/0", "layers/1", "layers/3"}


def test_more_by_hand_stays_frozen():
    policy = sfj.policies.badam(1, order="descending", keep=())
    model, optimizer, _ = nnx_run(policy, "fresh", begins=True)
    optimizer.freeze(model, ["layers/3"])
    freezer = sfj.nnx.Freezer(model, optimizer, policy)
    train(model, optimizer, freezer, steps=1)
    assert optimizer.frozen.names == {"layers/0", "layers/1", "layers/3"}


def test_freezing_makes_no_arrays_for_layers_that_stay():
    concrete = []

    def init(params):
        concrete.extend(not isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params))
        return TX.init(params)

    model, _, _ = nnx_run(sfj.policies.never(), "fresh", begins=False)
    tx = optax.GradientTransformationExtraArgs(init, TX.update)
    optimizer = sfj.nnx.Optimizer(model, tx, layers=sfj.nnx.find_layers(model, X))
    assert concrete
    assert all(concrete)
    concrete.clear()
    optimizer.freeze(model, ["layers/0"])
    assert concrete
    assert not any(concrete)


def test_layers_that_return_are_all_of_which_state_is_made():
    sizes = []

    def init(params):
        leaves = jax.tree.leaves(params)
        if not any(isinstance(leaf, Tracer) for leaf in leaves):
            sizes.append(sum(leaf.size for leaf in leaves))
        return TX.init(params)

    model, _, _ = nnx_run(sfj.policies.never(), "fresh", begins=False)
    tx = optax.GradientTransformationExtraArgs(init, TX.update)
    layers = sfj.nnx.find_layers(model, X)
    optimizer = sfj.nnx.Optimizer(model, tx, layers=layers, frozen=["layers/0", "layers/1"])
    train(model, optimizer, sfj.nnx.Freezer(model, optimizer, sfj.policies.never()), steps=1)
    before = dict(migrate.by_path(nnx.as_pure(nnx.state(optimizer.opt_state))))
    optimizer.freeze(model, sfj.Frozen(layers, ["layers/0"]))
    assert sizes == [2 * 72, 72]  # of two layers at first, of the one that returns then
    after = migrate.by_path(nnx.as_pure(nnx.state(optimizer.opt_state)))
    assert len(after) == len(before) + 4
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 5, 9])  # one turn, two, and all, so that some layers have trained, or all
def test_a_checkpoint_goes_on(tmp_path, steps):
    policy = POLICIES["badam"]
    model, optimizer, freezer = nnx_run(policy(), "kept", begins=True)
    freezer.start()
    train(model, optimizer, freezer, steps=steps)
    freezer.save(tmp_path / "run")
    other, whole, another = nnx_run(policy(), "kept", begins=True)
    another.start()
    another.restore(tmp_path / "run")
    for each in ((model, optimizer, freezer), (other, whole, another)):
        train(*each, steps=6)
    assert freezer.events == another.events
    for a, b in zip(arrays(nnx.state(model)), arrays(nnx.state(other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_policy_is_refused():
    model, optimizer, _ = nnx_run(POLICIES["badam"](), "fresh", begins=True)
    other = sfj.policies.badam(2, order="ascending", keep=())
    with pytest.raises(
        ValueError, match=r"policy: has layers/1, layers/2, layers/3 frozen from the beginning, expected"
    ):
        sfj.nnx.Freezer(model, optimizer, other)
    with pytest.raises(ValueError, match=r"policy: has nothing frozen from the beginning"):
        sfj.nnx.Freezer(model, optimizer, sfj.policies.never())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_checkpoint_of_linen_goes_on(tmp_path, steps):
    def apply_fn(params, x):
        return x @ params["a"] @ params["b"] @ params["c"] @ params["d"]

    params = {name: jnp.eye(8) for name in "abcd"}
    layers = sfj.find_layers(params, apply_fn, X)
    grads = jax.tree.map(jnp.ones_like, params)

    def begun():
        policy = sfj.policies.badam(1, order="descending", keep=())
        state = sfj.linen.TrainState.create(
            apply_fn=apply_fn, params=params, tx=TX, layers=layers, returning="kept", frozen=policy
        )
        freezer = sfj.linen.Freezer(state, policy)
        return freezer, freezer.start(state)

    def trained(freezer, state, steps):
        for _ in range(steps):
            state = freezer.step(state.apply_gradients(grads=grads))
        return state

    freezer, state = begun()
    state = trained(freezer, state, steps)
    freezer.save(tmp_path / "run", state)
    again, other = begun()
    other = again.restore(tmp_path / "run", other)
    assert other.kept.arrays.keys() == state.kept.arrays.keys()
    state, other = trained(freezer, state, 6), trained(again, other, 6)
    assert freezer.events == again.events
    for a, b in zip(arrays((state.params, state.opt_state)), arrays((other.params, other.opt_state)), strict=True):
        np.testing.assert_array_equal(a, b)
