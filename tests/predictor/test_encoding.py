import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smartfrz_jax.predictor.encoded import encode
from smartfrz_jax.predictor.encoding import (
    PAPER,
    REGIME,
    Encoding,
    encode_records,
    rms,
    rms_step,
    successive_differences,
)
from tests.support.observations import observation_of, walk

_jitted = jax.jit(encode_records, static_argnums=0)
_rms = jax.jit(rms)
_rms_step = jax.jit(rms_step)

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def encoded(observation, weights="scale_free", **options):
    records, exists = _jitted(Encoding(weights=weights, **options), observation)
    return np.asarray(records), np.asarray(exists)


def by_hand(observation):
    """The definitions in float64, one record at a time."""
    records = np.asarray(observation.records, np.float64)
    mask = np.asarray(observation.mask)
    here = np.flatnonzero(mask)
    before = {}
    for j in here:
        if j - 1 in here:
            before[j] = records[j - 1]
    if len(here) and float(observation.elapsed) <= len(here):
        before[here[0]] = np.asarray(observation.start, np.float64)
    steps = {j: records[j] - before[j] for j in before}
    rows, exists = np.zeros_like(records), np.zeros(len(records), bool)
    scale = np.sqrt(np.mean([step**2 for step in steps.values()]) * len(steps)) if steps else 0
    for j in here:
        rows[j], exists[j] = np.sort(records[j] - records[-1]) / scale if scale else 0, True
    return rows, exists


MASKS = {"full": [1] * 9, "few": [0] * 6 + [1] * 3, "one": [0] * 8 + [1], "gaps": [0, 1, 1, 0, 1, 0, 1, 1, 1]}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("whole", [False, True], ids=["later", "from the start"])
def test_agrees_with_the_definitions(mask, whole):
    mask = np.array(MASKS[mask], bool)
    observation = walk(0).replace(mask=jnp.asarray(mask), elapsed=jnp.float32(mask.sum() if whole else 40))
    got, expected = encoded(observation), by_hand(observation)
    np.testing.assert_allclose(got[0], expected[0], **ROUNDING)
    np.testing.assert_array_equal(got[1], expected[1])
    assert got[0].any() == (mask.sum() > 1)


def test_raw_is_the_records_and_none_is_nothing():
    observation = walk(0).replace(mask=jnp.arange(9) >= 4)
    records, exists = encode_records(PAPER, observation)
    np.testing.assert_array_equal(records[4:], observation.records[4:])
    assert not np.asarray(records[:4]).any()
    np.testing.assert_array_equal(exists, observation.mask)
    assert encoded(observation, "none")[0].shape == (9, 0)


def test_scale_free_is_one_for_a_random_walk():
    rng = np.random.default_rng(0)
    records = np.cumsum(rng.standard_normal((30, 4096)), axis=0)
    rows, _ = encoded(observation_of(records))
    np.testing.assert_allclose(np.sqrt(np.mean(rows**2, axis=1)), np.sqrt(np.arange(29, -1, -1) / 29), atol=0.03)


def test_order_of_the_positions_does_not_matter():
    observation, order = walk(1), np.random.default_rng(2).permutation(12)
    shuffled = observation.replace(records=observation.records[:, order], start=observation.start[order])
    np.testing.assert_allclose(encoded(shuffled)[0], encoded(observation)[0], rtol=1e-6)
    assert not np.allclose(encoded(shuffled, "raw")[0], encoded(observation, "raw")[0])


@pytest.mark.slow
def test_which_positions_are_drawn_hardly_matters():
    """Two draws of 1024 of the weights of one layer, against another layer that moves straight."""
    layer = walk(3, size=20_000, drift=0.0)
    drawn = np.random.default_rng(4).choice(20_000, (2, 1024), replace=False)
    one, other = (encoded(layer.replace(records=layer.records[:, i], start=layer.start[i]))[0] for i in drawn)
    straight = encoded(walk(3, size=1024, drift=2.0))[0]
    assert np.abs(one - other).mean() < 0.1 * np.abs(one).mean()
    assert np.abs(one - straight).mean() > 0.5 * np.abs(one).mean()


@pytest.mark.parametrize("factor", [1e-12, 3.0, 1e12])
def test_scale_free_of_any_scale(factor):
    observation = walk(5)
    scaled = observation.replace(records=factor * observation.records, start=factor * observation.start)
    np.testing.assert_allclose(encoded(scaled)[0], encoded(observation)[0], rtol=1e-5, atol=1e-6)


def test_masked_records_have_no_influence():
    observation = walk(6).replace(mask=jnp.arange(9) >= 4, elapsed=jnp.float32(50))
    junk = observation.replace(records=observation.records.at[:4].set(jnp.nan))
    for a, b in zip(encoded(junk), encoded(observation), strict=True):
        np.testing.assert_array_equal(a, b)
    padded = observation.replace(
        records=jnp.concatenate([jnp.ones((3, 12)), observation.records]),
        mask=jnp.concatenate([jnp.zeros(3, bool), observation.mask]),
    )
    np.testing.assert_allclose(encoded(padded)[0][3:], encoded(observation)[0], **ROUNDING)


@pytest.mark.slow
def test_first_step_of_a_run_is_from_its_start():
    records, start = np.arange(8.0).reshape(4, 2), np.full(2, -5.0)
    for elapsed, exists in ((4, [True] * 4), (5, [False, True, True, True])):
        steps, got = successive_differences(observation_of(records, start=start, elapsed=elapsed))
        np.testing.assert_array_equal(got, exists)
        np.testing.assert_array_equal(steps[0], [5, 6] if exists[0] else [0, 0])
        np.testing.assert_array_equal(steps[1:], 2)


def test_no_movement_is_zero():
    rows, exists = encoded(observation_of(np.ones((5, 8))))
    np.testing.assert_array_equal(rows, 0)
    assert exists[-1]


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, (4, 6), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    hnp.arrays(bool, 4),
    st.floats(0, 1e6, width=32),
)
def test_finite_and_sorted_whatever_comes(records, mask, elapsed):
    observation = observation_of(records, mask, elapsed=elapsed)
    rows, exists = encoded(observation)
    assert np.isfinite(rows).all()
    assert (np.diff(rows, axis=1) >= 0).all()
    assert not rows[~exists].any()
    assert np.isfinite(_rms_step(observation))


@settings(deadline=None)
@given(hnp.arrays(np.float32, 7, elements=st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False)))
@pytest.mark.slow
def test_rms_of_large_and_small(x):
    expected = np.sqrt(np.mean(x.astype(np.float64) ** 2))
    np.testing.assert_allclose(_rms(x), expected, rtol=1e-6, atol=1e-37)


@pytest.mark.slow
def test_layers_at_once():
    observation = walk(7, batch=(3,))
    together, exists = jax.jit(jax.vmap(lambda o: encode_records(Encoding(), o)))(observation)
    for layer in range(3):
        alone = encoded(jax.tree.map(lambda leaf, layer=layer: leaf[layer], observation))
        np.testing.assert_allclose(together[layer], alone[0], **ROUNDING)
        np.testing.assert_array_equal(exists[layer], alone[1])


def test_bad_options():
    with pytest.raises(ValueError, match="weights: got 'sorted', expected 'raw' or 'scale_free' or 'none'"):
        Encoding(weights="sorted")
    with pytest.raises(ValueError, match="context_in: got 'head', expected 'records' or 'classifier' or 'both'"):
        Encoding(context_in="head")
    with pytest.raises(ValueError, match="weights: got 'none' without progress, depth and regime"):
        dataclasses.replace(PAPER, weights="none")
    with pytest.raises(ValueError, match="regime: got 'speed', expected True, False or some of displacement, growth"):
        Encoding(regime=("displacement", "speed"))
    assert [Encoding(weights).width(12) for weights in ("raw", "scale_free", "none")] == [12, 12, 0]


def test_the_same_regime_in_other_words_is_the_same_encoding():
    assert Encoding(regime=True) == Encoding(regime=REGIME) == Encoding(regime=list(REGIME[::-1]))
    assert hash(Encoding(regime=False)) == hash(Encoding(regime=()))
    assert Encoding(regime=()) != Encoding(regime=("step",))
    assert Encoding(regime="step") == Encoding(regime=("step",))


@pytest.mark.parametrize("name", REGIME)
@pytest.mark.slow
def test_it_is_known_what_depends_on_the_weights(name):
    encoding, seen, other = Encoding("none", regime=(name,)), walk(0), walk(1)
    seen = seen.replace(elapsed=jnp.float32(20))  # records before the window are lost
    elsewhere = seen.replace(records=other.records, start=other.start)
    without = seen.replace(records=seen.records[:, :1] * 0, start=seen.start[:1] * 0)
    read, moved, none = (np.asarray(encode(encoding, each).context) for each in (seen, elsewhere, without))
    assert encoding.reads_weights != np.array_equal(read, moved)
    assert encoding.reads_weights != np.array_equal(read, none)
    assert Encoding("scale_free", regime=(name,)).reads_weights


def test_what_reads_weights():
    assert PAPER.reads_weights
    assert Encoding().reads_weights
    assert not Encoding("none", regime=False).reads_weights
