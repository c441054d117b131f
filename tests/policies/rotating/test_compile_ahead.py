"""Layers that take turns: the programs of all sets, compiled ahead."""

import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj

pytestmark = pytest.mark.usefixtures("jax_defaults")

X = jnp.ones((4, 8))
TX = optax.adam(0.1)
POLICIES = {
    "badam": lambda: sfj.policies.badam(2, keep=()),
    "hift": lambda: sfj.policies.hift(2),
    "lisa": lambda: sfj.policies.lisa(1, switch_every=3, max_sets=3, keep=()),
}
every = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)


def train_step(model, optimizer):
    loss, grads = optimizer.value_and_grad(lambda model: (model(X) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss


def nnx_run(policy, **options):
    model = nnx.Sequential(*[nnx.Linear(8, 8, rngs=nnx.Rngs(number)) for number in range(4)])
    optimizer = sfj.nnx.Optimizer(model, TX, layers=sfj.nnx.find_layers(model, X), frozen=policy)
    step = sfj.TrainStep(train_step)
    freezer = sfj.nnx.Freezer(model, optimizer, policy, train_step=step, **options)
    freezer.start()
    return model, optimizer, step, freezer


@every
@pytest.mark.slow
def test_no_turn_waits_for_a_program(make):
    model, optimizer, step, freezer = nnx_run(make())
    step(model, optimizer)
    freezer.step()
    wait = freezer.compile_ahead(20)
    wait()
    sets = {optimizer.frozen}
    for _ in range(20):
        step(model, optimizer)
        freezer.step()
        sets.add(optimizer.frozen)
    assert len(sets) > 1
    assert [program.ahead for program in step.programs] == [False, *[True] * (len(step.programs) - 1)]
    assert {program.frozen for program in step.programs} <= sets


@pytest.mark.slow
def test_linen_compiles_ahead_too():
    def apply_fn(params, x):
        return x @ params["a"] @ params["b"] @ params["c"]

    def step_fn(state, x):
        loss, grads = state.value_and_grad(lambda params: (state.apply_fn(params, x) ** 2).mean())(state.params)
        return state.apply_gradients(grads=grads), loss

    policy, params = POLICIES["badam"](), {name: jnp.eye(8) for name in "abc"}
    layers = sfj.find_layers(params, apply_fn, X)
    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=params, tx=TX, layers=layers, frozen=policy)
    step = sfj.TrainStep(step_fn)
    freezer = sfj.linen.Freezer(state, policy, train_step=step)
    state, _ = step(state, X)
    state = freezer.step(state)
    freezer.compile_ahead(state, 10)()
    for _ in range(10):
        state, _ = step(state, X)
        state = freezer.step(state)
    assert [program.ahead for program in step.programs] == [False, True, True]


@pytest.mark.parametrize("lead", [0, 1])
@every
def test_the_sets_to_come_are_those_that_come(make, lead):
    params = {name: jnp.eye(8) for name in "abcd"}
    layers = sfj.find_layers(params, lambda p, x: x @ p["a"] @ p["b"] @ p["c"] @ p["d"], X)
    freezer = sfj.Freezer(make(), layers, params, lead=lead)
    freezer.start()
    freezer.observe(lambda: params)
    expected, events = freezer.sets_to_come(15), list(freezer.events)
    assert freezer.steps == 1
    assert freezer.events == events
    came = [freezer.frozen, *(freezer.observe(lambda: params) for _ in range(15))]
    assert expected == list(dict.fromkeys(came))
    assert len(expected) > 1


@pytest.mark.slow
def test_a_pending_decision_of_a_checkpoint_is_still_prepared(tmp_path):
    params, prepared = {name: jnp.eye(8) for name in "abcd"}, []
    layers = sfj.find_layers(params, lambda p, x: x @ p["a"] @ p["b"] @ p["c"] @ p["d"], X)
    freezer, again = (sfj.Freezer(POLICIES["badam"](), layers, params, lead=2) for _ in range(2))
    freezer.start()
    for _ in range(2):
        freezer.observe(lambda: params)
    freezer.save_run(tmp_path / "run", params)
    again.restore_run(tmp_path / "run", params)
    pending = again.pending.frozen
    assert pending in again.sets_to_come(5)
    for _ in range(2):
        again.observe(lambda: params, prepare=prepared.append)
    assert prepared == [pending]
    assert again.frozen == pending


@pytest.mark.parametrize(
    "policy",
    [sfj.policies.slimfit(0.5, switch_every=2), sfj.policies.grades(0.1, total_steps=10)],
    ids=["slimfit", "grades"],
)
def test_a_policy_that_looks_at_the_network_is_refused(policy):
    params = {name: jnp.eye(8) for name in "abcd"}
    layers = sfj.find_layers(params, lambda p, x: x @ p["a"] @ p["b"] @ p["c"] @ p["d"], X)
    freezer = sfj.Freezer(policy, layers, params)
    freezer.start()
    with pytest.raises(ValueError, match="policy: looks at the network"):
        freezer.sets_to_come(5)
    assert freezer.steps == 0


def test_without_a_train_step_there_is_nothing_to_compile():
    model, optimizer, _, _ = nnx_run(POLICIES["badam"]())
    policy = POLICIES["badam"]()
    with pytest.raises(TypeError, match="train_step: got NoneType None, expected a TrainStep"):
        sfj.nnx.Freezer(model, optimizer, policy).compile_ahead(5)
