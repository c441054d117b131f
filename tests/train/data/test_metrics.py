import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import metrics


def counts_of(labels, predictions, classes, batch_size=None):
    """Counts, in batches of any size whose last one is filled up with weight 0."""
    batch_size = batch_size or len(labels)
    total = np.zeros((classes, classes), np.int64)
    for start in range(0, len(labels), batch_size):
        here = slice(start, start + batch_size)
        fill = batch_size - len(labels[here])
        logits = np.eye(classes, dtype=np.float32)[np.pad(predictions[here], (0, fill))]
        weights = np.pad(np.ones(len(labels[here]), np.float32), (0, fill))
        batch = jnp.asarray(logits), jnp.asarray(np.pad(labels[here], (0, fill)), jnp.int32), jnp.asarray(weights)
        total += np.asarray(metrics.confusion(*batch))
    return total


def draw(seed, classes, n=97):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    return labels, np.where(rng.random(n) < 0.6, labels, rng.integers(classes, size=n))


@pytest.mark.parametrize("batch_size", [1, 10, 97, 200])
@pytest.mark.parametrize("classes", [2, 5])
def test_against_scikit_learn(batch_size, classes):
    labels, predictions = draw(batch_size, classes)
    counts = counts_of(labels, predictions, classes, batch_size)
    np.testing.assert_array_equal(counts, sklearn.metrics.confusion_matrix(labels, predictions, labels=range(classes)))
    assert metrics.accuracy(counts) == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions), abs=1e-12)
    assert metrics.matthews(counts) == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predictions), abs=1e-12)
    for positive in range(classes):
        expected = sklearn.metrics.f1_score(labels == positive, predictions == positive)
        assert metrics.f1(counts, positive) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=12))
def test_short_lists_with_missing_classes(pairs):
    labels, predictions = np.array(pairs).T
    counts = np.zeros((2, 2), int)
    np.add.at(counts, (labels, predictions), 1)
    assert metrics.f1(counts) == pytest.approx(sklearn.metrics.f1_score(labels, predictions, zero_division=0.0))
    right = sum(a == b for a, b in pairs) / len(pairs)
    assert metrics.accuracy(counts) == pytest.approx(right)
    constant = len(set(labels)) == 1 or len(set(predictions)) == 1
    expected = 0.0 if constant else sklearn.metrics.matthews_corrcoef(labels, predictions)
    assert metrics.matthews(counts) == pytest.approx(expected, abs=1e-12)


def test_large_counts_do_not_overflow():
    counts = np.array([[400_000, 100_000], [100_000, 680_000]])
    (tn, fp), (fn, tp) = counts.astype(float)
    expected = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.matthews(counts) == pytest.approx(expected, abs=1e-12)
    assert metrics.matthews(counts.astype(np.int32)) == pytest.approx(expected, abs=1e-12)


def test_no_examples():
    assert np.isnan(metrics.accuracy(np.zeros((2, 2))))


def test_positive_class_that_is_not_there():
    with pytest.raises(ValueError, match="positive: got 2, expected a class, 0 to 1"):
        metrics.f1(np.eye(2), positive=2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar10", ["accuracy"]),
        ("imagenet2012/5.1.0", ["accuracy"]),
        ("glue/mrpc", ["accuracy", "f1"]),
        ("glue/cola/2.0.0", ["matthews", "accuracy"]),
        ("glue/sst2", ["accuracy"]),
    ],
)
def test_metrics_of_a_set(name, expected):
    assert list(metrics.metrics_of(name)) == expected


@pytest.mark.parametrize("batch", [1, 4, 12])
def test_the_loss_is_the_same_over_any_batching(batch):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((12, 5), np.float32), rng.integers(0, 5, 12).astype(np.int32)
    weights = (np.arange(12) < 10).astype(np.float32)
    parts = [slice(start, start + batch) for start in range(0, 12, batch)]
    sums = metrics.total(np.asarray(metrics.loss_sums(logits[at], labels[at], weights[at])) for at in parts)
    exact = logits[:10].astype(np.float64)
    expected = np.log(np.exp(exact).sum(1)) - exact[np.arange(10), labels[:10]]
    assert metrics.mean_loss(sums) == pytest.approx(expected.mean(), rel=1e-6)
