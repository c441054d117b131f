"""The gain of each layer against closed forms, and who freezes for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj

WIDTHS = {"a": (2, 3), "b": (3, 4), "c": (4, 1)}
PARAMS = {name: {"kernel": jnp.ones(shape)} for name, shape in WIDTHS.items()}
LAYERS = sfj.find_layers(
    PARAMS, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"] @ p["c"]["kernel"], jnp.ones((1, 2))
)
COSTS = {"a": 6.0, "b": 3.0, "c": 1.0}
STEPS = 40
Measuring = sfj.policies.Measuring


def run(policy, falls, *, steps=STEPS, noise=0.0, frozen=frozenset()):
    """Every step each layer's weights fall by a tenth, under gradients that make its gain what ``falls`` says."""
    state, params, decisions = policy.init(LAYERS, PARAMS), PARAMS, {}
    for step in range(1, steps + 1):
        params = jax.tree.map(lambda leaf: leaf - 0.1, params)
        names, state = policy.update(state, LAYERS, step=step, params=lambda p=params: p, frozen=frozen)
        if not decisions or names != list(decisions.values())[-1]:
            decisions[step] = names
    return decisions, state


def gradients(falls, noise=0.0):
    rng = np.random.default_rng(0)

    def at(params, number):
        factor = 1 + noise * rng.normal(size=len(falls))
        return {
            name: {"kernel": jnp.full(WIDTHS[name], 10 * fall * more / np.prod(WIDTHS[name]), jnp.float32)}
            for (name, fall), more in zip(falls.items(), factor, strict=True)
        }

    return at


def make(falls, *, noise=0.0, **options):
    measuring = Measuring(
        4, **{"window": 3} | {name: options.pop(name) for name in ("window", "errors") if name in options}
    )
    options = {"costs": COSTS, "factor": 1.0} | options
    return sfj.policies.gain(gradients(falls, noise), total_steps=STEPS, measuring=measuring, **options)


def test_gain_is_minus_the_update_times_the_gradient():
    _, state = run(make({"a": 0.5, "b": 0.25, "c": 0.25}, factor=0.0), None)
    np.testing.assert_allclose(state.gains, [[0.5, 0.25, 0.25]] * 3, rtol=1e-5)
    assert state.measurements == 9  # after steps 5, 9, ... 37


@pytest.mark.slow
def test_the_gain_of_a_real_step_is_the_first_order_fall_of_its_loss():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    layers = sfj.nnx.find_layers(model, x)
    gradient = sfj.nnx.gradient_probe(model, lambda model, x: jnp.mean(model(x) ** 2), lambda number: (x,))
    policy = sfj.policies.gain(gradient, total_steps=100, measuring=Measuring(2, 2), keep=())
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = policy.init(layers, params)
    _, state = policy.update(state, layers, step=2, params=lambda: params)
    slope = gradient(params, 0)
    rate = 1e-3
    after = jax.tree.map(lambda p, g: p - rate * g, params, slope)
    _, state = policy.update(state, layers, step=3, params=lambda: after)
    expected = rate * sum(float((g.astype(jnp.float32) ** 2).sum()) for g in jax.tree.leaves(slope))
    np.testing.assert_allclose(state.gains[-1], [expected], rtol=1e-3)


@pytest.mark.parametrize(
    ("falls", "factor", "frozen"),
    [
        # A step costs 30 in all; the backward pass of a is 12 of them, of a and b 18.
        ({"a": 0.39, "b": 0.3, "c": 0.31}, 1.0, {"a"}),
        ({"a": 0.41, "b": 0.3, "c": 0.29}, 1.0, set()),
        ({"a": 0.41, "b": 0.18, "c": 0.41}, 1.0, {"a", "b"}),  # together, though a alone would not
        ({"a": 0.19, "b": 0.4, "c": 0.41}, 0.5, {"a"}),
        ({"a": 0.21, "b": 0.4, "c": 0.39}, 0.5, set()),
        ({"a": -0.1, "b": 0.9, "c": 0.2}, 0.5, {"a"}),
        ({"a": 0.0, "b": 0.0, "c": 0.0}, 1.0, set()),  # nothing is learned: nothing is decided
        ({"a": 0.1, "b": 0.0, "c": -0.2}, 1.0, set()),
        ({"a": 0.0, "b": 0.0, "c": 1.0}, 5.0, {"a", "b"}),  # never the head
    ],
)
def test_the_longest_front_below_its_share_of_the_cost_freezes(falls, factor, frozen):
    decisions, _ = run(make(falls, factor=factor), falls)
    assert list(decisions.values())[-1] == frozen
    if frozen:
        assert min(step for step, names in decisions.items() if names) == 13  # the third measurement


def test_after_the_front_is_frozen_the_rest_is_judged_by_itself():
    # Of the rest's step of 10 + 2 * 4, b's backward pass is a third; its share in the gain of b and c is .27 / .65.
    decisions, state = run(make({"a": 0.35, "b": 0.27, "c": 0.38}, window=2), None)
    assert list(decisions.values())[-1] == {"a"}
    assert state.measurements == 9


def test_layers_frozen_by_hand_do_not_count():
    decisions, _ = run(make({"a": 5.0, "b": 0.2, "c": 0.8}), None, frozen=frozenset({"a"}))
    assert list(decisions.values())[-1] == {"b"}


@pytest.mark.parametrize("returns", [False, True])
def test_nothing_is_decided_once_all_layers_are_frozen_by_hand(returns):
    policy = make({"a": 0.1, "b": 0.2, "c": 0.7}, returns=returns, keep=())
    assert run(policy, None, frozen=frozenset("abc"))[0] == {1: frozenset()}


def test_noise_keeps_a_layer_training():
    falls = {"a": 0.38, "b": 0.3, "c": 0.32}
    assert list(run(make(falls, noise=0.0), None)[0].values())[-1] == {"a"}
    assert list(run(make(falls, noise=1.0, errors=50.0), None)[0].values())[-1] == set()


def test_keep():
    decisions, _ = run(make({"a": 0.01, "b": 0.01, "c": 0.98}, keep=["a"]), None)
    assert list(decisions.values())[-1] == {"b"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gradients": 3}, "gradients: got int 3, expected a function"),
        ({"total_steps": 0}, "total_steps: got 0"),
        ({"factor": -1.0}, "factor: got -1.0, expected a finite number"),
        ({"measuring": 3}, "measuring: got int 3"),
        ({"measuring": Measuring(4, 10)}, "measuring: got a window of 10 measurements, one in 4 steps, expected fewer"),
    ],
)
def test_options_are_checked(options, text):
    options = {"gradients": lambda params, number: params, "total_steps": STEPS} | options
    with pytest.raises((TypeError, ValueError), match=text):
        sfj.policies.gain(**options)


@pytest.mark.parametrize(
    ("gradient", "error", "text"),
    [
        ({"a": PARAMS["a"]}, ValueError, "gradients: got none for 'b/kernel', expected shape"),
        (PARAMS | {"a": {"kernel": jnp.ones((3, 2))}}, ValueError, r"gradients: got \(3, 2\) for 'a/kernel'"),
        (PARAMS | {"a": {"kernel": jnp.full((2, 3), jnp.nan)}}, FloatingPointError, "gradients: not finite after step"),
    ],
)
def test_gradients_are_checked(gradient, error, text):
    policy = sfj.policies.gain(lambda params, number: gradient, total_steps=STEPS, measuring=Measuring(2, 2))
    with pytest.raises(error, match=text):
        run(policy, None)


@pytest.mark.parametrize("first", [1, 4, 5, 7])
def test_a_run_that_begins_late_measures_from_its_first_whole_turn_on(first):
    seen = []

    def gradient(params, number):
        seen.append(params)
        return params

    policy = sfj.policies.gain(gradient, total_steps=STEPS, measuring=Measuring(4, window=3))
    state = policy.init(LAYERS, PARAMS)
    for step in range(first, 14):
        _, state = policy.update(state, LAYERS, step=step, params=lambda: PARAMS)
    assert len(seen) == state.measurements == sum(step % 4 == 1 and step > first for step in range(5, 14))
    assert all(leaf.all() for leaf in jax.tree.leaves(seen))


def test_costs_and_keep_must_fit_the_network():
    with pytest.raises(ValueError, match="costs"):
        make({"a": 1.0, "b": 1.0, "c": 1.0}, costs={"a": 1.0}).init(LAYERS, PARAMS)
    with pytest.raises(ValueError, match="keep"):
        make({"a": 1.0, "b": 1.0, "c": 1.0}, keep=["z"]).init(LAYERS, PARAMS)


@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.slow
@pytest.mark.parametrize("every", [4, 6, 9])
@pytest.mark.usefixtures("jax_defaults")
def test_with_multi_steps_it_measures_the_update_and_not_the_batches_before(every, returns):
    """What freezes is what does without MultiSteps, of the same updates."""
    falls, numbers = {"a": 0.39, "b": 0.3, "c": 0.31}, []

    def run(k):
        def gradient(params, number):
            numbers.append(number)
            return gradients(falls)(params, number)

        options = {"factor": 1.0, "returns": returns, "costs": COSTS, "measuring": Measuring(every, window=3)}
        policy = sfj.policies.gain(gradient, total_steps=100, **options)
        tx = optax.MultiSteps(optax.sgd(0.1), k)
        params, opt_state = PARAMS, tx.init(PARAMS)
        state, frozen = policy.init(LAYERS, params), []
        slope = jax.tree.map(jnp.ones_like, PARAMS)
        update = jax.jit(lambda opt_state, params: tx.update(slope, opt_state, params))
        for step in range(1, 6 * every + 1):
            updates, opt_state = update(opt_state, params)
            params = optax.apply_updates(params, updates)
            names, state = policy.update(state, LAYERS, step=step, params=lambda p=params: p)
            frozen.append(names)
        return frozen, state

    (plain, expected), (accumulated, state) = run(1), run(4)
    assert expected.measurements == state.measurements == 5
    np.testing.assert_allclose(state.gains, expected.gains, rtol=1e-4)
    assert numbers == sorted(range(5)) + sorted(numbers[5:])
    assert plain[-1] == accumulated[-1] == {"a"}
    at = [next(step for step, names in enumerate(each, 1) if names) for each in (plain, accumulated)]
    assert at[0] <= at[1] < at[0] + 4
    if returns:
        np.testing.assert_allclose(state.signals.agreements, expected.signals.agreements, rtol=1e-5)
        np.testing.assert_array_equal(state.signals.moved, expected.signals.moved)
