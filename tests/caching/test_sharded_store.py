"""Activations divided among devices come back bit for bit, and each device holds its share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smartfrz_jax.caching import exchange
from smartfrz_jax.caching.store import ActivationCache

FRONTIER = [
    jax.ShapeDtypeStruct((3, 2), jnp.float32),
    jax.ShapeDtypeStruct((4,), jnp.bfloat16),
    jax.ShapeDtypeStruct((), jnp.int32),
    jax.ShapeDtypeStruct((2,), jnp.bool_),
]
EXAMPLES, VIEWS = 21, 2


def mesh_of(sizes, names):
    return jax.make_mesh(
        sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=jax.devices()[: np.prod(sizes)]
    )


# Over both axes, and over one of two, with copies along the other.
SHARDINGS = [
    NamedSharding(mesh_of((8,), ("data",)), PartitionSpec("data")),
    NamedSharding(mesh_of((4, 2), ("data", "fsdp")), PartitionSpec(("data", "fsdp"))),
    NamedSharding(mesh_of((2, 4), ("data", "model")), PartitionSpec("data")),
]


def activations(rows):
    rng = np.random.default_rng(rows)
    values = rng.standard_normal((len(rows), 3, 2), np.float32)
    values[:, 0, 0], values[:, 1, 1], values[:, 2, 1] = -0.0, np.nan, -np.inf
    return [
        jnp.asarray(values),
        jnp.asarray(-values.reshape(len(rows), 6)[:, :4], jnp.bfloat16),
        jnp.asarray(rows, jnp.int32),
        jnp.asarray(rng.random((len(rows), 2)) < 0.5),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS, ids=str)
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_what_is_put_is_taken_bit_for_bit(tmp_path, place, sharding):
    place = tmp_path / "activations" if place == "disk" else place
    store = ActivationCache(FRONTIER, EXAMPLES, place=place, views=VIEWS, sharding=sharding)
    put = np.array([20, 3, 3, 0, 11, 7, 19, 12])
    values = activations(put)
    values = [value.at[2].set(value[1]) for value in values]  # the same example twice
    store.put(put, values, view=1)
    for places in (np.array([4, 4, 0, 1, 7, 6, 5, 3]), np.array([3, 5, 0])):
        for got, value in zip(store.take(put[places], view=1), values, strict=True):
            assert got.dtype == value.dtype
            assert np.asarray(got).tobytes() == np.asarray(value[places]).tobytes()
            assert got.sharding.is_equivalent_to(exchange.divided(sharding, len(places)), got.ndim)
    assert not store.has(put)  # of the other view


@pytest.mark.parametrize("sharding", SHARDINGS, ids=str)
def test_each_device_holds_its_share(sharding):
    blocks = exchange.blocks(sharding)
    rows = -(-EXAMPLES * VIEWS // blocks) * blocks
    store = ActivationCache(FRONTIER, EXAMPLES, views=VIEWS, sharding=sharding)
    assert store.nbytes == sum(value.nbytes for value in store.values) == rows * (24 + 8 + 4 + 2)
    for value in store.values:
        assert {shard.data.nbytes for shard in value.addressable_shards} == {value.nbytes // blocks}
    share = store.nbytes // blocks
    ActivationCache(FRONTIER, EXAMPLES, views=VIEWS, sharding=sharding, budget=share)
    with pytest.raises(ValueError, match=rf"bytes, 1 / {blocks} of them here, but the budget is {share - 1}"):
        ActivationCache(FRONTIER, EXAMPLES, views=VIEWS, sharding=sharding, budget=share - 1)


def test_no_device_gathers_the_whole_store():
    sharding = SHARDINGS[0]
    store = ActivationCache([jax.ShapeDtypeStruct((16,), jnp.float32)], 512, sharding=sharding)
    rows = np.arange(16, dtype=np.int32)
    for program in (
        exchange.gathered.lower(list(store.values), rows, sharding),
        exchange.scattered.lower(list(store.values), rows, [jnp.ones((16, 16))], sharding),
    ):
        compiled = program.compile()
        assert "all-gather" not in compiled.as_text()
        assert compiled.memory_analysis().temp_size_in_bytes < store.nbytes // 8


def test_wrong_shardings():
    mesh = mesh_of((8,), ("data",))
    for spec in (PartitionSpec(), PartitionSpec(None, "data"), PartitionSpec("data", None)):
        with pytest.raises(ValueError, match=r"sharding: got P.*expected the NamedSharding of a batch"):
            ActivationCache(FRONTIER, 8, sharding=NamedSharding(mesh, spec))
    with pytest.raises(TypeError, match=r"sharding: got str 'data'"):
        ActivationCache(FRONTIER, 8, sharding="data")
