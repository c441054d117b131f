import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax.learning.alignment import known_by_policy, label_alignments


def outputs(seed=0):
    rng = np.random.default_rng(seed)
    return {"a": jnp.asarray(rng.normal(size=(12, 3, 4)), jnp.float32), "b": jnp.asarray(rng.normal(size=(12, 5)) + 7)}


def by_definition(features, labels):
    """Centred kernel-target alignment in float64."""
    n = len(labels)
    centring = np.eye(n) - 1 / n
    one_hot = np.eye(labels.max() + 1)[labels]
    x = np.asarray(features, np.float64).reshape(n, -1)
    kernel, target = centring @ x @ x.T @ centring, centring @ one_hot @ one_hot.T @ centring
    return np.sum(kernel * target) / np.linalg.norm(kernel) / np.linalg.norm(target)


def test_is_the_alignment_of_the_centred_kernels():
    labels = np.array([0, 2, 2, 4, 0, 2, 4, 4, 0, 0, 2, 4])  # of two classes there is no example
    got = label_alignments(outputs(), labels)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [by_definition(x, labels) for x in outputs().values()], rtol=1e-4)
    for same in (labels.tolist(), jnp.asarray(labels)):
        np.testing.assert_array_equal(label_alignments(outputs(), same), got)
    one_hot = np.eye(6, dtype=np.float32)[labels]
    np.testing.assert_allclose(label_alignments(outputs(), one_hot), got, rtol=1e-5)


def test_the_labels_themselves_are_aligned_and_one_class_is_not():
    labels = np.array([0, 1, 1, 0])
    got = label_alignments({"same": jnp.eye(2)[labels], "other": jnp.array([0.0, 0.0, 1.0, 1.0])[:, None]}, labels)
    np.testing.assert_allclose(got, [1, 0], atol=1e-6)
    assert label_alignments({"same": jnp.eye(2)[labels]}, np.zeros(4, int)).tolist() == [0]


def test_refuses_labels_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got 12 and 3 examples"):
        label_alignments(outputs(), np.array([0, 1, 1]))
    for labels in (np.array([True, False] * 6), np.zeros((12, 2), int)):
        with pytest.raises(TypeError, match=r"labels: got .* expected classes \(integers of shape \(examples,\)\)"):
            label_alignments(outputs(), labels)
    with pytest.raises(ValueError, match="features: got no layers"):
        label_alignments({}, np.array([0, 1]))


def test_a_policy_knows_what_it_measured_last_from_a_twelfth_on_and_whenever_twice_as_much_is_done():
    measured = np.arange(48.0)[:, None] + np.zeros(2)
    measured[[3, 4]] = np.nan  # so the sixth is the first
    known = known_by_policy(measured)
    assert known.dtype == np.float32
    assert np.isnan(known[:5]).all()
    np.testing.assert_array_equal(known[5:], np.repeat([5, 11, 23, 47], [6, 12, 24, 1])[:, None] + np.zeros(2))
    assert np.isnan(known_by_policy(np.full((6, 2), np.nan))).all()
