"""Options of the policy ``smartfrz``: their defaults, and what is refused."""

import functools

import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_jax import Predictor, policies
from tests.policies.smartfrz.predictors import (
    CONFIG,
    LAYERS,
    SIZE,
    START,
    StillnessPredictor,
    WeightPredictor,
    run,
    smartfrz,
)


@pytest.mark.slow
def test_defaults_follow_from_the_length_of_the_run(predictor):
    policy = smartfrz(predictor, total_steps=400, window=10)  # a record every 10 steps, a stage every 50
    decisions, states = run(policy, 100)
    assert [int(s.history.count[0]) for s in states[8:20]] == [0, *[1] * 10, 2]
    assert decisions.index("abc") + 1 == 100


def test_paper_defaults():
    predictor = Predictor(CONFIG, rngs=nnx.Rngs(0))
    state = policies.smartfrz(predictor, total_steps=1000).init(LAYERS, START)
    assert state.history.values.shape == (4, 30, SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record_every": None}, "record_every: got none; pass it, or total_steps for the default"),
        ({"record_every": 0}, "record_every: got 0"),
        ({"evaluate_every": 0}, "evaluate_every: got 0"),
        ({"record_every": 5, "evaluate_every": 4}, "evaluate_every: got 4, expected at least record_every, 5"),
        ({"window": 0}, "window: got 0"),
        ({"min_records": 0}, "min_records: got 0"),
        ({"min_records": 31}, "min_records: got 31, expected at most the window, 30"),
        ({"caution": 1.5}, "caution: got 1.5"),
        ({"caution": -0.1}, "caution: got -0.1"),
        ({"caution": float("nan")}, "caution: got nan"),
        ({"order": "back_to_front"}, "order: got 'back_to_front', expected 'front_to_back' or 'any'"),
        ({"patience": 0}, "patience: got 0, expected an integer of at least 1"),
        ({"patience": 1.5}, "patience: got 1.5, expected an integer of at least 1"),
        ({"total_steps": 0}, "total_steps: got 0"),
        ({"total_steps": 9}, r"5 records, one every 1 steps, and then 2 freezing stage\(s\), .* a run of 9 steps"),
        ({"total_steps": 50, "min_records": 1, "evaluate_every": 51}, "one every 51 steps, do not fit in a run of 50"),
    ],
)
def test_refuses_bad_options(predictor, options, message):
    with pytest.raises(ValueError, match=message):
        smartfrz(predictor, **({"record_every": 1} | options))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    record_every=st.integers(2, 4),
    longer=st.integers(0, 5),
    min_records=st.integers(1, 4),
    patience=st.integers(1, 3),
)
def test_a_run_is_refused_exactly_if_it_is_too_short_for_anything_to_freeze(
    record_every, longer, min_records, patience
):
    make = functools.partial(
        smartfrz, WeightPredictor(), caution=0.0, window=4, record_every=record_every,
        evaluate_every=record_every + longer, min_records=min_records, patience=patience,
    )  # fmt: skip
    policy, frozen, step = make(), frozenset(), 0
    state = policy.init(LAYERS, START)
    while not frozen:
        step += 1
        frozen, state = policy.update(state, LAYERS, step=step, params=lambda: START)
    make(total_steps=step)
    with pytest.raises(ValueError, match=f"do not fit in a run of {step - 1} steps"):
        make(total_steps=step - 1)


def test_refuses_what_is_not_a_predictor():
    with pytest.raises(TypeError, match="predictor: got str 'resnet50', expected a smartfrz_jax"):
        policies.smartfrz("resnet50", total_steps=1000)


def test_stops_at_weights_that_are_not_finite(predictor):
    policy = policies.smartfrz(predictor, schedule=policies.Schedule(record_every=2, window=4))
    broken = START | {"b": jnp.full((4, 4), jnp.nan), "d": jnp.full((4, 4), jnp.inf)}
    state = policy.init(LAYERS, START)
    _, state = policy.update(state, LAYERS, step=1, params=lambda: broken)  # not recorded
    with pytest.raises(FloatingPointError, match="params: not finite after step 2 in layer 'b', 'd', so the policy"):
        policy.update(state, LAYERS, step=2, params=lambda: broken)


def test_stops_at_a_confidence_that_is_not_finite():
    policy = policies.smartfrz(
        StillnessPredictor(bound=3e38), schedule=policies.Schedule(record_every=1, evaluate_every=2, window=2)
    )
    with pytest.raises(FloatingPointError, match="confidence: not finite after step 2 in layer 'a', 'b', 'c', so"):
        run(policy, 2)
