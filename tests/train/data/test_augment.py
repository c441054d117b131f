import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image

from train.data import ImageTransform
from train.data.augment import boxes
from train.data.augment import images as augment

KEY = jax.random.key(0)
resize = jax.jit(augment.resize, static_argnames=("size", "antialias"))


def pictures(n, height, width, channels=3, seed=0):
    """Smooth pictures with noise, uint8: neither constant nor white."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 5, 5, channels)).astype(np.uint8)
    smooth = np.stack([cv2.resize(one, (width, height)).reshape(height, width, channels) for one in coarse])
    return np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)


def pil_resize(image, size):
    """float64 of shape (size, size, channels): PIL's bilinear filter without rounding to grey levels."""
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
        for c in range(image.shape[-1])
    ]
    return np.stack([np.asarray(channel, np.float64) for channel in channels], -1)


def device_boxes(n, height, width, area):
    draw = functools.partial(augment.random_box, height=height, width=width, area=area, ratio=(3 / 4, 4 / 3))
    return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, n)))


def host_boxes(n, height, width, area):
    rng = np.random.default_rng(0)
    return np.array([boxes.random_box(rng, height, width, area) for _ in range(n)])


def test_flip_mirrors_half_of_the_images():
    images = pictures(400, 4, 5)
    flipped = np.asarray(jax.jit(augment.random_flip)(KEY, images))
    mirrored = np.array([(a == b[:, ::-1]).all() for a, b in zip(flipped, images, strict=True)])
    same = np.array([(a == b).all() for a, b in zip(flipped, images, strict=True)])
    assert (mirrored ^ same).all()
    assert scipy.stats.binomtest(int(mirrored.sum()), 400).pvalue > 1e-3
    assert flipped.dtype == np.uint8


@pytest.mark.slow
def test_crops_are_windows_of_the_padded_image():
    images, padding = pictures(600, 6, 7), 2
    cropped = np.asarray(jax.jit(augment.random_crop, static_argnums=2)(KEY, images, padding))
    counts = np.zeros((2 * padding + 1,) * 2)
    for image, crop in zip(images, cropped, strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, image.shape)[:, :, 0]
        found = np.argwhere((windows == crop).all((2, 3, 4)))
        assert len(found) == 1
        counts[tuple(found[0])] += 1
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-3
    assert (np.asarray(augment.random_crop(KEY, images, 0)) == images).all()


def test_negative_padding():
    with pytest.raises(ValueError, match="padding: got -1"):
        augment.random_crop(KEY, pictures(1, 4, 4), -1)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 64), (32, 32, 75), (40, 30, 17), (31, 64, 31), (8, 8, 8)]
)
def test_resize_is_that_of_pil(height, width, size):
    images = pictures(2, height, width)
    resized = np.asarray(resize(images, size))
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, [pil_resize(image, size) for image in images], atol=2e-3)


@pytest.mark.parametrize("size", [13, 32, 50])
def test_resize_without_antialias_is_that_of_opencv(size):
    images = pictures(2, 32, 24)
    expected = [cv2.resize(image.astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR) for image in images]
    np.testing.assert_allclose(resize(images, size, antialias=False), expected, atol=2e-3)


@pytest.mark.slow
def test_random_resized_crop_cuts_and_then_resizes_as_pil():
    images = pictures(8, 32, 24)
    crops = np.asarray(jax.jit(augment.random_resized_crop, static_argnums=(2, 3))(KEY, images, 20, (0.1, 0.9)))
    drawn = device_boxes(8, 32, 24, (0.1, 0.9))
    assert len(set(map(tuple, drawn.tolist()))) == 8
    for image, crop, (top, left, height, width) in zip(images, crops, drawn, strict=True):
        expected = pil_resize(image[top : top + height, left : left + width], 20)
        np.testing.assert_allclose(crop, expected, atol=5e-3)


@pytest.mark.parametrize("draw", [device_boxes, host_boxes])
def test_distribution_of_the_boxes(draw):
    top, left, height, width = draw(3000, 300, 400, (0.2, 0.4)).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    # At most 40 % of the area fits with any ratio, so nothing is drawn again and both draws are uniform.
    assert scipy.stats.kstest(height * width / 120_000, scipy.stats.uniform(0.2, 0.2).cdf).pvalue > 1e-3
    low, high = np.log([3 / 4, 4 / 3])
    assert scipy.stats.kstest(np.log(width / height), scipy.stats.uniform(low, high - low).cdf).pvalue > 1e-3
    # The place is a whole number from 0 to 300 - height: spread evenly within its step, it is uniform.
    place = (top + np.random.default_rng(1).random(3000)) / (301 - height)
    assert scipy.stats.kstest(place, "uniform").pvalue > 1e-3


def test_device_and_host_draw_boxes_alike():
    for one, other in zip(
        device_boxes(2000, 60, 40, (0.08, 1.0)).T, host_boxes(2000, 60, 40, (0.08, 1.0)).T, strict=True
    ):
        assert scipy.stats.ks_2samp(one, other).pvalue > 1e-3


@pytest.mark.parametrize("draw", [device_boxes, host_boxes])
@pytest.mark.parametrize(("height", "width", "expected"), [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10))])
def test_where_no_box_fits_the_middle_is_taken(draw, height, width, expected):
    assert set(map(tuple, draw(20, height, width, (0.9, 1.0)).tolist())) == {expected}


def test_normalise():
    images = pictures(2, 3, 4)
    expected = (images / 255 - np.array(augment.IMAGENET_MEAN)) / np.array(augment.IMAGENET_STD)
    np.testing.assert_allclose(augment.normalise(images), expected, rtol=1e-5, atol=1e-6)
    lite = augment.normalise(images, augment.LITE_MEAN, augment.LITE_STD)
    np.testing.assert_allclose(lite, (images.astype(float) - 127) / 128, atol=1e-6)


def test_host_cut_is_that_of_the_device():
    image = pictures(1, 50, 40)[0]
    box = boxes.middle(50, 40, 0.875)
    assert box == (7, 2, 35, 35)
    cut = boxes.cut(image, box, 24)
    assert (cut.shape, cut.dtype) == ((24, 24, 3), np.uint8)
    expected = resize(image[None, 7:42, 2:37], 24)[0]
    np.testing.assert_allclose(cut, expected, atol=1.01)  # two roundings to grey levels
    assert boxes.cut(image[..., :1], box, 24).tolist() == cut[..., :1].tolist()


@pytest.mark.slow
def test_the_transform_in_training():
    images, labels = pictures(16, 12, 12), jnp.arange(16, dtype=jnp.int32) % 3
    transform = ImageTransform(24, padding=2, flip=True)
    train = jax.jit(functools.partial(transform.train, num_classes=3))
    inputs, kept = train(KEY, images, labels)
    assert (inputs.shape, inputs.dtype) == ((16, 24, 24, 3), jnp.float32)
    assert kept.tolist() == labels.tolist()
    again, other = train(KEY, images, labels)[0], train(jax.random.key(1), images, labels)[0]
    assert (inputs == again).all()
    assert (np.asarray(inputs != other).mean((1, 2, 3)) > 0.5).mean() > 0.8
    crop_key, flip_key = jax.random.split(KEY, 5)[:2]
    move = jax.jit(lambda images: augment.random_flip(flip_key, augment.random_crop(crop_key, images, 2)))
    moved = np.asarray(move(images))
    expected = augment.normalise(np.stack([pil_resize(image, 24) for image in moved]).astype(np.float32))
    np.testing.assert_allclose(inputs, expected, atol=1e-4)


@pytest.mark.slow
def test_the_transform_of_deit():
    images, labels = pictures(8, 12, 12), jnp.arange(8, dtype=jnp.int32) % 3
    train = jax.jit(functools.partial(ImageTransform.deit(16).train, num_classes=3))
    inputs, probabilities = train(KEY, images, labels)
    assert (inputs.shape, probabilities.shape) == ((8, 16, 16, 3), (8, 3))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    assert np.isfinite(inputs).all()
    assert (inputs == train(KEY, images, labels)[0]).all()
    assert not (inputs == train(jax.random.key(1), images, labels)[0]).all()


def test_the_transform_in_evaluation():
    images = pictures(2, 12, 10)
    expected = augment.normalise(np.stack([pil_resize(image, 24) for image in images]).astype(np.float32))
    np.testing.assert_allclose(jax.jit(ImageTransform(24, flip=True).evaluate)(images), expected, atol=1e-4)


def test_grey_images_get_three_channels():
    images = pictures(2, 8, 8, channels=1)
    transform = ImageTransform(8, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert (transform.evaluate(images)[..., 0] == transform.evaluate(images)[..., 2]).all()
    assert transform.train(KEY, images, jnp.zeros(2, jnp.int32), 2)[0].shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size, padding: got 0"),
        ({"padding": -1}, "size, padding: got 8 and -1"),
        ({"area": (0.5, 0.1)}, "area: got"),
        ({"std": (1.0, 1.0, 0.0)}, "std above 0"),
        ({"mean": (0.5,)}, "three numbers each"),
        ({"crop_fraction": 0.0}, "crop_fraction: got 0.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageTransform(**{"size": 8, **arguments})
