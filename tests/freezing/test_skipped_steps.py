"""Steps that are skipped because a gradient or a loss is not finite are left out of what policies look at."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import dynamic_scale

from smartfrz_jax import Predictor, linen, policies
from smartfrz_jax import nnx as nnx_door
from smartfrz_jax.policies.base import MAX_CONSECUTIVE_ERRORS
from smartfrz_jax.predictor import PredictorConfig
from tests.optimizers.network import LAYERS, NAMES, PARAMS, X, arrays, loss

pytestmark = pytest.mark.usefixtures("jax_defaults")


def gradients(value):
    return {f"{name}/{leaf}": jnp.full_like(PARAMS[name][leaf], value) for name in NAMES for leaf in PARAMS[name]}


def autofreeze(values, **options):
    """States after each step: the gradient of every parameter is one number."""
    policy = policies.autofreeze(4, keep=(), **options)
    state, states = policy.init(LAYERS, PARAMS), []
    for step, value in enumerate(values, start=1):
        _, state = policy.update(state, LAYERS, step=step, params=lambda: PARAMS, grads=gradients(value))
        states.append(state)
    return states


SMALL = PredictorConfig(size=8, hidden=4, features=4, head_hidden=4)


def smartfrz(values, **options):
    """The state after steps with these losses."""
    schedule = policies.Schedule(record_every=4, window=5, **options)
    policy = policies.smartfrz(Predictor(SMALL, rngs=nnx.Rngs(0)), schedule=schedule)
    state = policy.init(LAYERS, PARAMS)
    for step, value in enumerate(values, start=1):
        _, state = policy.update(state, LAYERS, step=step, params=lambda: PARAMS, loss=jnp.float32(value))
    return state


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_autofreeze_takes_the_steps_that_are_left_for_the_interval(bad):
    whole, some = autofreeze([1.0, 2.0, 3.0, 2.0]), autofreeze([1.0, bad, 3.0, 2.0])
    np.testing.assert_allclose(some[-1].norms, whole[-1].norms, rtol=1e-6)
    np.testing.assert_array_equal(autofreeze([1.0, bad])[-1].accumulated["a/bias"], PARAMS["a"]["bias"] * 0 + 1)


def test_an_interval_without_any_step_is_not_evaluated():
    states = autofreeze([1.0] * 4 + [np.nan] * 4 + [1.0] * 4)
    assert [int(state.evaluations) for state in states[3::4]] == [1, 1, 2]
    assert not states[7].frozen.any()


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.slow
def test_smartfrz_takes_the_mean_of_the_losses_that_are_left(bad):
    state = smartfrz([2.0, bad, 4.0, bad] + 4 * [bad] + [1.0, bad, bad, 2.0])
    np.testing.assert_array_equal(state.losses, np.float32([np.nan, np.nan, 3.0, np.nan, 1.5]))
    assert state.first_loss == 3


RUNS = {"autofreeze": autofreeze, "smartfrz": smartfrz}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize(("options", "most"), [({}, MAX_CONSECUTIVE_ERRORS), ({"max_consecutive_errors": 8}, 8)])
def test_only_a_lasting_nan_ends_the_run(run, options, most):
    some = [1.0] + most * [np.nan]
    run(3 * some, **options)
    steps = 1 + most + 4 - (1 + most) % 4  # the next time that it is looked at
    with pytest.raises(
        FloatingPointError, match=rf"not finite in the {steps - 1} steps up to step {steps}, .*diverged"
    ):
        run([1.0] + (steps - 1) * [np.nan], **options)


@pytest.mark.parametrize(
    "make", [lambda **options: policies.autofreeze(4, **options), lambda **options: smartfrz([], **options)]
)
def test_the_option_is_checked(make):
    for wrong in (-1, 1.5):
        with pytest.raises(ValueError, match=r"max_consecutive_errors: got .*, expected an integer of at least 0"):
            make(max_consecutive_errors=wrong)


@pytest.mark.parametrize("kind", ["autofreeze", "smartfrz"])
def test_a_run_with_apply_if_finite_goes_on(kind):
    """Every third batch overflows; the run and what the policy saw of it are those of the others."""
    tx = optax.apply_if_finite(optax.sgd(0.1), 5)
    policy = (
        policies.autofreeze(3)
        if kind == "autofreeze"
        else policies.smartfrz(Predictor(SMALL, rngs=nnx.Rngs(0)), schedule=policies.Schedule(record_every=3, window=5))
    )
    state = linen.TrainState.create(apply_fn=None, params=PARAMS, tx=tx, layers=LAYERS, keep_grads=True)
    freezer = linen.Freezer(state, policy)

    @jax.jit
    def step(state, factor):
        value, grads = state.value_and_grad(lambda params: loss(params) * factor)(state.params)
        return state.apply_gradients(grads=grads), value

    for number in range(1, 10):
        state, value = step(state, jnp.float32(np.inf if number % 3 == 0 else 1))
        state = freezer.step(state, loss=value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    seen = freezer.policy_state.norms if kind == "autofreeze" else freezer.policy_state.losses[-3:]
    assert np.isfinite(seen).all()
    assert np.all(seen > 0)


def scaled_run(policy, steps, every=None):
    """A loop with Flax's DynamicScale; of every so many steps one has gradients that overflow, of a finite loss."""
    tx = optax.sgd(0.1, momentum=0.9)
    state = linen.TrainState.create(apply_fn=None, params=PARAMS, tx=tx, layers=LAYERS, keep_grads=True)
    freezer = linen.Freezer(state, policy)
    scale = dynamic_scale.DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(1024))

    @jax.jit
    def step(state, scale, slope):
        def steep(params):
            value = loss(params)
            return value + slope * (value - jax.lax.stop_gradient(value))

        scale, is_finite, value, grads = scale.value_and_grad(state.with_frozen(steep))(state.params)
        stepped = state.apply_gradients(grads=grads)
        keep = partial(jax.tree.map, partial(jnp.where, is_finite))
        kept = {name: keep(getattr(stepped, name), getattr(state, name)) for name in ("params", "opt_state")}
        return stepped.replace(**kept), scale, jnp.where(is_finite, value, np.nan), value

    for number in range(1, steps + 1):
        overflows = every is not None and number % every == 0
        state, scale, seen, value = step(state, scale, jnp.float32(3e38 if overflows else 0))
        assert np.isfinite(value)
        assert np.isnan(seen) == overflows
        state = freezer.step(state, loss=seen)
    return state, freezer


@pytest.mark.slow
def test_what_dynamic_scale_skips_is_no_progress_to_autofreeze():
    """With one step of five skipped, intervals of five steps are as those of four without."""
    state, freezer = scaled_run(policies.autofreeze(5), 10, every=5)
    expected, other = scaled_run(policies.autofreeze(4), 8)
    assert arrays(state.params) == arrays(expected.params)
    assert [(event.step, event.names) for event in other.events] == [(8, ("a",))]
    assert [(event.step, event.names) for event in freezer.events] == [(10, ("a",))]
    np.testing.assert_allclose(freezer.policy_state.norms * 4 / 5, other.policy_state.norms, rtol=1e-6)


@pytest.mark.slow
def test_what_dynamic_scale_skips_is_no_progress_to_smartfrz():
    """The loss of a skipped step is NaN to the policy; the records are those of a run without that step."""

    def policy(every):
        return policies.smartfrz(Predictor(SMALL, rngs=nnx.Rngs(0)), schedule=policies.Schedule(every, window=5))

    (state, freezer), (expected, other) = scaled_run(policy(3), 9, every=3), scaled_run(policy(2), 6)
    assert arrays(state.params) == arrays(expected.params)
    seen, wanted = freezer.policy_state, other.policy_state
    np.testing.assert_array_equal(seen.losses, wanted.losses)
    assert np.isfinite(wanted.losses[-3:]).all()
    assert int(seen.records) == 3
    jax.tree.map(np.testing.assert_array_equal, seen.history, wanted.history)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole state", "no update"])
def test_old_gradients_of_a_skipped_step_are_no_sign_of_convergence(kind):
    """The step of a decision is skipped with all that the optimizer holds, so its gradients are those of before."""
    model = nnx.Sequential(*(nnx.Linear(3, 3, rngs=nnx.Rngs(number)) for number in range(3)))
    optimizer = nnx_door.Optimizer(model, optax.sgd(0.1), layers=nnx_door.find_layers(model, X))
    freezer = nnx_door.Freezer(model, optimizer, policies.grades(1e-7, total_steps=8, grace=0.0, evaluate_every=2))

    @nnx.jit
    def step(model, optimizer, x, is_finite):
        old = nnx.as_pure(nnx.state((model, optimizer)))
        value, grads = optimizer.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, grads)
        new = nnx.as_pure(nnx.state((model, optimizer)))
        nnx.update((model, optimizer), jax.tree.map(partial(jnp.where, is_finite), new, old))
        return jnp.where(is_finite, value, jnp.nan)

    for number in range(1, 9):
        is_finite = number != 4
        if is_finite or kind == "whole state":
            value = step(model, optimizer, X + number, jnp.array(is_finite))
        freezer.step(loss=value if is_finite else jnp.float32(jnp.nan))
        assert not freezer.frozen.names


@pytest.mark.parametrize("value", [np.nan, float("inf"), jnp.bfloat16(np.nan), jnp.float32(-np.inf)])
def test_autofreeze_does_not_take_gradients_of_a_skipped_step_for_new_ones(value):
    def run(losses):
        policy = policies.autofreeze(4, keep=())
        state = policy.init(LAYERS, PARAMS)
        for step, each in enumerate(losses, start=1):
            grads = gradients(float(step if np.isfinite(each) else 100))
            _, state = policy.update(state, LAYERS, step=step, params=lambda: PARAMS, grads=grads, loss=each)
        return state

    # Of 1, 2, 4 the mean is that of all four steps, of 1 and 4 with 2 and 3 left out another.
    np.testing.assert_allclose(run([1.0, 1.0, value, 1.0]).norms, 4 / 3 * 7 * np.float32(12), rtol=1e-6)
    assert int(run([1.0, value, value]).errors) == 2


def test_relative_norms_do_not_count_skipped_steps():
    policy = policies.relative_gradient_norm(0.5, 3, batches=3, keep=())
    states = [policy.init(LAYERS, PARAMS)] * 2
    for step, value in enumerate((1.0, 100.0, 3.0), start=1):
        shown = {"grads": gradients(value), "loss": np.float64(np.nan if step == 2 else 0.5)}
        _, states[0] = policy.update(states[0], LAYERS, step=step, params=lambda: PARAMS, **shown)
        shown["grads"] = gradients(value if step != 2 else np.nan)
        _, states[1] = policy.update(states[1], LAYERS, step=step, params=lambda: PARAMS, grads=shown["grads"])
    assert np.isfinite(states[0].norms).all()
    np.testing.assert_array_equal(states[0].norms, states[1].norms)


@pytest.mark.slow
def test_the_loss_may_lie_on_other_devices_than_the_gradients():
    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    policy = policies.autofreeze(1, keep=())
    for value in (jnp.float32(1), jax.device_put(1.0, jax.devices()[3]), jax.device_put(jnp.float32(1), everywhere)):
        state = policy.init(LAYERS, PARAMS)
        grads = jax.device_put(gradients(1.0), everywhere)
        _, state = policy.update(state, LAYERS, step=1, params=lambda: PARAMS, grads=grads, loss=value)
        assert int(state.evaluations) == 1
