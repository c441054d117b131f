import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_jax.learning.harm import fill
from smartfrz_jax.learning.recording import Recording
from smartfrz_jax.learning.targets import Harmless, Settled, settled
from smartfrz_jax.predictor.cka import stabilised

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
        with pytest.raises(ValueError, match="window: got 1, expected an integer of at least 2"):
            criterion(np.ones((9, 1)), window=1)
        for bad in (-0.1, np.nan):
            with pytest.raises(ValueError, match="tolerance: got"):
                criterion(np.ones((9, 1)), tolerance=bad)


def make_recording(records=8, layers=3, **supervision):
    rng = np.random.default_rng(0)
    return Recording(
        layers=tuple(f"layer{i}" for i in range(layers)),
        steps=np.arange(1, records + 1) * 10,
        record_every=10,
        total_steps=10 * records,
        weights=np.ones((records, layers, 4), np.float32),
        start=np.ones((layers, 4), np.float32),
        losses=np.linspace(2.3, 0.3, records),
        first_loss=2.3,
        **supervision or {"cka": rng.random((records, layers))},
    )


class TestSettled:
    @pytest.mark.parametrize("supervision", ["cka", "own_cka"])
    def test_is_settled_of_the_curve_it_names(self, supervision):
        ramp = np.minimum(np.arange(8)[:, None] / np.array([2, 4, 9]), 1.0).astype(np.float32)
        other = {"cka", "own_cka"} - {supervision}
        recording = make_recording(**{supervision: ramp, other.pop(): np.ones((8, 3))})
        got = Settled(supervision, window=2, tolerance=0.05)(recording)
        np.testing.assert_array_equal(got, settled(ramp, window=2, tolerance=0.05))
        assert got.any(axis=0).tolist() == [True, True, False]

    def test_defaults_are_those_of_settled(self):
        recording = make_recording(cka=np.ones((8, 3)))
        np.testing.assert_array_equal(Settled()(recording), settled(recording.cka))

    def test_refusals(self):
        with pytest.raises(ValueError, match="recording: has no own_cka; record it"):
            Settled("own_cka")(make_recording())
        with pytest.raises(ValueError, match="supervision: got 'swap_harm', expected 'cka' or 'own_cka'"):
            Settled("swap_harm")


class TestHarmless:
    HARM = np.array([[0.4, 0.8, np.nan]] + [[np.nan] * 3] * 3 + [[0.02, 0.04, np.nan]] + [[np.nan] * 3] * 3)

    def test_harm_is_a_share_of_the_first_loss(self):
        recording = make_recording(swap_harm=self.HARM)
        for tolerance in (0.0, 0.01, 0.03, 0.1, 1.0):
            got = Harmless(tolerance=tolerance)(recording)
            expected = fill(recording.swap_harm, recording.steps, 80)[:, :2] <= tolerance * float(np.float32(2.3))
            np.testing.assert_array_equal(got[:, :2], expected)
            assert got.dtype == bool
        assert Harmless(tolerance=0.03)(recording).sum(axis=0).tolist() == [4, 4, 0]

    def test_means_the_same_in_another_unit(self):
        recording = make_recording(branch_harm=self.HARM)
        scaled = dataclasses.replace(
            recording, branch_harm=self.HARM * 1024, losses=recording.losses * 1024, first_loss=2.3 * 1024
        )
        criterion = Harmless("branch_harm", tolerance=0.1)
        assert criterion(recording).any()
        np.testing.assert_array_equal(criterion(scaled), criterion(recording))

    def test_keeps_where_there_is_nothing_to_go_by(self):
        harm = np.full((8, 3), np.nan)
        harm[3, 1] = 0.0
        got = Harmless(tolerance=5.0)(make_recording(swap_harm=harm))
        assert got.tolist() == [[False] * 3] * 3 + [[True, True, False]] * 5

    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
    def test_more_tolerance_freezes_no_less(self, seed, first, second):
        recording = make_recording(swap_harm=np.random.default_rng(seed).standard_normal((8, 3)))
        less, more = (Harmless(tolerance=tolerance)(recording) for tolerance in sorted((first, second)))
        assert (less <= more).all()
        assert (np.diff(less.astype(int), axis=0) >= 0).all(), "what is frozen stays frozen"
        assert (np.diff(less.astype(int), axis=1) <= 0).all(), "front to back"

    def test_only_the_first_loss_is_needed(self):
        recording = dataclasses.replace(make_recording(swap_harm=np.full((8, 3), 0.5)), losses=np.full(8, np.nan))
        assert Harmless(tolerance=0.22)(recording)[0].all()
        assert not Harmless(tolerance=0.21)(recording)[0].any()

    def test_refusals(self):
        recording = make_recording(swap_harm=self.HARM)
        with pytest.raises(ValueError, match="recording: has no branch_harm"):
            Harmless("branch_harm")(recording)
        for first_loss in (np.nan, 0.0, -1.0):
            with pytest.raises(ValueError, match=r"recording: its first_loss is .*, expected a loss above 0; pass"):
                Harmless()(dataclasses.replace(recording, first_loss=first_loss))
        with pytest.raises(ValueError, match="supervision: got 'cka', expected 'swap_harm' or 'branch_harm'"):
            Harmless("cka")
        with pytest.raises(ValueError, match="tolerance: got -1"):
            Harmless(tolerance=-1)
