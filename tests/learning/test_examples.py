import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax.learning.examples import make_examples
from smartfrz_jax.learning.recording import Recording
from smartfrz_jax.learning.targets import Harmless, Settled
from smartfrz_jax.predictor.history import History
from smartfrz_jax.predictor.observation import Observation


def make_recording(seed=0, records=9, layers=3, size=4, record_every=10, first=1, total_steps=100, **supervision):
    rng = np.random.default_rng(seed)
    return Recording(
        layers=tuple(f"layer{i}" for i in range(layers)),
        steps=np.arange(first, first + records) * record_every,
        record_every=record_every,
        total_steps=total_steps,
        weights=rng.standard_normal((records, layers, size)).astype(np.float32),
        start=rng.standard_normal((layers, size)).astype(np.float32),
        losses=rng.random(records).astype(np.float32),
        first_loss=rng.random(),
        **supervision or {"cka": rng.random((records, layers)).astype(np.float32)},
        metadata={"seed": seed},
    )


def at_half(recording):
    return recording.cka > 0.5


def examples_of(*recordings, **kwargs):
    return make_examples(recordings, **{"criterion": at_half, "min_records": 1} | kwargs)


def test_batch_is_an_observation_of_numpy_arrays():
    examples = examples_of(make_recording(), window=3)
    observation, target = examples.batch(np.arange(5))
    assert isinstance(observation, Observation)
    shapes = {name: (array.shape, array.dtype.name) for name, array in vars(observation).items()}
    assert shapes == {
        "records": ((5, 3, 4), "float32"),
        "mask": ((5, 3), "bool"),
        "start": ((5, 4), "float32"),
        "elapsed": ((5,), "float32"),
        "losses": ((5, 3), "float32"),
        "first_loss": ((5,), "float32"),
        "progress": ((5,), "float32"),
        "depth": ((5,), "float32"),
        "contribution": ((5,), "float32"),
    }
    assert all(type(array) is np.ndarray for array in jax.tree.leaves(observation))
    assert (target.shape, target.dtype) == ((5,), bool)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 4, 9, 30])
def test_is_what_a_policy_sees_while_the_network_trains(window):
    recordings = [make_recording(0), make_recording(1, records=5, layers=2, record_every=7, first=3)]
    examples = examples_of(*recordings, window=window)
    assert len(examples) == 9 * 3 + 5 * 2
    seen, target = examples.batch(np.arange(len(examples)))
    for run, recording in enumerate(recordings):
        layers = len(recording.layers)
        history, losses = History.create(layers, window, 4), []
        for moment, step in enumerate(recording.steps):
            history = history.record(jnp.asarray(recording.weights[moment]), jnp.ones(layers, bool))
            losses.append(recording.losses[moment])
            expected_records, expected_mask = history.chronological()
            here = np.flatnonzero((examples.run == run) & (examples.moment == moment))
            assert examples.layer[here].tolist() == list(range(layers))
            np.testing.assert_array_equal(seen.records[here], expected_records)
            np.testing.assert_array_equal(seen.mask[here], expected_mask)
            np.testing.assert_array_equal(seen.start[here], recording.start)
            recent = losses[-window:]
            expected_losses = [np.nan] * (window - len(recent)) + recent
            np.testing.assert_array_equal(seen.losses[here], [expected_losses] * layers)
            np.testing.assert_allclose(seen.elapsed[here], step / recording.record_every, rtol=1e-6)
            np.testing.assert_allclose(seen.progress[here], step / 100, rtol=1e-6)
            np.testing.assert_allclose(seen.first_loss[here], recording.first_loss, rtol=1e-6)
            np.testing.assert_allclose(seen.depth[here], np.arange(layers) / (layers - 1), rtol=1e-6)
            np.testing.assert_array_equal(target[here], recording.cka[moment] > 0.5)


def test_batches_come_in_the_order_asked_for():
    examples = examples_of(make_recording(0), make_recording(1), window=3)
    everything = examples.batch(np.arange(len(examples)))
    chosen = np.array([40, 3, 3, 29, 0])
    jax.tree.map(
        lambda got, expected: np.testing.assert_array_equal(got, expected[chosen]), examples.batch(chosen), everything
    )


def test_a_single_layer_is_the_first():
    examples = examples_of(make_recording(layers=1, records=2))
    assert examples.depth.tolist() == [0.0, 0.0]
    np.testing.assert_allclose(examples.progress, [0.1, 0.2], rtol=1e-6)


def test_recordings_are_not_copied():
    recordings = [make_recording(0), make_recording(1)]
    examples = examples_of(*recordings)
    assert examples.recordings[1] is recordings[1]
    assert examples.select(examples.run == 1).recordings[0] is recordings[0]
    before = recordings[0].weights.copy()
    observation, target = examples.batch(np.arange(len(examples)))
    for array in (*jax.tree.leaves(observation), target):
        array[:] = 1
    np.testing.assert_array_equal(recordings[0].weights, before)
    assert examples.size == 4
    assert examples.layers == (("layer0", "layer1", "layer2"),) * 2


def test_min_records_and_stride():
    def moments(**kwargs):
        return np.unique(make_examples([make_recording()], criterion=at_half, **kwargs).moment).tolist()

    assert moments() == [4, 5, 6, 7, 8]
    assert moments(min_records=1) == list(range(9))
    assert moments(min_records=1, stride=4) == [0, 4, 8]
    assert moments(min_records=3, stride=4) == [2, 6]
    assert moments(min_records=9) == [8]


def test_a_short_recording_gives_no_examples():
    examples = make_examples([make_recording(records=4), make_recording(records=5)], criterion=at_half)
    assert np.unique(examples.run).tolist() == [1]


def test_criteria():
    recording = make_recording(cka=np.ones((9, 3)), swap_harm=np.linspace(1, 0, 9)[:, None] * np.ones(3))
    default = make_examples([recording])
    assert default.supervision == "Settled(supervision='cka', window=5, tolerance=0.02)"
    np.testing.assert_array_equal(default.target, Settled("cka")(recording)[4:].ravel())
    harmless = make_examples([recording], criterion=Harmless(tolerance=0.5))
    assert harmless.supervision == "Harmless(supervision='swap_harm', tolerance=0.5)"
    np.testing.assert_array_equal(harmless.target, Harmless(tolerance=0.5)(recording)[4:].ravel())
    assert make_examples([recording], criterion=at_half).supervision == "at_half"


def test_select_by_index_or_mask():
    examples = examples_of(make_recording())
    mask = examples.layer == 1
    by_mask, by_index = examples.select(mask), examples.select(np.flatnonzero(mask))
    assert len(by_mask) == len(by_index) == 9
    jax.tree.map(np.testing.assert_array_equal, by_mask.batch(np.arange(9)), by_index.batch(np.arange(9)))


class TestRefusals:
    @pytest.mark.parametrize("argument", ["window", "min_records", "stride"])
    def test_numbers_below_1(self, argument):
        with pytest.raises(ValueError, match=f"{argument}: got 0, expected an integer of at least 1"):
            examples_of(make_recording(), **{argument: 0})

    def test_recordings_that_do_not_fit(self):
        with pytest.raises(ValueError, match="recordings: got 0 of"):
            make_examples([])
        with pytest.raises(ValueError, match=r"recordings: got 2 of tailored sizes \[4, 5\]"):
            examples_of(make_recording(), make_recording(size=5))
        with pytest.raises(ValueError, match="min_records: got 10, but no recording has more than 9 records"):
            examples_of(make_recording(), min_records=10)

    def test_criterion_that_does_not_fit(self):
        with pytest.raises(
            ValueError, match=r"criterion: gave float32 of shape \(9, 3\) for recording 0, expected bool"
        ):
            examples_of(make_recording(), criterion=lambda recording: recording.cka)
        with pytest.raises(ValueError, match=r"criterion: gave bool of shape \(9,\)"):
            examples_of(make_recording(), criterion=lambda recording: recording.cka[:, 0] > 0)

    def test_a_recording_without_the_supervision_is_named(self):
        with pytest.raises(ValueError, match=r"recordings: number 1 .*'seed': 7.*: recording: has no cka"):
            make_examples([make_recording(), make_recording(7, swap_harm=np.ones((9, 3)))])


def test_contributions_are_those_that_were_known():
    measured = np.full((8, 3), np.nan)
    measured[2, 1] = 0.5
    recording = dataclasses.replace(make_recording(records=8, layers=3), contribution=measured)
    examples = make_examples([make_recording(records=8, layers=3), recording], window=3, min_records=1)
    observation, _ = examples.select(examples.moment == 1).batch(np.arange(6))
    assert np.isnan(observation.contribution).all()
    observation, _ = examples.select(examples.moment == 4).batch(np.arange(6))
    np.testing.assert_array_equal(observation.contribution, np.array([np.nan] * 3 + [0.25, 0.5, np.nan], np.float32))
