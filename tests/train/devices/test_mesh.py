"""The mesh of ``--mesh``: what it may be, and where arrays lie on it. Eight fake devices."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from train.devices import mesh as meshes
from train.devices.mesh import make_mesh, sharding_of


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        (None, {"data": 8, "fsdp": 1}),
        ("data=8", {"data": 8, "fsdp": 1}),
        ("data=4,fsdp=2", {"data": 4, "fsdp": 2}),
        ("fsdp=2, data=4", {"data": 4, "fsdp": 2}),
        ("fsdp=8", {"data": 1, "fsdp": 8}),
    ],
)
def test_the_axes_of_a_mesh(text, axes):
    mesh = make_mesh(text, batch_size=16)
    assert dict(mesh.shape) == axes
    assert mesh.size == 8


def test_one_device_needs_no_mesh(monkeypatch):
    assert make_mesh("data=1", batch_size=3) is None
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert make_mesh(None, batch_size=3) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=4", "--mesh: got data=4, which is 4 devices, expected 8, which are there; .*such as data=8"),
        ("data=4,fsdp=4", "got data=4,fsdp=4, which is 16 devices, expected 8"),
        ("model=8", "--mesh: got 'model=8', expected numbers of devices for the axes data and fsdp"),
        ("data=8,data=1", "--mesh: got 'data=8,data=1'"),
        ("data", "--mesh: got 'data'"),
        ("data=0", "--mesh: got 'data=0'"),
        ("data=-8", "--mesh: got 'data=-8'"),
        ("data=eight", "--mesh: got 'data=eight'"),
        ("", "--mesh: got ''"),
    ],
)
def test_a_mesh_that_is_not_there_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(text, batch_size=16)


@pytest.mark.parametrize(
    ("text", "batch_size", "accumulate", "message"),
    [
        (
            None,
            12,
            1,
            "got 12, expected a multiple of 8, .* there is no --mesh.; take --batch-size 8 or 16, or --mesh data=1",
        ),
        (None, 4, 1, "got 4, expected a multiple of 8, .*; take --batch-size 8, or --mesh data=1, which trains on one"),
        ("data=4,fsdp=2", 12, 1, "got 12, expected a multiple of 8, the 8 devices of --mesh data=4,fsdp=2; take"),
        (
            "data=8",
            24,
            2,
            "got 24, expected a multiple of 16, .*times the 2 of --accumulate; take --batch-size 16 or 32",
        ),
        (
            "data=1",
            9,
            2,
            "got 9, .* multiple of 2, the 1 devices of --mesh data=1 times the 2.*; take --batch-size 8 or 10$",
        ),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused(text, batch_size, accumulate, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(text, batch_size=batch_size, accumulate=accumulate)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 64), PartitionSpec("fsdp")),
        ((64, 256), PartitionSpec(None, "fsdp")),
        ((3, 3, 64, 66), PartitionSpec(None, None, None, "fsdp")),
        ((3, 3, 64, 67), PartitionSpec(None, None, "fsdp")),
        ((4097,), PartitionSpec()),
        ((64, 63), PartitionSpec()),  # small
        ((4096,), PartitionSpec("fsdp")),
        ((), PartitionSpec()),
    ],
)
def test_parameters_are_split_along_their_largest_side_that_divides(shape, spec):
    assert sharding_of(shape, make_mesh("data=4,fsdp=2", batch_size=8)).spec == spec
    assert sharding_of(shape, make_mesh("data=8", batch_size=8)).spec == PartitionSpec()


def test_a_module_is_placed_with_its_values_and_keys():
    def make():
        return nnx.Sequential(nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))

    mesh, module = make_mesh("data=4,fsdp=2", batch_size=8), make()
    meshes.place_module(module, mesh)
    for leaf, before in zip(jax.tree.leaves(nnx.state(module)), jax.tree.leaves(nnx.state(make())), strict=True):
        assert leaf.sharding == sharding_of(leaf.shape, mesh)
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, before = jax.random.key_data(leaf), jax.random.key_data(before)
        np.testing.assert_array_equal(leaf, before)
    assert module.layers[0].kernel[...].addressable_shards[0].data.shape == (64, 64)
