import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_jax import Layer, Layers
from smartfrz_jax.policies import freezeout, progress
from smartfrz_jax.policies.base import NEVER


def network(n):
    names = [f"l{i:02d}" for i in range(n)]
    return Layers(tuple(Layer(name, (name,), (name,)) for name in names)), {name: jnp.ones((1, 1)) for name in names}


def moments(policy, n):
    layers, params = network(n)
    return policy.init(layers, params).freeze_at


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 9),
    intercept=st.floats(-8, 8),
    of_progress=st.floats(0.1, 20),
    of_depth=st.floats(-20, 20),
    caution=st.floats(0.01, 0.99),
)
def test_is_the_logistic_regression_step_by_step(n, intercept, of_progress, of_depth, caution):
    total_steps = 60
    policy = progress(
        total_steps=total_steps, coefficients=(intercept, of_progress, of_depth), caution=caution, keep=()
    )
    layers, params = network(n)
    state = policy.init(layers, params)
    for step in range(1, total_steps + 1):
        frozen, state = policy.update(state, layers, step=step, params=lambda: params)
        for i, name in enumerate(layers.names):
            logit = intercept + of_progress * step / total_steps + of_depth * i / (n - 1)
            probability = 1 / (1 + np.exp(-logit))
            if abs(probability - caution) > 1e-6:
                assert (name in frozen) == (probability > caution), (step, i)


def test_freezeouts_schedule_is_one_of_its():
    """But for the step by which the probability has to be above one half, not equal to it."""
    policy = progress(total_steps=100, coefficients=(-5.0, 10.0, -5.0), caution=0.5)
    np.testing.assert_array_equal(moments(policy, 6), [51, 61, 71, 81, 91, NEVER])
    np.testing.assert_array_equal(moments(policy, 6)[:-1], moments(freezeout(total_steps=100), 6)[:-1] + 1)


def test_by_default_the_front_freezes_in_the_second_quarter_and_the_back_never():
    """What was fitted says when a front can be frozen; its coefficients may change, not this."""
    got = moments(progress(total_steps=1000), 21)
    assert 250 <= got[0] <= 500
    assert (np.diff(got[got != NEVER]) > 0).all()
    assert (got[18:] == NEVER).all()


@settings(max_examples=30, deadline=None)
@given(low=st.floats(0, 1), high=st.floats(0, 1), of_depth=st.floats(-20, 20))
def test_more_caution_freezes_nothing_earlier(low, high, of_depth):
    low, high = sorted((low, high))
    early, late = (
        moments(progress(total_steps=1000, coefficients=(-3.0, 9.0, of_depth), caution=caution), 7)
        for caution in (low, high)
    )
    assert (early <= late).all()


def test_the_ends_of_the_knob():
    assert moments(progress(total_steps=50, caution=0.0), 4).tolist() == [0, 0, 0, NEVER]
    assert moments(progress(total_steps=50, caution=1.0), 4).tolist() == [NEVER] * 4
    assert moments(progress(total_steps=50, caution=0.0, keep=()), 1).tolist() == [0]


def test_what_would_freeze_after_the_end_never_does():
    assert moments(progress(total_steps=50, coefficients=(-2.0, 1.0, 0.0), caution=0.5), 3).tolist() == [NEVER] * 3
    assert moments(progress(total_steps=50, coefficients=(-0.98, 1.0, 0.0), caution=0.5, keep=()), 2).tolist() == [
        50,
        50,
    ]
    assert (
        moments(progress(total_steps=50, coefficients=(-1.0, 1.0, 0.0), caution=0.5, keep=()), 2).tolist()
        == [NEVER] * 2
    )


def test_moment_is_not_a_step_off_by_rounding():
    """The probability is one half exactly at steps 7 and 57 of 100, which is not above it."""
    assert moments(progress(total_steps=100, coefficients=(-0.07, 1.0, -0.5), caution=0.5, keep=()), 2).tolist() == [
        8,
        58,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps: got 0"),
        ({"caution": 1.5}, "caution: got 1.5"),
        ({"caution": float("nan")}, "caution: got nan"),
        ({"coefficients": (1.0, 2.0)}, r"coefficients: got \(1.0, 2.0\), expected three finite numbers"),
        ({"coefficients": (1.0, float("inf"), 0.0)}, "expected three finite numbers"),
        ({"coefficients": (1.0, 0.0, 0.0)}, r"expected a weight of progress \(the second\) above 0"),
        ({"coefficients": (1.0, -2.0, 0.0)}, r"expected a weight of progress \(the second\) above 0"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        progress(**({"total_steps": 10} | options))
