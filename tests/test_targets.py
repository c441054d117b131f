import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_jax.history import History
from smartfrz_jax.recording import Recording
from smartfrz_jax.targets import make_examples, settled, stabilised

CURVES = st.lists(st.sampled_from([0.5, 0.505, 0.51, 0.515, 0.53, 0.6]), min_size=1, max_size=25)


def column(*values):
    return np.array(values, np.float32)[:, None]


def brute_stabilised(curve, window, tolerance):
    return [
        t >= window - 1 and max(curve[t - window + 1 : t + 1]) - min(curve[t - window + 1 : t + 1]) <= tolerance
        for t in range(len(curve))
    ]


def brute_settled(curve, window, tolerance):
    level = np.mean(curve[-window:])
    flat = brute_stabilised(curve, window, tolerance)
    first = next(
        (t for t in range(len(curve)) if flat[t] and all(abs(c - level) <= tolerance for c in curve[t:])), None
    )
    return [first is not None and t >= first for t in range(len(curve))]


@settings(deadline=None)
@given(CURVES, st.integers(2, 6), st.sampled_from([0.003, 0.012, 0.017, 0.05]))
def test_criteria_match_brute_force(curve, window, tolerance):
    cka = np.array([curve, curve[::-1]]).T
    for criterion, brute in ((stabilised, brute_stabilised), (settled, brute_settled)):
        got = criterion(cka, window=window, tolerance=tolerance)
        assert got.dtype == bool
        np.testing.assert_array_equal(got[:, 0], brute(curve, window, tolerance))
        np.testing.assert_array_equal(got[:, 1], brute(curve[::-1], window, tolerance))


@settings(deadline=None)
@given(CURVES, st.integers(2, 6), st.sampled_from([0.003, 0.012, 0.05]))
def test_settled_stays_settled(curve, window, tolerance):
    got = settled(column(*curve), window=window, tolerance=tolerance)[:, 0].tolist()
    assert got == sorted(got)


def test_settled_where_the_curve_wanders_near_its_end():
    # Within .02 of its final level (.50) from the third record on, but from .485 to .515 it ranges over .03.
    curve = column(0.3, 0.4, 0.485, 0.485, 0.515, 0.50, 0.50)
    kwargs = {"window": 2, "tolerance": 0.02}
    assert stabilised(curve, **kwargs)[:, 0].tolist() == [False, False, False, True, False, True, True]
    assert settled(curve, **kwargs)[:, 0].tolist() == [False, False, False, True, True, True, True]


def test_only_hindsight_sees_through_a_plateau():
    curve = column(*[0.5] * 6, 0.7, 0.9, *[0.9] * 5)
    assert np.flatnonzero(stabilised(curve)[:, 0]).tolist() == [4, 5, 11, 12]
    assert np.flatnonzero(settled(curve)[:, 0]).tolist() == [11, 12]


def test_settled_never_while_the_curve_still_rises():
    assert not settled(np.linspace(0, 1, 20)[:, None]).any()


def test_stabilised_is_causal():
    rng = np.random.default_rng(0)
    cka = np.cumsum(rng.standard_normal((30, 4)) * 0.005, axis=0)
    whole = stabilised(cka)
    assert whole.any()
    assert not whole.all()
    for end in range(1, 30):
        np.testing.assert_array_equal(stabilised(cka[:end]), whole[:end])


@pytest.mark.parametrize("criterion", [stabilised, settled])
class TestCriterionInput:
    def test_shorter_than_the_window(self, criterion):
        assert criterion(np.ones((4, 3))).tolist() == [[False] * 3] * 4
        assert criterion(np.ones((5, 1)))[:, 0].tolist() == [False] * 4 + [True]

    def test_layers_are_apart(self, criterion):
        cka = np.stack([np.ones(10), np.linspace(0, 1, 10)], axis=1)
        assert criterion(cka)[-1].tolist() == [True, False]

    @pytest.mark.parametrize("cka", [np.ones(4), np.ones((0, 3)), np.ones((2, 3, 4)), column(1, 2, np.nan)])
    def test_not_a_matrix_of_finite_numbers(self, criterion, cka):
        with pytest.raises(ValueError, match=r"cka: got shape .*expected .records, layers."):
            criterion(cka)

    def test_options(self, criterion):
        with pytest.raises(ValueError, match="window: got 1, expected at least 2"):
            criterion(np.ones((9, 1)), window=1)
        for bad in (-0.1, np.nan):
            with pytest.raises(ValueError, match="tolerance: got"):
                criterion(np.ones((9, 1)), tolerance=bad)


def make_recording(seed=0, records=9, layers=3, size=4, total_steps=100):
    rng = np.random.default_rng(seed)
    return Recording(
        layers=tuple(f"layer{i}" for i in range(layers)),
        steps=np.arange(records) * 10,
        weights=rng.standard_normal((records, layers, size)).astype(np.float32),
        cka=rng.random((records, layers)).astype(np.float32),
        total_steps=total_steps,
    )


def at_half(cka):
    return cka > 0.5


class TestExamples:
    @pytest.mark.parametrize("window", [1, 4, 9, 30])
    def test_histories_are_those_of_the_training_loop(self, window):
        recordings = [make_recording(0), make_recording(1, records=5, layers=2)]
        examples = make_examples(recordings, window=window, criterion=at_half)
        assert len(examples) == 9 * 3 + 5 * 2
        records, mask, target = examples.batch(np.arange(len(examples)))
        for run, recording in enumerate(recordings):
            layers = len(recording.layers)
            history = History.create(layers, window, 4)
            for moment in range(len(recording.steps)):
                history = history.record(jnp.asarray(recording.weights[moment]), jnp.ones(layers, bool))
                expected_records, expected_mask = history.chronological()
                here = np.flatnonzero((examples.run == run) & (examples.moment == moment))
                assert examples.layer[here].tolist() == list(range(layers))
                np.testing.assert_array_equal(records[here], expected_records)
                np.testing.assert_array_equal(mask[here], expected_mask)
                np.testing.assert_array_equal(target[here], recording.cka[moment] > 0.5)
        assert (records.dtype, mask.dtype, target.dtype) == (np.float32, bool, bool)

    def test_batches_come_in_the_order_asked_for(self):
        examples = make_examples([make_recording(0), make_recording(1)], window=3, criterion=at_half)
        everything = examples.batch(np.arange(len(examples)))
        chosen = np.array([40, 3, 3, 29, 0])
        for got, expected in zip(examples.batch(chosen), everything, strict=True):
            np.testing.assert_array_equal(got, expected[chosen])

    def test_progress_and_depth(self):
        examples = make_examples([make_recording(layers=3), make_recording(layers=1, records=2)], criterion=at_half)
        last = examples.select((examples.run == 0) & (examples.moment == 8))
        np.testing.assert_allclose(last.progress, 0.8, rtol=1e-6)
        assert last.depth.tolist() == [0.0, 0.5, 1.0]
        only = examples.select(examples.run == 1)
        assert only.depth.tolist() == [0.0, 0.0]
        np.testing.assert_allclose(only.progress, [0.0, 0.1], rtol=1e-6)
        assert (examples.progress.dtype, examples.depth.dtype) == (np.float32, np.float32)

    def test_weights_are_not_copied(self):
        recordings = [make_recording(0), make_recording(1)]
        examples = make_examples(recordings, criterion=at_half)
        for array, recording in zip(examples.weights, recordings, strict=True):
            assert array is recording.weights
        assert examples.select(examples.run == 1).weights[0] is recordings[0].weights
        before = recordings[0].weights.copy()
        examples.batch(np.arange(len(examples)))[0][:] = 7.0
        np.testing.assert_array_equal(recordings[0].weights, before)

    def test_min_records_and_stride(self):
        def moments(**kwargs):
            return np.unique(make_examples([make_recording()], criterion=at_half, **kwargs).moment).tolist()

        assert moments() == list(range(9))
        assert moments(stride=4) == [0, 4, 8]
        assert moments(min_records=3, stride=4) == [2, 6]
        assert moments(min_records=9) == [8]

    def test_default_criterion_and_options(self):
        recording = make_recording()
        default = make_examples([recording]).target
        np.testing.assert_array_equal(default, settled(recording.cka).ravel())
        loose = functools.partial(settled, tolerance=1.0)
        np.testing.assert_array_equal(
            make_examples([recording], criterion=loose).target, settled(recording.cka, tolerance=1.0).ravel()
        )
        assert loose(recording.cka).any()

    def test_select_by_index_or_mask(self):
        examples = make_examples([make_recording()], criterion=at_half)
        mask = examples.layer == 1
        by_mask, by_index = examples.select(mask), examples.select(np.flatnonzero(mask))
        assert len(by_mask) == len(by_index) == 9
        for a, b in zip(by_mask.batch(np.arange(9)), by_index.batch(np.arange(9)), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("argument", ["window", "min_records", "stride"])
    def test_numbers_below_1(self, argument):
        with pytest.raises(ValueError, match=f"{argument}: got 0, expected at least 1"):
            make_examples([make_recording()], **{argument: 0})

    def test_recordings_that_do_not_fit(self):
        with pytest.raises(ValueError, match="recordings: got 0 of"):
            make_examples([])
        with pytest.raises(ValueError, match=r"recordings: got 2 of tailored sizes \[4, 5\]"):
            make_examples([make_recording(), make_recording(size=5)])
        with pytest.raises(ValueError, match="min_records: got 10, but no recording has more than 9 records"):
            make_examples([make_recording()], min_records=10)

    def test_criterion_that_does_not_fit(self):
        with pytest.raises(
            ValueError, match=r"criterion: gave float32 of shape \(9, 3\) for recording 0, expected bool"
        ):
            make_examples([make_recording()], criterion=lambda cka: cka)
        with pytest.raises(ValueError, match=r"criterion: gave bool of shape \(9,\)"):
            make_examples([make_recording()], criterion=lambda cka: cka[:, 0] > 0)
