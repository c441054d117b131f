import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tests.train.data.test_augment import pictures
from train.data import RandAugment
from train.data.augment import rand_augment

FILL = (124, 116, 104)


@functools.cache
def operate():
    return jax.jit(rand_augment.operate)


def ours(name, image, level, sign):
    result = operate()(
        rand_augment.NAMES.index(name),
        jnp.asarray(image, jnp.float32),
        jnp.float32(level),
        jnp.float32(sign),
        jnp.asarray(FILL, jnp.float32),
    )
    result = np.asarray(result)
    assert (result == np.round(result)).all()
    assert result.min() >= 0
    assert result.max() <= 255
    return result.astype(int)


def affine(picture, matrix):
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=FILL
    )


def enhanced(kind):
    return lambda picture, level, sign: kind(picture).enhance(max(0.1, 1 + sign * level * 0.9))


REFERENCES = {
    "rotate": lambda p, level, sign: p.rotate(30 * level * sign, resample=Image.Resampling.BILINEAR, fillcolor=FILL),
    "shear_x": lambda p, level, sign: affine(p, (1, 0.3 * level * sign, 0, 0, 1, 0)),
    "shear_y": lambda p, level, sign: affine(p, (1, 0, 0, 0.3 * level * sign, 1, 0)),
    "translate_x": lambda p, level, sign: affine(p, (1, 0, 0.45 * level * sign * p.size[0], 0, 1, 0)),
    "translate_y": lambda p, level, sign: affine(p, (1, 0, 0, 0, 1, 0.45 * level * sign * p.size[1])),
    "autocontrast": lambda p, level, sign: ImageOps.autocontrast(p),
    "equalize": lambda p, level, sign: ImageOps.equalize(p),
    "invert": lambda p, level, sign: ImageOps.invert(p),
    "posterize": lambda p, level, sign: ImageOps.posterize(p, max(1, 4 - int(level * 4))),
    "solarize": lambda p, level, sign: ImageOps.solarize(p, 256 - int(level * 256)),
    "solarize_add": lambda p, level, sign: p.point(
        [min(255, i + int(level * 110)) if i < 128 else i for i in range(256)] * 3
    ),
    "color": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "brightness": enhanced(ImageEnhance.Brightness),
    "sharpness": enhanced(ImageEnhance.Sharpness),
}


def narrow(image):
    """Few grey levels, so that autocontrast and equalize have something to do."""
    return (image // 3 + 60).astype(np.uint8)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.slow
def test_operations_are_those_of_pil(name):
    exact = 0
    for seed, (level, sign) in enumerate([(0.0, 1), (0.35, -1), (0.5, 1), (0.9, -1), (0.9, 1), (1.0, 1)]):
        image = pictures(1, 31, 40, seed=seed)[0]
        for one in (image, narrow(image)):
            expected = np.asarray(REFERENCES[name](Image.fromarray(one), level, sign)).astype(int)
            difference = np.abs(ours(name, one, level, sign) - expected)
            # A source place on the very edge may fall on either side: such pixels are either filled or not.
            assert (difference > 1).mean() <= (0.002 if name in rand_augment.WARPS else 0.0)
            exact += (difference == 0).mean()
    assert exact / 12 > (0.4 if name in rand_augment.WARPS else 0.95)


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_a_picture_of_one_colour_stays(name):
    image = np.full((31, 40, 3), 77, np.uint8)
    assert (ours(name, image, 0.9, 1) == 77).all()


def test_names_are_those_of_the_references():
    assert set(rand_augment.NAMES) == set(REFERENCES)
    assert len(rand_augment.NAMES) == 15


def grey_of(count):
    return jnp.broadcast_to(jnp.arange(64.0).reshape(8, 8, 1) * 3 + 30, (count, 8, 8, 3))


@pytest.mark.slow
def test_operations_are_drawn_evenly_and_used_with_their_probability(monkeypatch):
    """Each operation is put in place by its number; one image in two is left alone."""
    monkeypatch.setattr(rand_augment, "operate", lambda which, image, level, sign, fill: jnp.stack(
        [which.astype(jnp.float32), level, sign]))  # fmt: skip
    drawn = RandAugment(operations=1)(jax.random.key(3), jnp.full((6000, 3), -1.0)[:, :])
    which, level, sign = np.asarray(drawn).T
    used = which >= 0
    assert abs(used.mean() - 0.5) < 4 * 0.5 / np.sqrt(6000)
    counts = np.bincount(which[used].astype(int), minlength=15)
    assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())
    assert abs(sign[used].mean()) < 0.1
    assert set(np.unique(sign[used])) == {-1.0, 1.0}
    inner = level[used & (level < 1)]
    assert (level[used] <= 1).all()
    # A normal distribution of mean 0.9 and deviation 0.05, cut off at 1 (two deviations: 2.3 % of the draws).
    assert abs(np.median(level[used]) - 0.9) < 0.005
    assert abs((level[used] == 1).mean() - 0.0228) < 0.01
    assert abs(np.percentile(inner, 16) - 0.85) < 0.006


@pytest.mark.slow
def test_a_batch():
    images, augmented = grey_of(16), jax.jit(RandAugment(probability=1.0))
    once, again, other = (augmented(jax.random.key(seed), images) for seed in (0, 0, 1))
    assert once.shape == images.shape
    assert (once == again).all()
    assert not (once == other).all()
    assert len({np.asarray(image).tobytes() for image in once}) > 8
    assert (jax.jit(RandAugment(probability=0.0))(jax.random.key(0), images) == images).all()


@pytest.mark.parametrize(
    "arguments", [{"operations": 0}, {"magnitude": 11.0}, {"std": -1.0}, {"probability": 1.5}]
)  # fmt: skip
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=r"RandAugment\(.*expected operations >= 1"):
        RandAugment(**arguments)
