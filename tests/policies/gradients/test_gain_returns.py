"""Gains on quadratic losses, whose closed form is known, and front layers that train again."""

import jax.numpy as jnp
import numpy as np
import pytest

import smartfrz_jax as sfj
from smartfrz_jax.policies.gradients.gain_shares import Rule, Signals, shares

NAMES = ("a", "b", "c")
LAYERS = sfj.Layers(tuple(sfj.Layer(name, (name,), (name,)) for name in NAMES))
RATE, EVERY, WINDOW = 0.01, 4, 2
CURVATURES = {"a": 4.0, "b": 1.0, "c": 0.5}
STARTS = {"a": 1.0, "b": 2.0, "c": 4.0}


def descend(policy, steps, target, *, rate=lambda step: RATE, by_hand=frozenset()):
    """SGD on ``sum of curvature / 2 * (x - target(name, number))**2``; frozen layers and states after each step."""
    x = {name: jnp.full(1, STARTS[name]) for name in NAMES}
    state, history = policy.init(LAYERS, x), []
    frozen = by_hand
    for step in range(1, steps + 1):
        slopes = slope(x, (step - 1) // EVERY, target)
        x = {name: x[name] if name in frozen else x[name] - rate(step) * slopes[name] for name in NAMES}
        names, state = policy.update(state, LAYERS, step=step, params=lambda x=x: x, frozen=by_hand)
        frozen = names | by_hand
        history.append(("".join(sorted(names)), state))
    return history


def slope(x, number, target):
    return {name: CURVATURES[name] * (x[name] - target(name, number)) for name in NAMES}


def gain(target, **options):
    measuring = sfj.policies.Measuring(EVERY, WINDOW, errors=0.0)
    options = {"total_steps": 1000, "factor": 0.5, "measuring": measuring, "keep": ("c",)} | options
    return sfj.policies.gain(lambda params, number: slope(params, number + 1, target), **options)


def at_zero(name, number):
    return 0.0


def closed_form(step):
    """Fall of the loss to be expected of the step after ``step``."""
    return np.array(
        [
            RATE * (h * d) ** 2 * (1 - RATE * h) ** (2 * step)
            for h, d in zip(CURVATURES.values(), STARTS.values(), strict=True)
        ]
    )


@pytest.mark.parametrize("returns", [False, True])
def test_gains_are_those_of_the_closed_form_and_so_is_the_moment_of_freezing(returns):
    history = descend(gain(at_zero, returns=returns), 80, at_zero)
    measured = {step: state.gains[-1] for step, (_, state) in enumerate(history, 1) if step % EVERY == 1 and step > 1}
    freezes = None
    for step, found in measured.items():
        if freezes is None:
            np.testing.assert_allclose(found, closed_form(step - 1), rtol=2e-4)
            rows = np.array([closed_form(step - 1 - EVERY), closed_form(step - 1)])
            share = rows[:, 0].sum() / rows.sum()  # of a; a step costs 9, its backward pass 2
            if step > EVERY * (WINDOW + returns) and share <= 0.5 * 2 / 9:
                freezes = step
    assert freezes is not None
    assert next(step for step, (names, _) in enumerate(history, 1) if "a" in names) == freezes > 3 * EVERY


def test_a_frozen_layer_returns_when_its_gradient_says_so_and_freezes_again():
    def target(name, number):  # the data change for the front
        return 1.5 if name == "a" and number >= 25 else 0.0

    frozen = [names for names, _ in descend(gain(target, returns=True), 260, target)]
    assert frozen[25 * EVERY - 1] == "a"
    returned = next(step for step in range(25 * EVERY, 260) if "a" not in frozen[step - 1])
    assert 25 * EVERY < returned <= 27 * EVERY + 1  # both gradients of a product are of the new data
    assert any("a" in names for names in frozen[returned:])
    assert all("a" in names for names, _ in descend(gain(target), 260, target)[25 * EVERY :])  # without returns


def test_a_layer_that_has_arrived_never_returns():
    def target(name, number):
        return STARTS["a"] if name == "a" else 0.0

    frozen = [names for names, _ in descend(gain(target, returns=True), 400, target)]
    assert all("a" in names for names in frozen[(WINDOW + 1) * EVERY :])


def test_what_frozen_layers_would_gain_follows_the_learning_rate():
    """Linear losses: gradients stay what they are, and the gain is the rate times their square."""
    squares = np.array([1.0, 2.0, 3.0], np.float32)
    rows = np.tile(squares, (3, 1))
    trained, every = Signals(rows, rows > 0, np.full(3, np.nan, np.float32)), 0.1 * rows
    _, signals = trained.estimates(every)
    np.testing.assert_allclose(signals.rates, [1, 1, 1], rtol=1e-6)
    later = signals._replace(moved=np.tile([False, True, True], (3, 1)), agreements=rows * np.float32([4, 1, 1]))
    gains, _ = later.estimates(0.05 * rows * np.float32([0, 1, 1]))  # half the rate; a's gradients have doubled
    np.testing.assert_allclose(gains, np.tile([0.05 * 4, 0.05 * 2, 0.05 * 3], (3, 1)), rtol=1e-6)


def test_layers_keep_their_own_rates_where_they_are_more_than_noise():
    agreements = np.tile(np.float32([1, 2, 0]), (4, 1))
    agreements[:, 2] = [5, -5, 5, -5]  # of c nothing is known, and its rate is that of all
    gains = agreements * np.float32([0.1, 0.3, 0.0]) + np.float32([0, 0, 0.01])
    _, signals = Signals(agreements, agreements != 0, np.ones(3, np.float32)).estimates(gains)
    level = gains.sum() / agreements.sum()
    np.testing.assert_allclose(signals.rates, [0.1 / level, 0.3 / level, 1.0], rtol=0.02)


def test_nothing_is_estimated_where_what_trains_shows_no_common_rate():
    rows = np.ones((2, 3), np.float32)
    assert Signals(-rows, rows > 0, rows[0]).estimates(rows) is None
    assert Signals(rows, rows < 0, rows[0]).estimates(rows) is None


def test_errors_speak_for_what_is_frozen():
    # Share of a .25 with a standard error of .05, against the factor times .5.
    gains = np.array([[0.2, 0.8], [0.3, 0.7]], np.float32)
    costs, both = np.array([0.5, 0.5]), np.array([True, True])
    share, error = shares(gains, both, both)
    np.testing.assert_allclose([share[0], error[0]], [0.25, 0.05], rtol=1e-5)
    may = np.array([True, False])
    for factor, now, while_frozen in ((0.39, False, False), (0.45, False, True), (0.61, True, True)):
        rule = Rule(lambda active, front: costs[front].sum(), factor, 1.0)
        assert rule.front(gains, both, may)[0] == now
        for frozen, expected in ((may, while_frozen), (~both, now)):
            assert rule.front_that_returns(gains, frozen, both, may)[0] == expected


def test_the_standard_error_is_that_of_repeated_windows():
    rng = np.random.default_rng(0)
    windows = 1 + 0.3 * rng.normal(size=(4000, 8, 3)) * [1.0, 1.0, 0.5]
    all_of_them = np.ones(3, bool)
    found = np.array([shares(window, all_of_them, all_of_them) for window in windows])
    np.testing.assert_allclose(np.sqrt((found[:, 1] ** 2).mean(axis=0))[:2], found[:, 0].std(axis=0)[:2], rtol=0.05)


def test_layers_frozen_by_hand_neither_count_nor_return():
    history = descend(gain(at_zero, returns=True), 240, at_zero, by_hand=frozenset({"a"}))
    assert any(names == "b" for names, _ in history)
    assert not any("a" in names for names, _ in history)
