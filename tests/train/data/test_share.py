"""Batches on a mesh are those of one device; each process reads its rows of them."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.train.devices.small_finetuning import BATCH, EVALUATED, EXAMPLES, write_images
from train.data import DeviceImages, HostImages, ImageTransform, open_split
from train.data.share import Share
from train.devices.mesh import by_example, make_mesh

CROPS = ImageTransform(8, area=(0.2, 1.0))
KINDS = pytest.mark.parametrize("kind", [DeviceImages, HostImages])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    write_images(folder)
    return folder


@KINDS
@pytest.mark.parametrize("text", ["data=8", "data=2,fsdp=4"])
def test_batches_on_a_mesh_are_those_of_one_device(folder, kind, text):
    def make(split, mesh=None):
        return kind(open_split("small", split, folder), BATCH, CROPS, seed=3, drop_last=split == "train", mesh=mesh)

    mesh = make_mesh(text, batch_size=BATCH)
    one, many = make("train"), make("train", mesh)
    for step in (0, EXAMPLES // BATCH):
        assert_same(one.batch(step), many.batch(step), by_example(mesh))
        np.testing.assert_array_equal(jax.random.key_data(one.key(step)), jax.random.key_data(many.key(step)))
    assert many.key(0).sharding.is_fully_replicated
    assert many.key(0).sharding.num_devices == 8
    one, many = make("test"), make("test", mesh)
    for batch, other in zip(one.evaluation_batches(), many.evaluation_batches(), strict=True):
        assert_same(batch, other, by_example(mesh))
    assert sum(float(batch.weights.sum()) for batch in many.evaluation_batches()) == EVALUATED


@KINDS
def test_so_are_their_views(folder, kind):
    def view(mesh=None):
        transform = dataclasses.replace(CROPS, flip=True, views=2)
        data = kind(open_split("small", "train", folder), BATCH, transform, seed=3, mesh=mesh)
        step = data.steps_per_epoch + 1
        return data.in_view(data.view(step), data.indices(step), *data.batch(step)[:2])

    mesh = make_mesh("data=8", batch_size=BATCH)
    (images,), labels = view(mesh)
    assert images.sharding == by_example(mesh)
    ((expected,), classes) = view()
    np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(labels, classes)


def assert_same(batch, other, sharding):
    for leaf, on_mesh in zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(leaf, on_mesh)
        assert on_mesh.sharding.is_equivalent_to(sharding, on_mesh.ndim)


def test_what_processes_read_of_a_batch_is_a_partition_of_it(folder):
    """With random boxes: those of one process do not depend on the images of another."""
    whole = HostImages(open_split("small", "train", folder), BATCH, CROPS, seed=3)._reader
    parts = [dataclasses.replace(whole, rows=np.arange(BATCH)[rows]) for rows in (slice(0, 3), slice(3, None))]
    for method in ("train", "evaluate"):
        expected = getattr(whole, method)(1)
        for found, of in zip(zip(*(getattr(part, method)(1) for part in parts), strict=True), expected, strict=True):
            np.testing.assert_array_equal(np.concatenate(found), of)


def test_one_process_reads_every_row():
    for text in (None, "data=1", "data=4,fsdp=2"):
        np.testing.assert_array_equal(Share(make_mesh(text, batch_size=16), 16).rows, np.arange(16))
