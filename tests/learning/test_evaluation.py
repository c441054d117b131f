import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_jax.learning.evaluation import Evaluation, evaluate


def brute_force(probability, target, groups=None) -> Evaluation:
    """The definitions, one example (or pair) at a time."""
    within = math.nan
    if groups is not None:
        three = list(zip(map(float, probability), map(bool, target), groups, strict=True))
        aucs, weights = [], []
        for group in set(groups):
            freeze, keep = ([p for p, t, g in three if t == wanted and g == group] for wanted in (True, False))
            if freeze and keep:
                weights.append(len(freeze) * len(keep))
                aucs.append(sum((a > b) + (a == b) / 2 for a in freeze for b in keep) / weights[-1])
        within = sum(a * w for a, w in zip(aucs, weights, strict=True)) / sum(weights) if weights else math.nan
    pairs = list(zip(map(float, probability), map(bool, target), strict=True))
    freeze, keep = [p for p, t in pairs if t], [p for p, t in pairs if not t]
    balanced = auc = math.nan
    if freeze and keep:
        balanced = (sum(p > 0.5 for p in freeze) / len(freeze) + sum(p <= 0.5 for p in keep) / len(keep)) / 2
        auc = sum((a > b) + (a == b) / 2 for a in freeze for b in keep) / (len(freeze) * len(keep))
    calibration = 0.0
    for i in range(10):
        members = [(p, t) for p, t in pairs if i <= p * 10 < i + 1 or (i == 9 and p == 1)]
        if members:
            confidence = sum(p for p, _ in members) / len(members)
            calibration += len(members) / len(pairs) * abs(confidence - sum(t for _, t in members) / len(members))
    brier = sum((p - t) ** 2 for p, t in pairs) / len(pairs)
    return Evaluation(len(pairs), len(freeze), balanced, auc, calibration, brier, within)


probabilities = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]))  # the latter for ties


@settings(deadline=None)
@given(st.lists(st.tuples(probabilities, st.booleans(), st.integers(-3, 3)), min_size=1, max_size=40), st.booleans())
def test_matches_brute_force(examples, grouped):
    probability, target, groups = (np.array(column) for column in zip(*examples, strict=True))
    groups = groups if grouped else None
    np.testing.assert_allclose(
        evaluate(probability, target, groups=groups),
        brute_force(probability, target, None if groups is None else groups.tolist()),
        rtol=1e-12,
        atol=1e-15,
    )


def test_matches_brute_force_on_many():
    rng = np.random.default_rng(0)
    probability = np.round(rng.random(500), 2)
    target = rng.random(500) < probability
    groups = rng.integers(0, 40, 500)
    np.testing.assert_allclose(
        evaluate(probability, target, groups=groups), brute_force(probability, target, groups.tolist()), rtol=1e-12
    )


def test_auc_within_groups_by_hand():
    """Across the groups the order is wrong, within them right: 3 of 3 pairs, 1 of 2, and a group without any."""
    probability = np.array([0.5, 0.1, 0.2, 0.3, 0.9, 0.8, 1.0, 0.4])
    target = np.array([True, False, False, False, True, False, False, True])
    groups = np.array([7, 7, 7, 7, -1, -1, -1, 0])
    got = evaluate(probability, target, groups=groups)
    assert got.moment_auc == pytest.approx((3 + 1) / (3 + 2))
    assert got.auc == pytest.approx((3 + 4 + 3) / 15)
    assert math.isnan(evaluate(probability, target).moment_auc)
    assert math.isnan(evaluate(probability, target, groups=np.arange(8)).moment_auc)


def test_by_hand():
    got = evaluate(np.array([0.92, 0.94, 0.06, 0.5, 0.61]), np.array([True, False, False, True, True]))
    assert (got.n, got.positives) == (5, 3)
    # To freeze: .92 and .61 rightly, .5 not; to keep: .06 rightly, .94 not.
    assert got.balanced_accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    # Of six pairs, .92, .5 and .61 beat .06; none beats .94.
    assert got.auc == pytest.approx(3 / 6)
    # Bins 0: |.06 - 0|; 5: |.5 - 1|; 6: |.61 - 1|; 9: two examples, |.93 - .5|.
    assert got.calibration_error == pytest.approx((0.06 + 0.5 + 0.39 + 2 * 0.43) / 5)
    assert got.brier == pytest.approx((0.08**2 + 0.94**2 + 0.06**2 + 0.5**2 + 0.39**2) / 5)


def test_perfect_inverted_and_constant():
    target = np.array([False, True] * 10)
    assert evaluate(target.astype(float), target)[2:6] == (1.0, 1.0, 0.0, 0.0)
    assert evaluate(1.0 - target, target)[2:6] == (0.0, 0.0, 1.0, 1.0)
    assert evaluate(np.full(20, 0.5), target)[2:6] == (0.5, 0.5, 0.0, 0.25)


@pytest.mark.parametrize("kind", [True, False])
def test_one_class_leaves_two_figures_undefined(kind):
    got = evaluate(np.array([0.2, 0.9], np.float32), np.array([kind, kind]))
    assert math.isnan(got.auc)
    assert math.isnan(got.balanced_accuracy)
    assert got.brier == pytest.approx((0.64 + 0.01) / 2 if kind else (0.04 + 0.81) / 2)
    assert math.isfinite(got.calibration_error)


def test_bad_input():
    yes = np.array([True])
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(1,\)"):
        evaluate(np.array([0.1, 0.2]), yes)
    with pytest.raises(ValueError, match="n at least 1"):
        evaluate(np.zeros(0), np.zeros(0, bool))
    with pytest.raises(ValueError, match=r"got shapes \(1, 1\)"):
        evaluate(np.zeros((1, 1)), yes[None])
    with pytest.raises(TypeError, match="target: got dtype int64, expected bool"):
        evaluate(np.array([0.1]), np.array([1]))
    with pytest.raises(TypeError, match="groups: got dtype float64, expected integers"):
        evaluate(np.array([0.1]), yes, groups=np.array([1.0]))
    with pytest.raises(ValueError, match=r"groups: got shape \(2,\), expected \(1,\)"):
        evaluate(np.array([0.1]), yes, groups=np.array([1, 1]))
    for bad in (np.nan, -0.1, 1.1, np.inf):
        with pytest.raises(ValueError, match="probability: entry 1 is"):
            evaluate(np.array([0.5, bad]), np.array([True, False]))
