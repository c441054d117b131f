import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from smartfrz_jax.learning import controls
from smartfrz_jax.learning.controls import CONTROLS, logistic_regression
from smartfrz_jax.learning.evaluation import evaluate
from smartfrz_jax.learning.examples import Examples, make_examples
from smartfrz_jax.learning.recording import Recording


def recording(seed, records=12, layers=5, size=8):
    """A run in which front layers are ready first, and slow down when they are."""
    rng = np.random.default_rng(seed)
    time, ready = np.arange(1, records + 1)[:, None] / records, 0.2 + 0.6 * np.arange(layers) / layers
    pace = np.where(time < ready, 1.0, 0.02) * rng.uniform(0.9, 1.1, (records, layers))
    start = rng.standard_normal((layers, size))
    return Recording(
        layers=tuple("abcde"[:layers]),
        steps=np.arange(1, records + 1),
        record_every=1,
        total_steps=records,
        weights=start + np.cumsum(pace[:, :, None] * 0.1 * rng.standard_normal((records, layers, size)), axis=0),
        start=start,
        losses=np.linspace(2, 1, records),
        first_loss=2.0,
        cka=np.where(time < ready, 0.2, 1.0),
    )


@pytest.fixture(scope="module")
def examples() -> tuple[Examples, Examples]:
    def of(seeds):
        return make_examples(
            [recording(seed) for seed in seeds], window=6, min_records=2, criterion=lambda r: r.cka > 0.5
        )

    return of(range(3)), of(range(10, 12))


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.slow
def test_gives_probabilities_and_the_same_again(examples, name):
    train, test = examples
    got = CONTROLS[name](train, test)
    assert got.shape == (len(test),)
    assert ((got >= 0) & (got <= 1)).all()
    np.testing.assert_array_equal(CONTROLS[name](train, test), got)
    changed = test.select(np.arange(0, len(test), 2))
    np.testing.assert_array_equal(CONTROLS[name](train, changed), got[::2])


def test_what_they_can_and_cannot_tell(examples):
    train, test = examples
    groups = test.run * 100 + test.moment
    got = {name: evaluate(control(train, test), test.target, groups=groups) for name, control in CONTROLS.items()}
    assert got["majority"].auc == got["majority"].moment_auc == got["progress"].moment_auc == 0.5
    assert 0.7 < got["progress"].auc < got["progress_and_depth"].auc
    assert got["depth"].auc > 0.6
    assert got["progress_and_depth"].moment_auc > 0.99
    assert got["update_norm"].auc > 0.7
    assert got["context"].auc > 0.95


def test_without_weights_they_are_the_same_or_refuse(examples):
    train, test = examples
    small = [
        dataclasses.replace(part, recordings=tuple(run.without_weights() for run in part.recordings))
        for part in examples
    ]
    for name, control in CONTROLS.items():
        if name in controls.READING_WEIGHTS:
            for parts in (small, (small[0], test), (train, small[1])):
                with pytest.raises(ValueError, match="examples: come from recordings without weights"):
                    control(*parts)
        else:
            np.testing.assert_array_equal(control(*small), control(train, test))


def test_coefficients_of_the_two_scalar_rule_are_those_of_its_regression(examples):
    train, test = examples
    intercept, of_progress, of_depth = controls.two_scalar_coefficients(train)
    logit = intercept + of_progress * test.progress + of_depth * test.depth
    np.testing.assert_allclose(1 / (1 + np.exp(-logit)), controls.progress_and_depth(train, test), rtol=1e-5)


def test_majority_is_the_share_of_freeze(examples):
    train, test = examples
    np.testing.assert_array_equal(controls.majority(train, test), train.target.mean())


def test_progress_is_a_logistic_curve(examples):
    """On one input, standardised, the reference is scikit-learn's."""
    train, test = examples
    mean, std = train.progress.mean(dtype=np.float64), train.progress.std(dtype=np.float64)
    reference = LogisticRegression(C=1 / (1e-3 * len(train)), tol=1e-10)
    reference.fit((train.progress[:, None] - mean) / std, train.target)
    expected = reference.predict_proba((test.progress[:, None] - mean) / std)[:, 1]
    np.testing.assert_allclose(controls.progress(train, test), expected, rtol=1e-4)


@pytest.mark.parametrize("class_weights", ["balanced", None])
@pytest.mark.parametrize("separable", [False, True])
def test_logistic_regression_is_that_of_scikit_learn(class_weights, separable):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 3)) + np.array([5, 0, 0])
    target = x @ [1, 2, 0] + (0 if separable else 2 * rng.standard_normal(60)) > 5.5
    reference = LogisticRegression(
        C=1 / (0.01 * 60), class_weight="balanced" if class_weights else None, tol=1e-12, max_iter=10_000
    ).fit(x, target)
    got = logistic_regression(x, target, ridge=0.01, class_weights=class_weights)
    np.testing.assert_allclose(got, [*reference.coef_[0], reference.intercept_[0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("class_weights", [(1.0, 3.0), np.array([1.0, 3.0])])
def test_gradient_is_zero_at_the_minimum(class_weights):
    rng = np.random.default_rng(1)
    x, target = rng.standard_normal((40, 4)), rng.random(40) < 0.3
    w = logistic_regression(x, target, ridge=1e-8, class_weights=class_weights)
    factor = np.where(target, 3.0, 1.0) / 40
    p = 1 / (1 + np.exp(-(x @ w[:-1] + w[-1])))
    np.testing.assert_allclose(x.T @ (factor * (p - target)) + 1e-8 * w[:-1], 0, atol=1e-10)
    assert abs(np.sum(factor * (p - target))) < 1e-10


def test_bad_input():
    with pytest.raises(ValueError, match="ridge: got 0, expected a number above 0"):
        logistic_regression(np.ones((2, 1)), np.array([True, False]), ridge=0)
    with pytest.raises(ValueError, match="the targets of all 2 training examples are freeze"):
        logistic_regression(np.ones((2, 1)), np.array([True, True]))
