import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.support.tfds_writer import write_set
from train.data import DeviceImages, HostImages, ImageTransform, open_images, open_split
from train.data.batch import in_views

CROPS = ImageTransform(16, area=(0.2, 1.0), flip=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A set of 23 images of 12 x 10 pixels and one of 11 of varying size; each label is the image's number modulo 3."""
    folder = tmp_path_factory.mktemp("tfds")
    label = tfds.features.ClassLabel(num_classes=3)
    for name, shape, count in (("same", (12, 10, 3), 23), ("varying", (None, None, 3), 11)):
        image = tfds.features.Image(shape=shape, encoding_format="png")
        rows = [{"image": png(i, *(shape[:2] if shape[0] else (20 + i, 40 - i))), "label": i % 3} for i in range(count)]
        spec = tfds.features.FeaturesDict({"image": image, "label": label})
        write_set(folder, name, spec, {"train": rows})
    return folder


def png(i, height, width):
    """An image whose first channel is its number; the others are noise."""
    pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[..., 0] = i
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def numbers(batch):
    return np.asarray(batch.inputs[0][:, 0, 0, 0]).tolist()


def make(kind, folder, transform=CROPS, **arguments):
    if kind == "device":
        return DeviceImages(open_split("same", "train", folder), 4, transform, seed=5, **arguments)
    return HostImages(open_split("varying", "train", folder), 4, transform, seed=5, **arguments)


def as_arrays(batch):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for a, b in zip(as_arrays(batch), as_arrays(other), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["device", "host"])
@pytest.mark.slow
def test_stopping_anywhere_and_carrying_on(written, kind):
    data = make(kind, written)
    steps = 2 * data.steps_per_epoch + 2  # over two ends of an epoch
    whole = list(data.batches(0, steps))
    for stop in range(steps + 1):
        fresh = make(kind, written) if stop % 4 == 0 else data  # a new process has nothing but the step
        assert_same(fresh.batches(stop, steps), whole[stop:])
    assert_same((data.batch(step) for step in reversed(range(steps))), reversed(whole))
    assert (data.key(3) == make(kind, written).key(3)).all()
    assert len({jax.random.key_data(data.key(step)).tobytes() for step in range(steps)}) == steps


@pytest.mark.parametrize(("kind", "examples"), [("device", 23), ("host", 11)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch(written, kind, examples, drop_last):
    data = make(kind, written, drop_last=drop_last)
    assert data.steps_per_epoch == (examples // 4 if drop_last else -(-examples // 4))
    seen = []
    for batch in data.batches(0, data.steps_per_epoch):
        assert batch.labels.tolist() == [i % 3 for i in numbers(batch)]
        seen += [i for i, weight in zip(numbers(batch), batch.weights, strict=True) if weight == 1]
    assert len(set(seen)) == len(seen) == (examples // 4 * 4 if drop_last else examples)


@pytest.mark.parametrize(("kind", "examples"), [("device", 23), ("host", 11)])
def test_evaluation_has_every_example_once_and_one_shape(written, kind, examples):
    data = make(kind, written)
    batches = list(data.evaluation_batches())
    assert len(batches) == data.evaluation_steps == -(-examples // 4)
    used = [i for batch in batches for i, weight in zip(numbers(batch), batch.weights, strict=True) if weight == 1]
    assert used == list(range(examples))

    programs = []

    @jax.jit
    def right(inputs, labels, weights):
        programs.append(1)
        (images,) = data.prepare(inputs)
        level = images[:, 8, 8, 0] * (255 * 0.229) + 255 * 0.485  # undo the normalisation: the image's number
        return ((jnp.round(level) % 3 == labels.astype(level.dtype)).astype(weights.dtype) * weights).sum()

    assert sum(float(right(*batch)) for batch in batches) == examples
    assert len(programs) == 1


def test_batches_without_end(written):
    batches = make("device", written).batches(start_step=3)
    assert_same([next(batches) for _ in range(10)], make("device", written).batches(3, 13))


def test_host_batches_without_end(written):
    batches = make("host", written).batches(start_step=3)
    assert_same([next(batches) for _ in range(6)], make("host", written).batches(3, 9))
    batches.close()


def test_seeds_have_orders_and_boxes_of_their_own(written):
    split = open_split("varying", "train", written)
    one, other = (HostImages(split, 11, CROPS, seed=seed).batch(0) for seed in (0, 1))
    assert sorted(numbers(one)) == sorted(numbers(other))
    assert numbers(one) != numbers(other)
    order = np.argsort(numbers(one)), np.argsort(numbers(other))
    assert (np.asarray(one.inputs[0])[order[0]] != np.asarray(other.inputs[0])[order[1]]).any((1, 2, 3)).all()


def test_the_device_gets_the_bytes_of_the_set(written):
    split = open_split("same", "train", written)
    data = DeviceImages(split, 4, ImageTransform(16))
    records = split.fetch(range(23))
    np.testing.assert_array_equal(data.images, records.inputs[0])
    assert data.labels.tolist() == records.labels.tolist()
    assert data.batch(0).inputs[0].dtype == np.uint8
    with jax.transfer_guard("disallow"):
        data.batch(1)


def test_evaluation_on_the_host_sees_the_middle(written):
    split = open_split("varying", "train", written)
    data = HostImages(split, 4, ImageTransform(16, crop_fraction=0.5))
    image = split.fetch([1]).inputs[0][0]  # 21 x 39: the middle 10 x 10
    expected = Image.fromarray(image[5:15, 14:24]).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(data.evaluation_batch(0).inputs[0][1], expected)
    assert (
        data.batch(0).inputs[0] == HostImages(split, 4, ImageTransform(16, crop_fraction=0.5)).batch(0).inputs[0]
    ).all()


@pytest.mark.slow
def test_images_of_one_size_are_whole_wherever_they_are_held(written):
    """Training and evaluation split may lie in different places, as one of them is larger."""
    split = open_split("same", "train", written)
    held, read = (open_images(split, 4, ImageTransform(16), memory=memory) for memory in (None, 0))
    assert (type(held), type(read)) == (DeviceImages, HostImages)
    for of in ("batch", "evaluation_batch"):
        ((one,), (other,)) = (data.prepare(getattr(data, of)(0).inputs) for data in (held, read))
        np.testing.assert_allclose(one, other, atol=1 / 255 / 0.22)  # the host rounds to grey levels


def test_which_way_is_taken(written):
    same, varying = (open_split(name, "train", written) for name in ("same", "varying"))
    assert isinstance(open_images(same, 4, CROPS), DeviceImages)
    assert isinstance(open_images(same, 4, CROPS, memory=23 * 12 * 10 * 3), DeviceImages)
    assert isinstance(open_images(same, 4, CROPS, memory=23 * 12 * 10 * 3 - 1), HostImages)
    assert isinstance(open_images(varying, 4, CROPS), HostImages)
    with pytest.raises(ValueError, match=r"images of varying/1.0.0 are of shape \(None, None, 3\), .*take HostImages"):
        DeviceImages(varying, 4, CROPS)


@pytest.mark.parametrize("kind", ["device", "host"])
def test_wrong_arguments(written, kind):
    data = make(kind, written)
    with pytest.raises(ValueError, match="start_step, stop_step: got -1 and None, expected 0 <="):
        data.batches(-1)
    with pytest.raises(ValueError, match="got 3 and 2"):
        data.batches(3, 2)
    assert list(data.batches(2, 2)) == []
    with pytest.raises(ValueError, match="step: got -1"):
        data.batch(-1)


def test_wrong_arguments_of_the_host(written):
    with pytest.raises(ValueError, match="workers: got -1"):
        make("host", written, workers=-1)


def test_what_is_not_an_image_set(tmp_path):
    label = tfds.features.ClassLabel(num_classes=2)
    spec = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": label})
    write_set(tmp_path, "texts", spec, {"train": [{"text": "", "label": 0}]})
    with pytest.raises(ValueError, match=r"texts/1.0.0 holds texts, expected images; take Sentences"):
        open_images(open_split("texts", "train", tmp_path), 1, CROPS)
    spec = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(2, 2, 4)), "label": label})
    write_set(tmp_path, "four", spec, {"train": [{"image": b"", "label": 0}]})
    with pytest.raises(ValueError, match=r"images of four/1.0.0 are of shape \(2, 2, 4\), expected .* 1 or 3 channels"):
        open_images(open_split("four", "train", tmp_path), 1, CROPS)


def test_an_error_in_a_thread_reaches_the_loop(tmp_path, written):
    label = tfds.features.ClassLabel(num_classes=3)
    spec = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 3)), "label": label})
    rows = [{"image": png(i, 8, 8) if i != 6 else b"broken", "label": 0} for i in range(8)]
    write_set(tmp_path, "damaged", spec, {"train": rows})
    data = HostImages(open_split("damaged", "train", tmp_path), 4, CROPS)
    with pytest.raises(ValueError, match=r"example 6 of split 'train' of damaged/1.0.0 .* cannot be read"):
        list(data.evaluation_batches())


@pytest.mark.slow
def test_cifar_through_a_worker_process(shared):
    """CIFAR as if it did not fit: what one worker process gives is what the threads give."""
    split = open_split("cifar10", "train[:300]", shared / "data/tfds")
    transform = ImageTransform(48, area=(0.08, 1.0), flip=True)
    threads, worker = (HostImages(split, 32, transform, seed=1, workers=workers) for workers in (0, 1))
    assert_same(worker.batches(5, 12), threads.batches(5, 12))
    assert_same(worker.evaluation_batches(), threads.evaluation_batches())


@pytest.mark.slow
def test_the_whole_of_cifar(shared):
    split = open_split("cifar10", "test", shared / "data/tfds")
    data = open_images(split, 128, ImageTransform(32))
    assert isinstance(data, DeviceImages)
    assert np.bincount(data.labels).tolist() == [1000] * 10
    weights = [float(batch.weights.sum()) for batch in data.evaluation_batches()]
    assert (len(weights), sum(weights), weights[-1]) == (79, 10_000, 16)
    mean = np.asarray(data.images, np.float32).mean((0, 1, 2)) / 255
    np.testing.assert_allclose(mean, [0.4942, 0.4851, 0.4504], atol=2e-3)  # published, of the test images


def in_their_views(data, epochs, start=0):
    """Every image that a run sees from a step on, by its number and its view."""
    seen, steps = {}, range(start, epochs * data.steps_per_epoch)
    batches = ((data.indices(step), *data.batch(step)[:2]) for step in steps)
    for step, (indices, (images,), labels) in zip(steps, in_views(data, start, batches), strict=True):
        np.testing.assert_array_equal(labels, data.batch(step).labels)
        for number, image in zip(indices, np.asarray(images), strict=True):
            seen.setdefault((int(number), data.view(step)), []).append(image)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["device", "host"])
def test_of_each_image_there_are_so_many_views(kind, written):
    """Whatever others are in its batch, and wherever a run goes on."""
    data = make(kind, written, dataclasses.replace(CROPS, views=2))
    seen = in_their_views(data, 6)
    assert {view for _, view in seen} == {0, 1}
    assert max(map(len, seen.values())) > 1
    assert all((image == images[0]).all() for images in seen.values() for image in images)
    both = [number for number, view in seen if view and (number, 0) in seen]
    assert all((seen[number, 0][0] != seen[number, 1][0]).any() for number in both)
    later = in_their_views(data, 6, start=3)
    assert all((images[0] == seen[of][0]).all() for of, images in later.items())
    anew = make(kind, written)
    assert anew.view(7) == 0
    assert list(in_views(anew, 0, [("batch",)])) == [("batch",)]


def test_views_of_mixed_images_are_refused():
    with pytest.raises(ValueError, match=r"views: got 2 with mix=Mix.*such an image depends on others"):
        ImageTransform.deit(16, views=2)
