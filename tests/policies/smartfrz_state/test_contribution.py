"""The probe of the policy ``smartfrz``: what layers have contributed, and weights that are not needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smartfrz_jax import Layer, Layers, Predictor, policies
from smartfrz_jax.learning import Recording, make_examples
from smartfrz_jax.predictor import Encoding, PredictorConfig, freeze_probability
from smartfrz_jax.predictor.probe import contributions
from smartfrz_jax.pytrees import checkpoint
from tests.policies.smartfrz_state.runs import LAYERS, NAMES, SIZE, START, loss_at, run, weights_at


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
