import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from train.data import Mix
from train.data.augment.mix import cutmix, mixup, smooth

CLASSES = 4


def batch(n=6, height=9, width=11):
    """Image i is all i + 1, of class i % 4."""
    levels = jnp.arange(1.0, n + 1)
    return jnp.broadcast_to(levels[:, None, None, None], (n, height, width, 3)), jnp.arange(
        n, dtype=jnp.int32
    ) % CLASSES


def test_smoothed_labels():
    targets = smooth(jnp.array([2]), CLASSES, 0.1)
    np.testing.assert_allclose(targets, [[0.025, 0.025, 0.925, 0.025]], rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.slow
def test_mixup_weights_images_and_labels_alike(share):
    images, labels = batch()
    mixed, targets = mixup(images, smooth(labels, CLASSES, 0.0), jnp.float32(share))
    used = (np.asarray(mixed)[:, 0, 0, 0] - np.arange(6, 0, -1)) / (np.arange(1, 7) - np.arange(6, 0, -1))
    np.testing.assert_allclose(used, share, atol=1e-5)
    expected = np.zeros((6, CLASSES))
    np.add.at(expected, (np.arange(6), np.arange(6) % CLASSES), share)
    np.add.at(expected, (np.arange(6), np.arange(6)[::-1] % CLASSES), 1 - share)
    np.testing.assert_allclose(targets, expected, atol=1e-5)


def test_cutmix_labels_are_the_areas():
    images, labels = batch()
    cut, hard = jax.jit(cutmix), smooth(labels, CLASSES, 0.0)
    for seed in range(20):
        mixed, targets = (np.asarray(one) for one in cut(jax.random.key(seed), images, hard, jnp.float32(seed / 20)))
        for i in range(6):
            own = mixed[i] == i + 1
            assert (own | (mixed[i] == 6 - i)).all()
            rows, columns = np.nonzero(~own[..., 0])
            if rows.size:  # the foreign part is a box
                assert rows.size == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            expected = np.bincount([i % CLASSES, (5 - i) % CLASSES], [own.mean(), 1 - own.mean()], CLASSES)
            np.testing.assert_allclose(targets[i], expected, atol=1e-6)


def shares(mix, n, size):
    """Share of a white image in the labels of ``n`` batches that mix it with a black one; and the mixed images."""
    images = jnp.stack([jnp.ones((size, size, 1)), jnp.zeros((size, size, 1))])
    keys = jax.random.split(jax.random.key(0), n)
    labels = jnp.array([0, 1])
    mixed, targets = jax.jit(jax.vmap(lambda key: mix(key, images, labels, 2)))(keys)
    return np.asarray(targets[:, 0, 0]), np.asarray(mixed[:, 0])


@pytest.mark.slow
def test_mixup_alone_draws_from_its_beta_distribution():
    drawn, mixed = shares(Mix(mixup=0.8, cutmix=0.0, smoothing=0.0), 1500, 2)
    assert scipy.stats.kstest(drawn, scipy.stats.beta(0.8, 0.8).cdf).pvalue > 1e-3
    assert (mixed == drawn[:, None, None, None]).all()


@pytest.mark.slow
def test_cutmix_alone_draws_boxes_that_are_cut_off_at_the_edges():
    """Against boxes drawn by NumPy: uniform area and centre, cut off at the edges."""
    rng, size = np.random.default_rng(0), 64
    half = np.floor(size * np.sqrt(1 - rng.beta(1.0, 1.0, 1500))) // 2
    sides = []
    for _ in range(2):
        centre = rng.integers(size, size=1500)
        sides.append(np.minimum(centre + half, size) - np.maximum(centre - half, 0))
    expected = 1 - sides[0] * sides[1] / size**2
    drawn, mixed = shares(Mix(mixup=0.0, cutmix=1.0, smoothing=0.0), 1500, size)
    assert scipy.stats.ks_2samp(drawn, expected).pvalue > 1e-3
    assert set(np.unique(mixed)) == {0.0, 1.0}
    np.testing.assert_allclose(mixed.mean((1, 2, 3)), drawn, atol=1e-6)


@pytest.mark.slow
def test_one_of_both_is_drawn():
    images, labels = batch(n=4, height=16, width=16)
    mix = jax.jit(functools.partial(Mix(switch=0.25), num_classes=CLASSES))
    boxes = 0
    for seed in range(80):
        mixed, targets = mix(jax.random.key(seed), images, labels)
        np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-5)
        boxes += bool(jnp.isin(mixed, jnp.array([1.0, 2.0, 3.0, 4.0])).all())
    assert scipy.stats.binomtest(boxes, 80, 0.25).pvalue > 1e-3


def test_without_both_only_labels_are_smoothed():
    images, labels = batch()
    mixed, targets = Mix(mixup=0.0, cutmix=0.0)(jax.random.key(0), images, labels, CLASSES)
    assert (mixed == images).all()
    assert (targets == smooth(labels, CLASSES, 0.1)).all()


@pytest.mark.parametrize("arguments", [{"mixup": -1.0}, {"cutmix": -0.1}, {"switch": 2.0}, {"smoothing": 1.0}])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=r"Mix\(.*expected mixup and cutmix >= 0"):
        Mix(**arguments)
