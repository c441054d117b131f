"""Activations come back as they were stored, wherever they are, and the size is known before anything is allocated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax import find_layers
from smartfrz_jax.caching import memory
from smartfrz_jax.caching.prefix_cache import PrefixCache
from smartfrz_jax.caching.store import ActivationCache
from smartfrz_jax.freezing.frozen import Frozen

FRONTIER = [jax.ShapeDtypeStruct((3, 2), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)]
EXAMPLES = 10


def activations(indices, view=0):
    """What belongs to these examples."""
    rng = [np.random.default_rng([i, view]) for i in indices]
    return (
        jnp.asarray(np.stack([r.normal(size=(3, 2)) for r in rng]), jnp.float32),
        jnp.asarray(np.stack([r.integers(0, 99, 4) for r in rng]), jnp.int32),
    )


@pytest.fixture(params=["device", "host", "disk"])
def place(request, tmp_path):
    return tmp_path / "activations" if request.param == "disk" else request.param


def equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_what_is_put_is_taken(place):
    cache = ActivationCache(FRONTIER, EXAMPLES, place=place)
    assert cache.nbytes == EXAMPLES * (6 * 4 + 4 * 4)
    first, second = np.array([7, 2, 9]), np.array([0, 1])
    cache.put(first, activations(first))
    assert not cache.has(np.array([7, 0]))
    cache.put(second, activations(second))
    mixed = np.array([0, 9, 9, 2])
    assert cache.has(mixed)
    assert not cache.is_complete
    assert cache.filled.sum() == 5
    equal(cache.take(mixed), activations(mixed))
    cache.put(first[:1], activations([4]))
    equal(cache.take(first[:1]), activations([4]))
    rest = np.array([3, 4, 5, 6, 8])
    cache.put(rest, activations(rest))
    assert cache.is_complete
    assert sum(value.nbytes for value in cache.values) == cache.nbytes
    cache.clear()
    assert not cache.filled.any()


def test_views_have_slots_of_their_own(place):
    cache = ActivationCache(FRONTIER, EXAMPLES, place=place, views=3)
    indices = np.array([4, 1])
    for view in (2, 0):
        cache.put(indices, activations(indices, view), view)
    assert cache.has(indices, 2)
    assert not cache.has(indices, 1)
    for view in (0, 2):
        equal(cache.take(indices, view), activations(indices, view))
    equal([values[4 * 3 + 2 : 4 * 3 + 3] for values in map(jnp.asarray, cache.values)], activations([4], 2))
    with pytest.raises(ValueError, match="view: got 3"):
        cache.take(indices, 3)


@pytest.mark.parametrize(("dtype", "error", "least"), [("bfloat16", 2**-8, 0), ("float16", 2**-11, 2**-25)])
def test_narrow_types_and_their_errors(place, dtype, error, least):
    cache = ActivationCache(FRONTIER, EXAMPLES, place=place, dtype=dtype)
    assert cache.nbytes == EXAMPLES * (6 * 2 + 4 * 4)
    indices = np.arange(EXAMPLES)
    values = activations(indices)
    cache.put(indices, values)
    floats, integers = cache.take(indices)
    assert floats.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(integers, values[1])
    wide = np.float64(values[0])
    deviation = np.abs(np.float64(floats) - wide)
    assert (deviation <= error * np.abs(wide) + least).all()
    assert deviation.max() > 0


def test_float16_refuses_what_it_cannot_hold():
    cache = ActivationCache(FRONTIER[:1], 2, dtype="float16")
    with pytest.raises(ValueError, match="65504"):
        cache.put(np.array([0]), [jnp.full((1, 3, 2), 7e4)])
    assert not cache.filled.any()
    cache.put(np.array([0]), [jnp.full((1, 3, 2), jnp.inf)])  # it was so before


def test_the_size_is_checked_first(place):
    needed = EXAMPLES * 40
    with pytest.raises(ValueError, match=rf"{needed} bytes, but the budget is {needed - 1}"):
        ActivationCache(FRONTIER, EXAMPLES, place=place, budget=needed - 1)
    ActivationCache(FRONTIER, EXAMPLES, place=place, budget=needed)


def test_more_than_there_is(place):
    with pytest.raises(ValueError, match="free are"):
        ActivationCache(FRONTIER, 10**14, place=place)


def test_directories(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        ActivationCache(FRONTIER, EXAMPLES, place=tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        ActivationCache(FRONTIER, EXAMPLES, place=tmp_path / "file")
    with pytest.raises(PermissionError, match="cannot write"):
        ActivationCache(FRONTIER, EXAMPLES, place="/proc/activations")
    cache = ActivationCache(FRONTIER, EXAMPLES, place=tmp_path / "new")
    assert sum(file.stat().st_size for file in (tmp_path / "new").iterdir()) == cache.nbytes


def test_bad_arguments():
    cache = ActivationCache(FRONTIER, EXAMPLES)
    with pytest.raises(ValueError, match="nothing is stored for 2 of 2"):
        cache.take(np.array([0, 1]))
    with pytest.raises(ValueError, match="expected 0 to 9"):
        cache.has(np.array([10]))
    with pytest.raises(ValueError, match="expected 0 to 9"):
        cache.put(np.array([-1]), activations([0]))
    with pytest.raises(ValueError, match="vector of integers"):
        cache.take(np.array([0.5]))
    with pytest.raises(ValueError, match="got shapes"):
        cache.put(np.array([0, 1]), activations([0]))
    with pytest.raises(ValueError, match="examples: got 0"):
        ActivationCache(FRONTIER, 0)
    with pytest.raises(ValueError, match="dtype: got int8"):
        ActivationCache(FRONTIER, 3, dtype="int8")


def test_looking_up_on_the_device_is_one_program_and_copies_nothing_else():
    cache = ActivationCache(FRONTIER, 1000)
    indices = np.arange(4)
    cache.put(indices, activations(indices))
    pointer = cache.values[0].unsafe_buffer_pointer()
    cache.put(indices + 4, activations(indices + 4))
    assert cache.values[0].unsafe_buffer_pointer() == pointer
    take = jax.jit(lambda values, rows: [value[rows] for value in values])  # in a step of the user's own
    equal(take(cache.values, indices + 4), activations(indices + 4))


# A training loop


def network(params, x, y):
    hidden = jnp.tanh(x @ params["a"])
    return jnp.square(hidden @ params["b"] - y).mean()


def loop(place, *, dtype=None, views=1, epochs=3):
    """Trains with and without the cache; parameters at the end, and how often the inputs were read."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"a": jax.random.normal(keys[0], (6, 5)), "b": jax.random.normal(keys[1], (5, 2))}
    y = jax.random.normal(keys[3], (8, 2))
    data = [jax.random.normal(key, (8, 6)) for key in jax.random.split(keys[2], views)]
    frozen = Frozen(find_layers(params, network, data[0], y), frozenset({"a"}))
    cache = PrefixCache(params, frozen, network, data[0][:4], y[:4], augmented=views > 1, views=views)
    cache.keep(8, place=place, dtype=dtype)
    uncached, reads = dict(params), 0
    step = jax.jit(jax.grad(cache.loss))
    for epoch in range(epochs * views):
        order = np.random.default_rng(epoch).permutation(8)
        view = epoch % views
        for rows in np.split(order, 2):
            x = None if cache.store.has(rows, view) else data[view][rows]
            reads += x is not None
            kept = cache.fetch(params, rows, x, y[rows], view=view)
            grads = step(params, kept, None, y[rows])
            params = {"a": params["a"], "b": params["b"] - 0.1 * grads["b"]}
            grads = jax.grad(network)(uncached, data[view][rows], y[rows])
            uncached["b"] -= 0.1 * grads["b"]
    return params, uncached, reads


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.slow
def test_training_is_the_same_and_reads_every_example_once(place, views):
    params, uncached, reads = loop(place, views=views)
    np.testing.assert_allclose(params["b"], uncached["b"], rtol=1e-5)
    assert reads == 2 * views


def test_training_from_half_precision_is_close(place):
    params, uncached, _ = loop(place, dtype="bfloat16")
    np.testing.assert_allclose(params["b"], uncached["b"], rtol=2e-2, atol=2e-2)
    assert np.abs(params["b"] - uncached["b"]).max() > 0


# Batches of which some examples are there

DATA = np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32)
TARGETS = np.random.default_rng(1).standard_normal((32, 2)).astype(np.float32)
WEIGHTS = {
    name: jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.float32)
    for i, (name, shape) in enumerate({"a": (6, 5), "b": (5, 4), "c": (4, 2)}.items())
}


def deeper(params, x, y):
    hidden = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])
    return jnp.square(hidden @ params["c"] - y).mean()


def caches(rows=16):
    """One of the first layer, with room for the data, and how to go on with the second, which has none."""
    frozen = Frozen(find_layers(WEIGHTS, deeper, DATA[:rows], TARGETS[:rows]), frozenset({"a"}))
    cache = PrefixCache(WEIGHTS, frozen, deeper, DATA[:rows], TARGETS[:rows])
    cache.keep(len(DATA))
    return cache


def fetched(cache, indices):
    """FLOPs that it takes, in products per example, after comparing what comes with the closed form."""
    flops = cache.fetch_flops(indices)
    (got,) = cache.fetch(WEIGHTS, indices, DATA[indices], TARGETS[indices])
    expected = np.tanh(DATA[indices] @ WEIGHTS["a"])
    if "b" in cache.frozen.names:
        expected = np.tanh(expected @ WEIGHTS["b"])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert cache.fetch_flops(indices) == 0
    return flops


def test_of_a_batch_only_what_is_missing_is_computed_in_quarters():
    cache, example = caches(), 2 * 6 * 5
    assert fetched(cache, np.arange(0, 16)) == 16 * example
    assert fetched(cache, np.arange(1, 17)) == 4 * example  # one is missing
    assert fetched(cache, np.arange(13, 29)[::-1]) == 12 * example  # twelve
    assert fetched(cache, np.array([31, 30, 29, 28])) == 4 * example
    assert cache.store.is_complete


@pytest.mark.slow
def test_what_the_cache_before_had_is_computed_from_that_and_the_rest_from_inputs():
    cache, first, second = caches(), 2 * 6 * 5, 2 * 5 * 4
    fetched(cache, np.arange(16))
    grown = cache.follow(WEIGHTS, cache.frozen.add(["b"]))
    assert fetched(grown, np.arange(0, 16)) == 16 * second
    assert fetched(grown, np.arange(8, 24)) == 8 * (first + second)
    again = caches()
    fetched(again, np.arange(20)[::-1][:16])  # 4 to 19
    fetched(again, np.arange(24))
    mixed = again.follow(WEIGHTS, again.frozen.add(["b"]))
    # All 24 that were there; four of the batch are from the inputs.
    assert fetched(mixed, np.arange(12, 28)) == 24 * second + 4 * (first + second)
    assert mixed.store.filled.sum() == 28


def test_where_inputs_are_needed_too_activations_grow_batch_by_batch():
    def masked(params, x, mask, y):
        hidden = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"] * mask)
        return jnp.square(hidden @ params["c"] - y).mean()

    masks = (np.arange(32)[:, None] % 3 > np.arange(4)[None] % 2).astype(np.float32)
    inputs = DATA, masks, TARGETS
    frozen = Frozen(find_layers(WEIGHTS, masked, *inputs), frozenset({"a"}))
    cache = PrefixCache(WEIGHTS, frozen, masked, *(of[:16] for of in inputs))
    cache.keep(32)
    cache.fetch(WEIGHTS, np.arange(16), *(of[:16] for of in inputs))
    new = cache.follow(WEIGHTS, frozen.add(["b"]))
    indices, second = np.arange(4, 20), 2 * 5 * 4
    assert new.grown_from(cache).needed == {"inputs:1"}
    assert new.fetch_flops(indices) == pytest.approx(12 * (second + 4) + 4 * (2 * 6 * 5 + second + 4))  # 4 by the mask
    (got,) = new.fetch(WEIGHTS, indices, *(of[indices] for of in inputs))
    expected = np.tanh(np.tanh(DATA @ WEIGHTS["a"]) @ WEIGHTS["b"] * masks)[indices]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert new.store.filled.sum() == 16


@pytest.mark.parametrize("use", [jnp.mean, jnp.atleast_2d], ids=["of the network", "of each feature"])
def test_variables_among_the_inputs_are_not_taken_for_examples(use):
    def scaled(params, variables, x, y):
        hidden = jnp.tanh((x @ params["a"]["kernel"]) * use(variables["a"]["scale"]))
        return jnp.square(hidden @ params["b"]["kernel"] - y).mean()

    params = {"a": {"kernel": DATA[:16].T}, "b": {"kernel": TARGETS[:16]}}
    scale = np.linspace(0, 2, 16, dtype=np.float32) ** 2  # as many as examples in a batch
    inputs = {"a": {"scale": scale}}, DATA[:16], TARGETS[:16]
    frozen = Frozen(find_layers(params, scaled, *inputs), frozenset({"a"}))
    cache = PrefixCache(params, frozen, scaled, *inputs, state_inputs=[0])
    cache.keep(32)
    for indices in (np.arange(16), np.arange(2, 18), np.arange(4)):
        x, y = DATA[indices], TARGETS[indices]
        (got,) = cache.fetch(params, indices, inputs[0], x, y)
        np.testing.assert_allclose(got, np.tanh(x @ DATA[:16].T * use(scale)), rtol=1e-5, atol=1e-6)
        loss = cache.loss(params, (got,), None, None, y)
        np.testing.assert_allclose(loss, scaled(params, inputs[0], x, y), rtol=1e-5)
    assert cache.store.filled.sum() == 18


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.slow
def test_any_order_of_batches_gives_the_activations(seed):
    rng, cache = np.random.default_rng(seed), caches()
    grows = rng.integers(3, 8)
    for step in range(12):
        if step == grows:
            cache = cache.follow(WEIGHTS, cache.frozen.add(["b"]))
        fetched(cache, rng.permutation(32)[: rng.integers(2, 17)])
        if "b" in cache.frozen.names and rng.random() < 0.3:
            cache = cache.follow(WEIGHTS, Frozen(cache.frozen.layers, frozenset({"a"})))


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 5000 * 1024),
        ({"cgroup": "0::/job", "job/memory.max": "max", "job/memory.current": "7"}, 5000 * 1024),
        ({"cgroup": "0::/job", "job/memory.max": "900", "job/memory.current": "700"}, 200),
        ({"cgroup": "0::/job", "memory.max": "900", "memory.current": "700", "memory.stat": "anon 1\ninactive_file 50"},
         250),
        ({"cgroup": "0::/a/b", "a/memory.max": "90", "a/memory.current": "99"}, 0),
        ({"cgroup": "2:cpu:/\n4:memory:/job\n0::/", "memory/job/memory.limit_in_bytes": "900",
          "memory/job/memory.usage_in_bytes": "700", "memory/job/memory.stat": "total_inactive_file 9"}, 209),
    ],
)  # fmt: skip
def test_page_cache_counts_as_free_and_the_limit_of_a_container_holds(tmp_path, monkeypatch, files, free):
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    proc = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\n"}
    for name, text in (proc | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}).items():
        path = tmp_path / ("proc/self/cgroup" if name.endswith("/cgroup/cgroup") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert memory.free_bytes(None, on_device=False) == free
