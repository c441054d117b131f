"""When the policy ``smartfrz`` freezes a layer: records, order, patience, caution."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_jax import Predictor, policies
from smartfrz_jax.predictor.encoding import PAPER
from tests.policies.smartfrz.predictors import (
    CONFIG,
    LAYERS,
    NAMES,
    SIZE,
    START,
    StillnessPredictor,
    WeightPredictor,
    params_at,
    run,
    smartfrz,
)

PAPER_RULE = {"caution": 0.5, "order": "any", "patience": 1}


@pytest.mark.slow
def test_judges_each_layer_by_its_own_records(predictor):
    """Over a window of 3 records, 2 steps apart, a layer moves by 4 times its speed; the bound is 0.5."""

    def speeds(step):
        return np.array([1.0, 0.0, 1.0 if step <= 8 else 0.1, 0.0])

    policy = smartfrz(predictor, record_every=2, evaluate_every=4, window=3, **PAPER_RULE)
    decisions, _ = run(policy, 20, speeds)
    # b has its three records at step 6, and is judged at 8; c's have been quiet since the record at step 8.
    assert decisions == [""] * 7 + ["b"] * 4 + ["bc"] * 9


def test_records_are_the_tailored_weights_at_the_stated_steps(predictor):
    policy = policies.smartfrz(predictor, schedule=policies.Schedule(record_every=3, evaluate_every=100, window=4))
    _, states = run(policy, 11, speeds=(1.0, 2.0, 0.0, 0.5))
    records, mask = states[-1].history.chronological()
    assert mask.tolist() == [[False, True, True, True]] * 4
    expected = np.array([0, 3, 6, 9])[None, :, None] * np.array([1.0, 2.0, 0.0, 0.5])[:, None, None]
    np.testing.assert_array_equal(records, np.broadcast_to(expected, (4, 4, SIZE)))
    assert states[1].history.count.tolist() == [0] * 4
    assert states[2].history.count.tolist() == [1] * 4


def test_frozen_layers_lose_their_history_and_are_not_judged_again(predictor):
    def speeds(step):  # b stands still until it freezes; were it judged later, it would be found moving
        return np.array([1.0, 0.0 if step <= 4 else 9.0, 1.0, 1.0])

    policy = smartfrz(predictor, record_every=1, evaluate_every=4, window=3, **PAPER_RULE)
    decisions, states = run(policy, 12, speeds)
    assert decisions == [""] * 3 + ["b"] * 9
    assert states[4].history.count.tolist() == [5, 0, 5, 5]
    assert not np.asarray(states[4].history.values[1]).any()


@pytest.mark.parametrize(
    ("encoding", "window", "min_records", "first"),
    [
        ({}, 8, None, 6),
        ({}, 3, None, 4),
        ({}, 8, 1, 2),
        ({}, 8, 7, 8),
        ({"encoding": PAPER}, 8, None, 8),
        ({"encoding": PAPER}, 8, 3, 4),
    ],
)
def test_waits_for_min_records(encoding, window, min_records, first):
    predictor = StillnessPredictor(config=dataclasses.replace(CONFIG, **encoding))
    policy = policies.smartfrz(
        predictor,
        schedule=policies.Schedule(
            record_every=1, evaluate_every=2, window=window, min_records=min_records, patience=1
        ),
    )
    decisions, _ = run(policy, 10)
    assert decisions.index("abc") + 1 == first
    assert set(decisions) == {"", "abc"}


@pytest.mark.parametrize(("patience", "first"), [(1, 4), (2, 6), (3, 8)])
def test_waits_for_patience(predictor, patience, first):
    policy = policies.smartfrz(
        predictor, schedule=policies.Schedule(record_every=1, evaluate_every=2, window=3, patience=patience)
    )
    assert run(policy, 8)[0].index("abc") + 1 == first


def rule(logits, *, caution, order, patience, min_records, keep):
    """Frozen layers after each freezing stage, one loop after another; ``logits`` has shape (stages, layers)."""
    frozen, found, decisions = set(), [0] * len(NAMES), []
    for stage, row in enumerate(logits, start=1):
        if stage >= min_records:
            for i, logit in enumerate(row):
                found[i] = found[i] + 1 if 1 / (1 + np.exp(-logit)) > caution else 0
            for i, name in enumerate(NAMES):
                if found[i] >= patience and name not in keep:
                    frozen.add(name)
                elif name not in frozen and name not in keep and order == "front_to_back":
                    break
        decisions.append("".join(sorted(frozen)))
    return decisions


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.tuples(*[st.sampled_from([-3.0, -1.0, 1.0, 3.0])] * 4), min_size=12, max_size=12),
    caution=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    order=st.sampled_from(["front_to_back", "any"]),
    patience=st.integers(1, 3),
    min_records=st.integers(1, 3),
    keep=st.sets(st.sampled_from(NAMES)),
)
def test_decides_by_the_rule(logits, caution, order, patience, min_records, keep):
    options = {"caution": caution, "order": order, "patience": patience, "min_records": min_records, "keep": keep}
    policy = smartfrz(WeightPredictor(), record_every=1, evaluate_every=1, window=3, **options)
    state, decisions = policy.init(LAYERS, START), []
    for step, row in enumerate(logits, start=1):
        names, state = policy.update(state, LAYERS, step=step, params=lambda row=row: params_at(1, row))
        decisions.append("".join(sorted(names)))
    assert decisions == rule(logits, **options)


def test_front_to_back_waits_for_the_layers_before(predictor):
    """b is quiet from the start, a from step 5 on; c never; d is kept in one case only."""

    def speeds(step):
        return np.array([1.0 if step < 5 else 0.0, 0.0, 1.0, 0.0])

    def last(**options):
        policy = policies.smartfrz(
            predictor, schedule=policies.Schedule(record_every=1, evaluate_every=1, window=2, patience=1), **options
        )
        return run(policy, 8, speeds)[0]

    assert last() == [""] * 4 + ["ab"] * 4
    assert last(order="any") == ["", *["b"] * 3, *["ab"] * 4]
    assert last(keep=["a"]) == ["", *["b"] * 7]
    assert last(keep=["c"]) == [""] * 4 + ["abd"] * 4
    assert last(keep=["c"], order="any") == ["", *["bd"] * 3, *["abd"] * 4]


def test_caution_is_the_confidence_that_is_asked_for():
    """Still layers have logits (0, 0.5): a confidence of 0.622."""

    def last(caution):
        policy = policies.smartfrz(
            StillnessPredictor(0.005),
            schedule=policies.Schedule(record_every=1, evaluate_every=2, window=2),
            caution=caution,
        )
        return run(policy, 6)[0][-1]

    assert [last(c) for c in (0.0, 0.5, 0.62, 0.63, 1.0)] == ["abc", "abc", "abc", "", ""]


def numbers_frozen(seed, cautions, order, patiences):
    """How many layers froze in a random run under two settings; the second ones' must always be among the first's."""
    rng = np.random.default_rng(seed)
    predictor = random_predictor(rng)
    speeds = rng.lognormal(size=4) * np.linspace(1, rng.uniform(), 16)[:, None]
    movements = rng.normal(size=(16, 4)) * speeds
    bold, careful = (
        run_observed(
            smartfrz(
                predictor, total_steps=16, caution=caution, order=order, patience=patience,
                record_every=1, evaluate_every=2, window=6, min_records=2,
            ),
            movements,
        )
        for caution, patience in zip(cautions, patiences, strict=True)
    )  # fmt: skip
    assert all(after <= before for before, after in zip(bold, careful, strict=True))
    return len(bold[-1]), len(careful[-1])


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    cautions=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    order=st.sampled_from(["front_to_back", "any"]),
    patiences=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_more_caution_and_more_patience_freeze_a_subset(seed, cautions, order, patiences):
    numbers_frozen(seed, sorted(cautions), order, sorted(patiences))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["front_to_back", "any"])
def test_the_runs_of_the_test_above_tell_settings_apart(order):
    outcomes = [numbers_frozen(seed, (0.3, 0.7), order, (1, 2)) for seed in range(24)]
    assert sum(careful < bold for bold, careful in outcomes) >= 2
    assert any(careful > 0 for _, careful in outcomes)
    assert any(bold < 3 for bold, _ in outcomes)


@functools.cache
def split_predictor():
    return nnx.split(Predictor(CONFIG, rngs=nnx.Rngs(0)))


def random_predictor(rng):
    """One with weights so large that it is sometimes sure."""
    graphdef, state = split_predictor()
    return nnx.merge(
        graphdef, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 1.5, jnp.float32), state)
    )


def run_observed(policy, movements):
    state, decisions, position = policy.init(LAYERS, START), [], np.ones(4)
    for step, moved in enumerate(movements, start=1):
        position = position + moved
        names, state = policy.update(
            state, LAYERS, step=step, params=lambda position=position: params_at(1, position), loss=np.float32(3 / step)
        )
        decisions.append(names)
    return decisions


def test_a_tie_keeps_training():
    """argmax of equal logits is the first: keep."""
    policy = policies.smartfrz(
        StillnessPredictor(bound=0.0), schedule=policies.Schedule(record_every=1, evaluate_every=2, window=2)
    )
    assert run(policy, 6)[0][-1] == ""


def test_seed_draws_the_sample(predictor):
    def positions(seed):
        state = policies.smartfrz(predictor, schedule=policies.Schedule(record_every=1), seed=seed).init(LAYERS, START)
        return [np.asarray(p).tolist() for p in jax.tree.leaves(state.tailoring)]

    assert positions(0) == positions(0)
    assert positions(0) != positions(1)
