import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax import find_layers
from smartfrz_jax.learning import Recorder, Recording
from smartfrz_jax.predictor import Tailoring
from smartfrz_jax.predictor.cka import linear_cka

BATCH = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)


def forward(params, x):
    return x @ params["first"]["kernel"] @ params["second"]["kernel"]


def outputs(params, x=BATCH):
    hidden = x @ params["first"]["kernel"]
    return {"second": hidden @ params["second"]["kernel"], "first": hidden}


def parameters(seed):
    rng = np.random.default_rng(seed)
    return {
        name: {"kernel": jnp.asarray(rng.standard_normal(shape), jnp.float32)}
        for name, shape in (("first", (4, 5)), ("second", (5, 3)))
    }


REFERENCE, START = parameters(0), parameters(9)
LAYERS = find_layers(REFERENCE, forward, BATCH)
TAILORING = Tailoring.create(LAYERS, REFERENCE, size=7)
RUN = {5: parameters(1), 10: parameters(2), 15: parameters(3)}


def recorder(record_every=5, **kwargs):
    return Recorder(LAYERS, TAILORING, START, record_every=record_every, **kwargs)


def beside_reference(**kwargs):
    return recorder(reference_features=outputs(REFERENCE), **kwargs)


@pytest.mark.slow
def test_records_what_there_is():
    rec = beside_reference(track_own=True)
    for step, params in RUN.items():
        rec.record(step, params, outputs(params), loss=1.0 / step)
    got = rec.finish(30, architecture="two linear maps", seed=3)
    assert got.layers == ("first", "second")
    assert (got.total_steps, got.record_every) == (30, 5)
    assert got.metadata == {"architecture": "two linear maps", "seed": 3}
    assert got.steps.tolist() == [5, 10, 15]
    assert got.weights.shape == (3, 2, 7)
    np.testing.assert_array_equal(got.start, TAILORING(START))
    np.testing.assert_allclose(got.losses, [0.2, 0.1, 1 / 15], rtol=1e-6)
    np.testing.assert_allclose(got.first_loss, 0.2, rtol=1e-6)
    for record, params in enumerate(RUN.values()):
        np.testing.assert_array_equal(got.weights[record], TAILORING(params))
        for layer, name in enumerate(got.layers):
            for cka, other in ((got.cka, REFERENCE), (got.own_cka, RUN[15])):
                expected = linear_cka(outputs(params)[name], outputs(other)[name])
                np.testing.assert_allclose(cka[record, layer], expected, rtol=1e-5)
    np.testing.assert_allclose(got.own_cka[2], 1.0, rtol=1e-6)
    assert (got.own_cka[:2] < 0.99).all()
    assert (got.cka < 0.99).all()
    assert (got.swap_harm, got.branch_harm) == (None, None)


@pytest.mark.slow
def test_only_what_is_asked_for():
    rec, own = beside_reference(), recorder(track_own=True)
    for step, params in RUN.items():
        rec.record(step, params, outputs(params))
        own.record(step, params, outputs(params))
    assert rec.finish(15).own_cka is None
    assert rec.finish(15).cka.shape == (3, 2)
    assert own.finish(15).cka is None
    assert own.finish(15).own_cka.shape == (3, 2)


def test_harm_alone_needs_no_features():
    rec = recorder()
    for step, params in RUN.items():
        rec.record(step, params)
    harm = np.array([[0.2, np.nan], [0.1, np.nan], [0.0, np.nan]])
    got = rec.finish(15, swap_harm=harm, branch_harm=2 * harm, seed=1)
    np.testing.assert_allclose(got.swap_harm, harm, rtol=1e-6)
    np.testing.assert_allclose(got.branch_harm, 2 * harm, rtol=1e-6)
    assert (got.cka, got.own_cka, got.metadata) == (None, None, {"seed": 1})
    with pytest.raises(ValueError, match="got none of them, expected at least one"):
        rec.finish(15)


def test_unknown_losses_are_nan():
    rec = beside_reference()
    rec.record(5, REFERENCE, outputs(REFERENCE))
    rec.record(10, REFERENCE, outputs(REFERENCE), loss=jnp.float32(0.5))
    got = rec.finish(10)
    np.testing.assert_array_equal(got.losses, [np.nan, 0.5])
    assert np.isnan(got.first_loss)


def test_a_record_before_the_first_step():
    rec = beside_reference()
    rec.record(0, START, outputs(START))
    rec.record(5, REFERENCE, outputs(REFERENCE), loss=3.0)
    got = rec.finish(10)
    np.testing.assert_array_equal(got.losses, [np.nan, 3.0])
    np.testing.assert_array_equal(got.weights[0], got.start)
    assert got.first_loss == 3.0


def test_features_of_what_is_not_a_layer_are_ignored():
    rec = recorder(reference_features=outputs(REFERENCE) | {"other": jnp.ones((3, 1))}, track_own=True)
    rec.record(0, REFERENCE, outputs(REFERENCE) | {"another": jnp.ones((2, 1))})
    np.testing.assert_allclose(rec.finish(1).cka, 1.0, rtol=1e-6)


def test_steps_may_be_arrays():
    rec = beside_reference()
    for step in (jnp.int32(5), np.int64(10)):
        rec.record(step, REFERENCE, outputs(REFERENCE), loss=jnp.float32(0.5))
    got = rec.finish(jnp.int32(11))
    assert got.steps.tolist() == [5, 10]
    assert type(got.total_steps) is int


class TestRefusals:
    def test_tailoring_of_other_layers(self):
        other = find_layers({"x": {"kernel": jnp.eye(4)}}, lambda p, x: x @ p["x"]["kernel"], BATCH)
        with pytest.raises(
            ValueError, match=r"tailoring: made for other layers .2 from 'first' on. than layers .1 from 'x'"
        ):
            Recorder(other, TAILORING, {"x": {"kernel": jnp.eye(4)}}, record_every=1)

    def test_start_that_is_not_finite(self):
        with pytest.raises(ValueError, match="params: not finite for layer 'second' at step 0"):
            Recorder(LAYERS, TAILORING, START | {"second": {"kernel": jnp.full((5, 3), jnp.inf)}}, record_every=5)

    def test_record_every(self):
        with pytest.raises(ValueError, match="record_every: got 0, expected an integer of at least 1"):
            recorder(record_every=0)

    def test_missing_outputs(self):
        with pytest.raises(ValueError, match="reference_features: lacks the output of 1 of 2 layers: 'second'"):
            recorder(reference_features={"first": BATCH})
        for rec in (beside_reference(), recorder(track_own=True)):
            with pytest.raises(ValueError, match="features: lacks the output of 1 of 2 layers: 'first'"):
                rec.record(0, REFERENCE, {"second": BATCH})
            with pytest.raises(ValueError, match="features: got none, expected the output of each layer"):
                rec.record(0, REFERENCE)

    def test_another_batch(self):
        with pytest.raises(ValueError, match=r"features\['first'\].*got 5 and 6 examples"):
            beside_reference().record(0, REFERENCE, outputs(REFERENCE, BATCH[:5]))
        rec = recorder(track_own=True)
        rec.record(0, REFERENCE, outputs(REFERENCE))
        with pytest.raises(ValueError, match="features: got another number of examples than before"):
            rec.record(5, REFERENCE, outputs(REFERENCE, BATCH[:5]))

    def test_steps_are_multiples_in_a_row(self):
        rec = beside_reference()
        with pytest.raises(TypeError, match=r"step: got .*1.5.*expected an integer"):
            rec.record(1.5, REFERENCE, outputs(REFERENCE))
        for step in (-5, 3):
            with pytest.raises(ValueError, match=f"step: got {step}, expected a multiple of record_every, 5"):
                rec.record(step, REFERENCE, outputs(REFERENCE))
        rec.record(5, REFERENCE, outputs(REFERENCE))
        for step in (5, 0, 12, 15):
            with pytest.raises(ValueError, match=f"step: got {step} after 5, expected 10"):
                rec.record(step, REFERENCE, outputs(REFERENCE))
        assert rec.finish(5).steps.tolist() == [5]

    def test_non_finite_values_name_layer_and_step_and_are_not_recorded(self):
        bad = REFERENCE | {"second": {"kernel": jnp.full((5, 3), jnp.nan)}}
        worse = outputs(REFERENCE) | {"first": BATCH.at[0, 0].set(jnp.inf)}
        for rec, field in ((beside_reference(), "cka"), (recorder(track_own=True), "features")):
            rec.record(0, REFERENCE, outputs(REFERENCE))
            with pytest.raises(ValueError, match="weights: not finite for layer 'second' at step 5"):
                rec.record(5, bad, outputs(REFERENCE))
            with pytest.raises(ValueError, match=f"{field}: not finite for layer 'first' at step 5"):
                rec.record(5, REFERENCE, worse)
            with pytest.raises(ValueError, match="loss: got nan at step 5, expected a finite number, or None"):
                rec.record(5, REFERENCE, outputs(REFERENCE), loss=jnp.nan)
            rec.record(5, REFERENCE, outputs(REFERENCE))
            got = rec.finish(7)
            assert got.steps.tolist() == [0, 5]
            assert [len(x) for x in (got.weights, got.losses)] == [2, 2]

    def test_finish(self):
        rec = beside_reference()
        with pytest.raises(ValueError, match="nothing was recorded"):
            rec.finish(3)
        rec.record(10, REFERENCE, outputs(REFERENCE))
        with pytest.raises(ValueError, match="total_steps: got 8, expected at least the last recorded step, 10"):
            rec.finish(8)
        with pytest.raises(ValueError, match="metadata: JSON cannot hold it"):
            rec.finish(10, weights=np.ones(3))
        with pytest.raises(ValueError, match="metadata: JSON cannot hold it"):
            rec.finish(10, accuracy=float("nan"))


def test_is_what_a_file_gives_back(tmp_path):
    from smartfrz_jax.learning import recording_files

    rec = beside_reference(track_own=True)
    for step, params in RUN.items():
        rec.record(step, params, outputs(params), loss=0.1)
    made = rec.finish(15, seed=3)
    recording_files.save(made, tmp_path, "run")
    (got,) = recording_files.load(tmp_path)
    for field in dataclasses.fields(Recording):
        np.testing.assert_equal(getattr(got, field.name), getattr(made, field.name))
