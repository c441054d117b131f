from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_jax.predictor import History, history

RNG = np.random.default_rng(0)


def check(got: History, model: list[deque], window: int, size: int) -> None:
    records, mask = got.chronological()
    assert records.shape == (len(model), window, size)
    assert mask.shape == (len(model), window)
    assert mask.dtype == bool
    for layer, expected in enumerate(model):
        missing = window - len(expected)
        np.testing.assert_array_equal(mask[layer], [False] * missing + [True] * len(expected))
        np.testing.assert_array_equal(records[layer, :missing], np.zeros((missing, size)))
        if expected:
            np.testing.assert_array_equal(records[layer, missing:], np.stack(list(expected)))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 3, 5]), st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=14))
@pytest.mark.slow
def test_behaves_like_a_deque_per_layer(window, steps):
    """Layers record, drop out and come back in any order; a frozen layer's history is gone for good."""
    size = 2
    got = History.create(layers=3, window=window, size=size)
    model = [deque(maxlen=window) for _ in range(3)]
    check(got, model, window, size)
    for active in steps:
        weights = RNG.standard_normal((3, size)).astype(np.float32)
        got = got.record(jnp.asarray(weights), jnp.asarray(active))
        for layer, is_active in enumerate(active):
            if is_active:
                model[layer].append(weights[layer])
            else:
                model[layer].clear()
        check(got, model, window, size)
        np.testing.assert_array_equal(
            got.values[~np.asarray(active)], np.zeros((3 - sum(active), window, size), np.float32)
        )


def test_many_turns_of_the_ring():
    got = History.create(layers=1, window=30, size=1)
    for n in range(95):
        got = got.record(jnp.full((1, 1), n, jnp.float32), jnp.ones(1, bool))
    np.testing.assert_array_equal(got.chronological()[0][0, :, 0], np.arange(65, 95))


def test_memory_of_resnet50_is_about_6_megabytes():
    layers, window, size = 54, 30, 1024  # 53 convolutions and the head
    got = jax.eval_shape(lambda: History.create(layers, window, size))
    assert got.values.dtype == jnp.float32
    assert got.values.size * got.values.dtype.itemsize == 6_635_520
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(got)) == 6_635_520 + 54 * 4


def test_defaults_are_the_papers():
    assert jax.eval_shape(lambda: History.create(2)).values.shape == (2, 30, 1024)


def test_bfloat16_weights_are_kept_as_float32():
    weights = jnp.asarray(RNG.standard_normal((2, 3)), jnp.bfloat16)
    got = History.create(2, 2, 3).record(weights, jnp.ones(2, bool))
    assert got.values.dtype == jnp.float32
    np.testing.assert_array_equal(got.chronological()[0][:, -1], weights.astype(jnp.float32))


def test_nan_of_a_dropped_layer_leaves_no_trace():
    weights = jnp.array([[1.0, 2.0], [np.nan, np.inf]])
    got = History.create(2, 3, 2).record(weights, jnp.array([True, False]))
    assert np.all(np.isfinite(got.values))
    assert np.all(np.isfinite(got.chronological()[0]))


def test_record_does_not_change_the_old_history():
    old = History.create(1, 2, 2).record(jnp.ones((1, 2)), jnp.ones(1, bool))
    before = jax.tree.map(np.array, old)
    old.record(jnp.zeros((1, 2)), jnp.zeros(1, bool))
    jax.tree.map(np.testing.assert_array_equal, old, before)


def test_compiled_once_whatever_the_mask_and_the_count():
    got = History.create(layers=3, window=4, size=5)
    record, chronological = history._record._cache_size(), history._chronological._cache_size()
    for mask in ([True] * 3, [True, False, True], [False] * 3):
        for _ in range(3):
            got = got.record(jnp.ones((3, 5)), np.array(mask))
            got.chronological()
    assert history._record._cache_size() == record + 1
    assert history._chronological._cache_size() == chronological + 1


def test_under_jit_and_scan():
    weights = jnp.asarray(RNG.standard_normal((6, 2, 3)), jnp.float32)
    active = jnp.asarray(RNG.random((6, 2)) < 0.7)
    start = History.create(2, 3, 3)
    scanned, _ = jax.jit(lambda h: jax.lax.scan(lambda h, x: (h.record(*x), None), h, (weights, active)))(start)
    looped = start
    for step in range(6):
        looped = looped.record(weights[step], active[step])
    jax.tree.map(np.testing.assert_array_equal, scanned, looped)


@pytest.mark.parametrize("argument", ["layers", "window", "size"])
def test_wrong_sizes(argument):
    with pytest.raises(ValueError, match=rf"{argument}: got 0, expected an integer of at least 1"):
        History.create(**({"layers": 1} | {argument: 0}))


@pytest.mark.parametrize(("weights", "active"), [((3, 4), (2,)), ((2, 5), (2,)), ((2, 4), (3,)), ((2, 4, 1), (2,))])
def test_wrong_shapes(weights, active):
    with pytest.raises(ValueError, match=r"weights, active: got shapes .* expected \(2, 4\) and \(2,\)") as error:
        History.create(2, 3, 4).record(jnp.ones(weights), jnp.ones(active, bool))
    assert str(weights) in str(error.value)
    assert str(active) in str(error.value)
