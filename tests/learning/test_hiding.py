import dataclasses

import jax
import numpy as np
import pytest

from smartfrz_jax.learning.examples import Hiding
from tests.support.observations import walk


def batch(n=4000):
    """``n`` layers with 3 to 9 records, as NumPy arrays."""
    observation = jax.device_get(walk(0, size=2, batch=(n,)))
    mask = np.arange(9) >= np.arange(n)[:, None] % 7
    return observation.replace(
        mask=mask,
        records=np.where(mask[:, :, None], observation.records, np.float32(0)),
        losses=np.where(mask, observation.losses, np.float32("nan")),
    )


def hide(observation, seed=0, **shares):
    return Hiding(**shares)(observation, np.random.default_rng(seed))


def assert_same(a, b, *but):
    for field in dataclasses.fields(a):
        if field.name not in but:
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=field.name)


def test_nothing_is_hidden_by_default():
    observation = batch()
    assert_same(hide(observation), observation)


def test_everything_can_be_hidden():
    observation = batch()
    hidden = hide(observation, progress=1.0, losses=1.0, contribution=1.0, records=1.0, min_records=1)
    assert np.isnan(hidden.progress).all()
    assert np.isnan(hidden.losses).all()
    assert np.isnan(hidden.first_loss).all()
    assert np.isnan(hidden.contribution).all()
    changed = ("progress", "losses", "first_loss", "contribution", "records", "mask")
    assert_same(hidden, observation, *changed)


def test_share_of_the_examples():
    observation = batch()
    hidden = hide(observation, progress=0.3, losses=0.6)
    assert np.isnan(hidden.progress).mean() == pytest.approx(0.3, abs=0.03)
    lost = np.isnan(hidden.first_loss)
    assert lost.mean() == pytest.approx(0.6, abs=0.03)
    np.testing.assert_array_equal(np.isnan(hidden.losses), ~observation.mask | lost[:, None])
    assert abs(np.corrcoef(lost, np.isnan(hidden.progress))[0, 1]) < 0.05
    assert_same(hidden, observation, "progress", "losses", "first_loss")


def test_histories_are_cut_to_their_newest_records():
    observation = batch()
    hidden = hide(observation, records=0.5, min_records=4)
    before, after = observation.mask.sum(axis=1), hidden.mask.sum(axis=1)
    np.testing.assert_array_equal(hidden.mask, np.arange(9) >= 9 - after[:, None])
    np.testing.assert_array_equal(hidden.records, np.where(hidden.mask[:, :, None], observation.records, 0))
    np.testing.assert_array_equal(np.isnan(hidden.losses), ~hidden.mask)
    assert (after >= np.minimum(before, 4)).all()
    long = before == 9
    assert set(after[long]) == {4, 5, 6, 7, 8, 9}
    for records in range(4, 9):
        assert (after[long] == records).mean() == pytest.approx(0.5 / 6, abs=0.04)
    assert_same(hidden, observation, "records", "mask", "losses")


def test_draws_do_not_depend_on_the_shares():
    observation, rng = batch(50), np.random.default_rng(3)
    Hiding(progress=0.2)(observation, rng)
    other = np.random.default_rng(3)
    Hiding(records=0.9)(observation, other)
    assert rng.random() == other.random()
    assert_same(hide(observation, seed=1, records=0.5), hide(observation, seed=1, records=0.5))


@pytest.mark.parametrize("name", ["progress", "losses", "contribution", "records"])
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_out_of_range(name, share):
    with pytest.raises(ValueError, match=f"{name}: got .*, expected a share of the examples, from 0 to 1"):
        Hiding(**{name: share})


def test_min_records_out_of_range():
    with pytest.raises(ValueError, match="min_records: got 0, expected an integer of at least 1"):
        Hiding(min_records=0)
