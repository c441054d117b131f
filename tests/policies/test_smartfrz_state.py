"""What the policy ``smartfrz`` records of a run, and shows to its predictor."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smartfrz_jax import Layer, Layers, Predictor, policies
from smartfrz_jax.learning import Recording, make_examples
from smartfrz_jax.policies.smartfrz_state import SmartFrzState
from smartfrz_jax.predictor import Encoding, PredictorConfig, Tailoring, freeze_probability
from smartfrz_jax.predictor.probe import contributions
from smartfrz_jax.pytrees import checkpoint

NAMES = ("a", "b", "c", "d")
LAYERS = Layers(tuple(Layer(name, (name,), (name,)) for name in NAMES))
SIZE = 8
START = {name: jnp.full((4, 4), i, jnp.float32) for i, name in enumerate(NAMES)}


@pytest.fixture
def predictor():
    return Predictor(PredictorConfig(size=SIZE, hidden=4, features=4, head_hidden=4), rngs=nnx.Rngs(0))


@pytest.fixture
def observed(monkeypatch):
    """Every observation that was put to the predictor, which answers that no layer is ready."""
    seen = []

    def answer(predictor, observation):
        seen.append(observation)
        return jnp.zeros(len(observation.depth))

    module = importlib.import_module("smartfrz_jax.policies.smartfrz")  # the package has a function of that name
    monkeypatch.setattr(module, "freeze_probability", answer)
    return seen


def weights_at(step):
    rng = np.random.default_rng(step)
    return {name: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for name in NAMES}


def run(policy, steps, loss=lambda step: None, first=1):
    state = policy.init(LAYERS, START)
    for step in range(first, first + steps):
        _, state = policy.update(state, LAYERS, step=step, params=lambda step=step: weights_at(step), loss=loss(step))
    return state


def loss_at(step):
    return np.float32(10 / step)


def test_shows_the_predictor_the_last_records_and_where_they_stand_in_the_run(predictor, observed):
    policy = policies.smartfrz(
        predictor,
        total_steps=60,
        schedule=policies.Schedule(record_every=3, evaluate_every=12, window=3, min_records=1),
    )
    state = run(policy, 24, loss_at)
    tailored = {step: np.asarray(state.tailoring(weights_at(step))) for step in range(1, 25)}
    means = {end: np.mean([loss_at(step) for step in range(end - 2, end + 1)]) for end in range(3, 25, 3)}
    assert len(observed) == 2
    for observation, end in zip(observed, (12, 24), strict=True):
        shown = [end - 6, end - 3, end]
        np.testing.assert_array_equal(observation.records, np.stack([tailored[s] for s in shown], axis=1))
        assert observation.mask.shape == (4, 3)
        assert observation.mask.all()
        np.testing.assert_array_equal(observation.start, Tailoring.create(LAYERS, START, size=SIZE)(START))
        np.testing.assert_array_equal(observation.start, np.repeat(np.arange(4.0)[:, None], SIZE, axis=1))
        np.testing.assert_array_equal(observation.elapsed, [end / 3] * 4)
        np.testing.assert_allclose(observation.losses, np.tile([means[s] for s in shown], (4, 1)), rtol=1e-6)
        np.testing.assert_allclose(observation.first_loss, [means[3]] * 4, rtol=1e-6)
        np.testing.assert_allclose(observation.progress, [end / 60] * 4, rtol=1e-6)
        np.testing.assert_allclose(observation.depth, [0, 1 / 3, 2 / 3, 1], rtol=1e-6)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(observation)} == {"float32", "bool"}


def test_before_the_window_is_full(predictor, observed):
    policy = policies.smartfrz(
        predictor, schedule=policies.Schedule(record_every=2, evaluate_every=4, window=4, min_records=2)
    )
    state = run(policy, 4, loss_at)
    (observation,) = observed
    assert observation.mask.tolist() == [[False, False, True, True]] * 4
    np.testing.assert_array_equal(observation.records[:, 2], state.tailoring(weights_at(2)))
    assert not np.asarray(observation.records[:, :2]).any()
    np.testing.assert_allclose(observation.losses[0], [np.nan, np.nan, 7.5, (10 / 3 + 2.5) / 2], rtol=1e-6)


def test_progress_is_unknown_in_a_run_without_a_set_end(predictor, observed):
    run(policies.smartfrz(predictor, schedule=policies.Schedule(record_every=1, evaluate_every=2, window=2)), 4)
    assert len(observed) == 2
    assert all(np.isnan(observation.progress).all() for observation in observed)
    np.testing.assert_array_equal(observed[1].elapsed, [4] * 4)


def test_progress_ends_at_one(predictor, observed):
    run(
        policies.smartfrz(
            predictor,
            total_steps=4,
            schedule=policies.Schedule(record_every=1, evaluate_every=2, window=2, min_records=1),
        ),
        8,
    )
    np.testing.assert_array_equal([observation.progress[0] for observation in observed], [0.5, 1, 1, 1])


def test_stands_where_the_last_record_does_if_a_freezing_stage_falls_between_two(predictor, observed):
    policy = policies.smartfrz(
        predictor,
        total_steps=100,
        schedule=policies.Schedule(record_every=4, evaluate_every=6, window=2, min_records=1),
    )
    run(policy, 18)
    np.testing.assert_allclose([o.progress[0] for o in observed], [0.04, 0.12, 0.16], rtol=1e-6)
    assert [float(o.elapsed[0]) for o in observed] == [1, 3, 4]


def test_a_run_that_goes_on_with_a_policy_has_its_start_there(predictor, observed):
    policy = policies.smartfrz(
        predictor,
        total_steps=200,
        schedule=policies.Schedule(record_every=5, evaluate_every=10, window=4, min_records=1),
    )
    run(policy, 20, loss_at, first=101)
    assert [float(o.elapsed[0]) for o in observed] == [2, 4]
    np.testing.assert_allclose([o.progress[0] for o in observed], [0.55, 0.6], rtol=1e-6)
    np.testing.assert_allclose(observed[0].first_loss[0], np.mean([loss_at(step) for step in range(101, 106)]))


@pytest.mark.parametrize(
    ("loss", "losses", "first"),
    [
        (lambda step: None, [np.nan] * 3, np.nan),
        (lambda step: 2.0 if step > 3 else None, [np.nan, 2, 2], np.nan),
        (lambda step: None if step in (1, 5, 6) else float(step), [2.5, 4, 8], 2.5),
        (lambda step: None if 4 <= step <= 6 else 1.0, [1, np.nan, 1], 1),
        (lambda step: np.nan if step == 5 else 1.0, [1, 1, 1], 1),
        (lambda step: jnp.bfloat16(step), [2, 5, 8], 2),
        (lambda step: np.float64(step), [2, 5, 8], 2),
        (lambda step: step, [2, 5, 8], 2),
    ],
)
def test_mean_loss_between_records(predictor, observed, loss, losses, first):
    run(policies.smartfrz(predictor, schedule=policies.Schedule(record_every=3, evaluate_every=9, window=3)), 9, loss)
    (observation,) = observed
    np.testing.assert_array_equal(observation.losses, np.tile(np.float32(losses), (4, 1)))
    np.testing.assert_array_equal(observation.first_loss, np.float32([first] * 4))


def test_a_loss_left_out_is_a_loss_of_none(predictor, observed):
    policy = policies.smartfrz(predictor, schedule=policies.Schedule(record_every=1, evaluate_every=2, window=2))
    state = policy.init(LAYERS, START)
    for step in (1, 2):
        _, state = policy.update(state, LAYERS, step=step, params=lambda: START)
    assert np.isnan(observed[0].losses).all()


def test_refuses_a_loss_that_is_no_scalar(predictor):
    policy = policies.smartfrz(predictor, schedule=policies.Schedule(record_every=2))
    with pytest.raises(ValueError, match=r"loss: got shape \(3,\), expected a scalar; pass the mean"):
        policy.update(policy.init(LAYERS, START), LAYERS, step=1, params=lambda: START, loss=jnp.ones(3))


def test_adding_up_the_loss_does_not_wait_for_it(predictor):
    """With a traced loss, which has no value yet, anything that asked for it would raise."""
    policy = policies.smartfrz(predictor, schedule=policies.Schedule(record_every=3))
    state = policy.init(LAYERS, START)

    def two_steps(first, second):
        middle = policy.update(state, LAYERS, step=1, params=lambda: START, loss=first)[1]
        return policy.update(middle, LAYERS, step=2, params=lambda: START, loss=second)[1].loss_sum

    assert jax.jit(two_steps)(jnp.float32(2), jnp.float32(3)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_losses_and_weights_on_a_mesh(predictor, observed, axes):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    policy = policies.smartfrz(predictor, schedule=policies.Schedule(record_every=2, evaluate_every=4, window=3))
    alone = run(policy, 8, loss_at)
    with jax.set_mesh(mesh):
        state = policy.init(LAYERS, jax.device_put(START, everywhere))
        for step in range(1, 9):
            _, state = policy.update(
                state,
                LAYERS,
                step=step,
                params=lambda step=step: jax.device_put(weights_at(step), everywhere),
                loss=jax.device_put(loss_at(step), everywhere),
            )
    jax.tree.map(np.testing.assert_array_equal, state, alone)
    jax.tree.map(np.testing.assert_array_equal, observed[1], observed[0])


@pytest.mark.slow
def test_a_restored_predictor_judges_weights_on_a_mesh(predictor, tmp_path):
    predictor.save(tmp_path / "predictor")
    restored = Predictor.restore(tmp_path / "predictor")
    everywhere = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec())
    for params in (START, jax.device_put(START, everywhere)):  # neither may bind the predictor to its devices
        policy = policies.smartfrz(
            restored,
            schedule=policies.Schedule(record_every=1, evaluate_every=1, min_records=1, patience=1),
            caution=0.0,
        )
        names, _ = policy.update(policy.init(LAYERS, params), LAYERS, step=1, params=lambda params=params: params)
        assert names == {"a", "b", "c"}


def test_frozen_layers_lose_their_history_but_not_their_start():
    state = SmartFrzState.create(LAYERS, START, window=3, size=SIZE, seed=0, keep_start=False)
    for step in (1, 2):
        state = state.with_record(LAYERS, weights_at(step), step=step, policy="smartfrz", max_consecutive_errors=0)
    state = state.replace(frozen=np.array([False, True, False, False]))
    state = state.with_record(LAYERS, weights_at(3), step=3, policy="smartfrz", max_consecutive_errors=0)
    assert state.history.count.tolist() == [3, 0, 3, 3]
    assert not np.asarray(state.history.values[1]).any()
    np.testing.assert_array_equal(state.start[:, 0], [0, 1, 2, 3])
    assert state.records == 3


def test_a_loss_under_way_survives_a_checkpoint(predictor, observed, tmp_path):
    policy = policies.smartfrz(predictor, schedule=policies.Schedule(record_every=4, evaluate_every=8, window=2))
    state = run(policy, 6, loss_at)
    checkpoint.write(tmp_path / "state", state, "policy", {})
    restored = checkpoint.read(tmp_path / "state", policy.init(LAYERS, START), "policy")
    assert restored.loss_count == 2
    for step in (7, 8):
        _, restored = policy.update(restored, LAYERS, step=step, params=lambda: weights_at(8), loss=loss_at(step))
    expected = run(policy, 8, loss_at)
    assert restored.losses.tobytes() == expected.losses.tobytes()
    np.testing.assert_allclose(restored.losses, [(10 + 5 + 10 / 3 + 2.5) / 4, (2 + 10 / 6 + 10 / 7 + 1.25) / 4])
    assert restored.first_loss.tobytes() == expected.first_loss.tobytes()
    jax.tree.map(np.testing.assert_array_equal, observed[0], observed[1])


def test_shows_the_predictor_what_the_front_has_contributed(predictor, observed):
    """The probe is the negative sum of the layers' means, so a front contributes what its means have risen by."""
    asked = []

    def probe(params):
        asked.append(params)
        return -sum(np.mean(params[name]) for name in NAMES)

    policy = policies.smartfrz(
        predictor,
        schedule=policies.Schedule(record_every=1, evaluate_every=2, min_records=1),
        probe=policies.Probing(probe, first_probe=4, depths=2),
    )
    state = run(policy, 14)  # it doubles: after 12 steps nothing is measured
    risen = np.cumsum([[np.mean(weights_at(step)[name] - START[name]) for name in NAMES] for step in (4, 8)], axis=1)
    assert [bool(np.isnan(seen.contribution).all()) for seen in observed] == [True] + 6 * [False]
    for seen, expected in zip(observed[1:], risen[[0, 0, 1, 1, 1, 1]], strict=True):
        # Of three layers but the head, two depths: the second and the third.
        np.testing.assert_allclose(seen.contribution[1:3], expected[1:3], rtol=1e-5)
        assert seen.contribution[0] == pytest.approx(expected[1] / 2, rel=1e-5)
        assert np.isnan(seen.contribution[3])
    assert len(asked) == 2 * 3
    assert state.start_params.keys() == START.keys()


@pytest.mark.slow
def test_a_predictor_learns_from_what_a_policy_will_show_it(predictor, observed):
    """Contributions are in the recording for every record and layer; examples know no more of them than the policy."""
    names = [f"layer{i}" for i in range(12)]
    layers = Layers(tuple(Layer(name, (name,), (name,)) for name in names))

    def params_at(step):
        rng = np.random.default_rng(step)
        return {name: jnp.asarray(rng.normal(size=(4, 4)) + 0.1 * step * (step > 0), jnp.float32) for name in names}

    def probe(params):
        return -float(sum(np.mean(params[name]) * (i + 1) ** 2 for i, name in enumerate(names)))

    policy = policies.smartfrz(predictor, total_steps=120, probe=probe)
    state = policy.init(layers, params_at(0))
    measured = []
    for step in range(1, 121):
        _, state = policy.update(state, layers, step=step, params=lambda step=step: params_at(step), loss=loss_at(step))
        measured.append(contributions(layers, probe, params_at(step), params_at(0), depths=range(11)))
    losses = np.array([loss_at(step) for step in range(1, 121)])
    recording = Recording(
        layers=tuple(names), steps=np.arange(1, 121), record_every=1, total_steps=120,
        weights=np.ones((120, 12, SIZE)), start=np.ones((12, SIZE)), losses=losses,
        first_loss=float(loss_at(1)), cka=np.ones((120, 12)), contribution=np.stack(measured),
    )  # fmt: skip
    examples = make_examples([recording], min_records=5, stride=5)
    assert len(observed) == 24
    for stage, observation in enumerate(observed):
        shown, _ = examples.batch(np.flatnonzero(examples.moment == 5 * stage + 4))
        for field in ("contribution", "progress", "depth", "losses", "first_loss", "elapsed", "mask"):
            np.testing.assert_allclose(
                getattr(observation, field), getattr(shown, field), rtol=1e-5, err_msg=f"{field}, stage {stage}"
            )
    assert [bool(np.isnan(seen.contribution).all()) for seen in observed].index(False) == 1  # from a twelfth on


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"probe": 3}, TypeError, "probe: got int 3, expected a function .* sfj.nnx.probe"),
        (
            {"probe": len, "first_probe": 15},
            ValueError,
            "first_probe: got 15, .* multiple of evaluate_every, 10",
        ),
        ({"probe": len, "first_probe": 0}, ValueError, "first_probe: got 0"),
        ({"probe": len, "depths": 0}, ValueError, "depths: got 0"),
    ],
)
def test_refuses_bad_probes(predictor, options, error, message):
    schedule = policies.Schedule(record_every=2, evaluate_every=10)
    with pytest.raises(error, match=message):
        policies.smartfrz(predictor, schedule=schedule, probe=policies.Probing(**options))


def test_a_function_is_a_probing_with_the_defaults(predictor):
    made = [policies.smartfrz(predictor, total_steps=1000, probe=probe) for probe in (len, policies.Probing(len))]
    assert made[0].options == made[1].options
    assert (made[0].options["first_probe"], made[0].options["probe_depths"]) == (80, 3)
    with pytest.raises(TypeError, match="probe: got int 3, expected a function"):
        policies.smartfrz(predictor, total_steps=1000, probe=3)


def test_does_not_measure_what_the_predictor_does_not_read(observed):
    config = PredictorConfig(size=SIZE, hidden=4, features=4, head_hidden=4, encoding=Encoding(regime=("loss_level",)))
    policy = policies.smartfrz(
        Predictor(config, rngs=nnx.Rngs(0)),
        schedule=policies.Schedule(record_every=1, evaluate_every=2),
        probe=lambda params: 1 / 0,
    )
    state = run(policy, 16)
    assert state.start_params is None
    assert np.isnan(observed[-1].contribution).all()


@pytest.mark.slow
def test_keeps_no_weights_for_a_predictor_that_reads_none(tmp_path):
    config = PredictorConfig(
        size=SIZE, hidden=4, features=4, head_hidden=4, encoding=Encoding("none", regime=("loss_level",))
    )
    blind = Predictor(config, rngs=nnx.Rngs(0))
    policy = policies.smartfrz(
        blind, total_steps=40, schedule=policies.Schedule(record_every=1, evaluate_every=2, window=5)
    )
    state = run(policy, 20, loss_at)
    assert state.tailoring is None
    assert state.history.values.size == len(NAMES) * 5
    observation = state.observation(0.5)
    records = np.random.default_rng(0).normal(size=(len(NAMES), 5, SIZE)).astype(np.float32)
    sampled = observation.replace(records=jnp.asarray(records), start=jnp.asarray(records[:, 0]))
    np.testing.assert_array_equal(freeze_probability(blind, sampled), freeze_probability(blind, observation))
    checkpoint.write(tmp_path / "state", state, "policy", {})
    restored = checkpoint.read(tmp_path / "state", policy.init(LAYERS, START), "policy")
    jax.tree.map(np.testing.assert_array_equal, restored, state)
