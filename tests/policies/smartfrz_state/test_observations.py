"""What the policy ``smartfrz`` records of a run, and shows to its predictor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smartfrz_jax import Predictor, policies
from smartfrz_jax.policies.smartfrz_state import SmartFrzState
from smartfrz_jax.predictor import Tailoring
from smartfrz_jax.pytrees import checkpoint
from tests.policies.smartfrz_state.runs import LAYERS, SIZE, START, loss_at, run, weights_at


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
        state, _ = state.with_record(LAYERS, weights_at(step))
    state = state.replace(frozen=np.array([False, True, False, False]))
    state, _ = state.with_record(LAYERS, weights_at(3))
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
