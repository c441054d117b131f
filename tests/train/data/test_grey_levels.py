"""Images of other types and shapes than uint8: rescaled or refused, on the host and on the device, never wrapped."""

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.support.tfds_writer import write_set
from train.data import DeviceImages, HostImages, ImageTransform, open_split

ANY = (None, None, 3)


def png(pixels, kind=".png"):
    return cv2.imencode(kind, pixels)[1].tobytes()


def write(folder, encoded, dtype=np.uint8, shape=(4, 4, 3), labels=None):
    """A set of these images; opens its only split."""
    image = tfds.features.Image(shape=shape, dtype=dtype, encoding_format=None)
    spec = tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=3)})
    rows = [{"image": one, "label": label} for one, label in zip(encoded, labels or [0] * len(encoded), strict=True)]
    write_set(folder, "pictures", spec, {"train": rows})
    return open_split("pictures", "train", folder)


@pytest.mark.parametrize("data", [DeviceImages, HostImages])
def test_16_bits_are_rescaled(tmp_path, data):
    levels = np.array([0, 128, 129, 1000, 2000, 32768, 65406, 65535], np.uint16)
    pixels = np.broadcast_to(levels.reshape(-1, 1, 1, 1), (8, 4, 4, 1))
    split = write(tmp_path, [png(one) for one in pixels], np.uint16, (4, 4, 1))
    expected = np.round(levels / 257)
    np.testing.assert_array_equal([image[0, 0, 0] for image in split.fetch(range(8)).inputs[0]], expected)
    batch = data(split, 8, ImageTransform(4)).evaluation_batch(0)
    np.testing.assert_array_equal(batch.inputs[0], np.broadcast_to(expected.reshape(-1, 1, 1, 1), (8, 4, 4, 1)))


def test_colours_of_16_bits_keep_their_order(tmp_path):
    blue_green_red = np.broadcast_to(np.array([257, 2570, 25700], np.uint16), (4, 4, 3))
    split = write(tmp_path, [png(blue_green_red)], np.uint16)
    np.testing.assert_array_equal(split.fetch([0]).inputs[0][0][0, 0], [100, 10, 1])


def test_images_of_unknown_range_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"name: the images of pictures/1.0.0 are float32, .* expected uint8 or uint16"
    ):
        write(tmp_path, [png(np.zeros((4, 4, 4), np.uint8))], np.float32, (4, 4, 1))


@pytest.mark.parametrize(
    ("pixels", "kind", "dtype", "shape", "message"),
    [
        (np.full((4, 4, 3), 1000, np.uint16), ".png", np.uint8, (4, 4, 3), "16 bits a channel, expected 8, .* uint8"),
        (np.full((4, 4, 3), 200, np.uint8), ".png", np.uint16, (4, 4, 3), "8 bits a channel, expected 16, .* uint16"),
        (np.zeros((1, 1, 3), np.uint8), ".png", np.uint8, (4, 4, 3), r"shape \(1, 1, 3\), expected \(4, 4, 3\)"),
        (np.zeros((1, 4, 3), np.uint8), ".jpg", np.uint8, (4, 4, 3), r"shape \(1, 4, 3\), expected \(4, 4, 3\)"),
        (np.zeros((5, 4, 4), np.uint8), ".png", np.uint8, ANY, r"shape \(5, 4, 4\), expected \(None, None, 3\)"),
        (np.zeros((5, 4, 3), np.uint8), ".png", np.uint8, (None, None, 1), r"\(5, 4, 3\), expected \(None, None, 1\)"),
    ],
)
def test_an_image_that_is_not_as_the_set_says_is_named(tmp_path, pixels, kind, dtype, shape, message):
    good = png(np.zeros((4, 4, shape[-1]), dtype))
    split = write(tmp_path, [good, png(pixels, kind)], dtype, shape)
    split.fetch([0])
    with pytest.raises(
        ValueError, match=rf"example 1 of split 'train' of pictures/1.0.0 .* cannot be read: .*{message}"
    ):
        split.fetch([0, 1])
    with pytest.raises(ValueError, match="example 1 of split"):
        (DeviceImages if shape[0] else HostImages)(split, 2, ImageTransform(4)).evaluation_batch(0)


def test_grey_images_among_coloured_ones_have_three_channels(tmp_path):
    split = write(tmp_path, [png(np.full((5, 4, 1), 7, np.uint8)), png(np.full((4, 6, 3), 9, np.uint8))], shape=ANY)
    batch = HostImages(split, 2, ImageTransform(4)).evaluation_batch(0)
    np.testing.assert_array_equal(batch.inputs[0][:, 0, 0], [[7, 7, 7], [9, 9, 9]])


@pytest.mark.parametrize("label", [2**32, 2**40 + 1, -(2**32)])
def test_a_label_of_64_bits_is_not_cut_to_one_of_32(tmp_path, label):
    split = write(tmp_path, [png(np.zeros((4, 4, 3), np.uint8))], labels=[label])
    with pytest.raises(ValueError, match=f"example 0 .* has label {label}, expected 0 to 2"):
        split.fetch([0])
