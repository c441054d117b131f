import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smartfrz_jax import Layer, Layers, Predictor, PredictorConfig, policies

NAMES = ("a", "b", "c", "d")
LAYERS = Layers(tuple(Layer(name, (name,), (name,)) for name in NAMES))
SIZE = 8
CONFIG = PredictorConfig(size=SIZE, hidden=4, features=4, head_hidden=4)
START = {name: jnp.ones((4, 4)) for name in NAMES}


class StillnessPredictor(Predictor):
    """Confident if the records differ little from the newest: simple enough to say by hand what it must answer.

    ``bound`` stands in a parameter, so that it goes through ``nnx.jit`` as weights do.
    """

    traces = 0

    def __init__(self, bound=0.5):
        super().__init__(CONFIG, rngs=nnx.Rngs(0))
        self.bound = nnx.Param(jnp.float32(bound))

    def __call__(self, records, mask):
        type(self).traces += 1
        moved = jnp.max(jnp.where(mask[:, None], jnp.abs(records - records[-1:]), 0.0))
        return jnp.stack([moved, self.bound[...]])


@pytest.fixture
def predictor():
    StillnessPredictor.traces = 0
    return StillnessPredictor()


def params_at(step, speeds):
    return {name: jnp.full((4, 4), step * speed, jnp.float32) for name, speed in zip(NAMES, speeds, strict=True)}


def run(policy, steps, speeds=(0.0, 0.0, 0.0, 0.0)):
    """``speeds``: how far a layer's weights move per step; a function of the step, or four numbers."""
    state, decisions, states = policy.init(LAYERS, START), [], []
    position = np.zeros(4)
    for step in range(1, steps + 1):
        position += speeds(step) if callable(speeds) else speeds
        names, state = policy.update(state, LAYERS, step=step, params=lambda position=position: params_at(1, position))
        decisions.append("".join(sorted(names)))
        states.append(state)
    return decisions, states


def test_judges_each_layer_by_its_own_records(predictor):
    """Over a window of 3 records, 2 steps apart, a layer moves by 4 times its speed; the bound is 0.5."""

    def speeds(step):
        return np.array([1.0, 0.0, 1.0 if step <= 8 else 0.1, 0.0])

    policy = policies.smartfrz(predictor, record_every=2, evaluate_every=4, window=3)
    decisions, _ = run(policy, 20, speeds)
    # b has its three records at step 6, and is judged at 8; c's have been quiet since the record at step 8.
    assert decisions == [""] * 7 + ["b"] * 4 + ["bc"] * 9


def test_records_are_the_tailored_weights_at_the_stated_steps(predictor):
    policy = policies.smartfrz(predictor, record_every=3, evaluate_every=100, window=4)
    _, states = run(policy, 11, speeds=(1.0, 2.0, 0.0, 0.5))
    records, mask = states[-1].history.chronological()
    assert mask.tolist() == [[False, True, True, True]] * 4
    expected = np.array([0, 3, 6, 9])[None, :, None] * np.array([1.0, 2.0, 0.0, 0.5])[:, None, None]
    np.testing.assert_array_equal(records, np.broadcast_to(expected, (4, 4, SIZE)))
    assert states[1].history.count.tolist() == [0] * 4
    assert states[2].history.count.tolist() == [1] * 4


def test_frozen_layers_lose_their_history_and_are_not_judged_again(predictor):
    def speeds(step):  # b stands still until it freezes; were it judged later, it would be found moving
        return np.array([1.0, 0.0 if step <= 4 else 9.0, 1.0, 1.0])

    policy = policies.smartfrz(predictor, record_every=1, evaluate_every=4, window=3)
    decisions, states = run(policy, 12, speeds)
    assert decisions == [""] * 3 + ["b"] * 9
    assert states[4].history.count.tolist() == [5, 0, 5, 5]
    assert not np.asarray(states[4].history.values[1]).any()


@pytest.mark.parametrize(("min_records", "first"), [(None, 6), (3, 4), (1, 2)])
def test_waits_for_min_records(predictor, min_records, first):
    policy = policies.smartfrz(predictor, record_every=1, evaluate_every=2, window=5, min_records=min_records)
    decisions, _ = run(policy, 8)
    assert decisions.index("abc") + 1 == first
    assert set(decisions) == {"", "abc"}


def test_threshold_is_on_the_confidence(predictor):
    """Still layers have logits (0, 0.5): a confidence of 0.622."""

    def last(threshold):
        policy = policies.smartfrz(predictor, record_every=1, evaluate_every=2, window=2, threshold=threshold)
        return run(policy, 4)[0][-1]

    assert [last(t) for t in (0.0, 0.5, 0.62, 0.63, 1.0)] == ["abc", "abc", "abc", "", ""]


def test_a_tie_keeps_training():
    """argmax of equal logits is the first: keep."""
    policy = policies.smartfrz(StillnessPredictor(bound=0.0), record_every=1, evaluate_every=2, window=2)
    assert run(policy, 4)[0][-1] == ""


def test_compiles_the_predictor_once(predictor):
    """However many layers are frozen and records there are; after the first round nothing at all is compiled."""
    compiled = []

    def listener(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs.get("fun_name"))

    def speeds(step):
        return np.array([step < 10, step < 20, step < 30, 1.0], np.float64)

    policy = policies.smartfrz(predictor, record_every=1, evaluate_every=2, window=6, min_records=2)
    assert run(policy, 4, speeds)[0][-1] == ""
    assert StillnessPredictor.traces == 1
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        decisions, _ = run(policy, 40, speeds)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert sorted(set(decisions)) == ["", "a", "ab", "abc"]
    assert StillnessPredictor.traces == 1
    assert compiled == []


def test_listener_of_the_test_above_hears_compilations():
    compiled = []

    def listener(event, duration, **kwargs):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jax.jit(lambda x: x * 3.25 - 1.125)(jnp.ones(7))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert "/jax/core/compile/backend_compile_duration" in compiled


def test_no_implicit_transfers(predictor):
    policy = policies.smartfrz(predictor, record_every=1, evaluate_every=2, window=2)
    state = policy.init(LAYERS, START)
    for guard in ("allow", "disallow"):  # constants go to the device when programs are compiled
        with jax.transfer_guard(guard):
            for step in (1, 2, 3, 4):
                names, _ = policy.update(state, LAYERS, step=step, params=lambda: START)
                _, state = policy.update(state, LAYERS, step=step, params=lambda: START)
        assert names == {"a", "b", "c"}
        state = policy.init(LAYERS, START)


def test_defaults_follow_from_the_length_of_the_run(predictor):
    policy = policies.smartfrz(predictor, total_steps=400, window=10)  # a record every 10 steps, a stage every 50
    decisions, states = run(policy, 100)
    assert [int(s.history.count[0]) for s in states[8:20]] == [0, *[1] * 10, 2]
    assert decisions.index("abc") + 1 == 100


def test_paper_defaults():
    predictor = Predictor(CONFIG, rngs=nnx.Rngs(0))
    state = policies.smartfrz(predictor, total_steps=1000).init(LAYERS, START)
    assert state.history.values.shape == (4, 30, SIZE)


def test_seed_draws_the_sample(predictor):
    def positions(seed):
        state = policies.smartfrz(predictor, record_every=1, seed=seed).init(LAYERS, START)
        return [np.asarray(p).tolist() for p in jax.tree.leaves(state.tailoring)]

    assert positions(0) == positions(0)
    assert positions(0) != positions(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record_every": None}, "record_every: got none; pass it, or total_steps for the default"),
        ({"record_every": 0}, "record_every: got 0"),
        ({"evaluate_every": 0}, "evaluate_every: got 0"),
        ({"record_every": 5, "evaluate_every": 4}, "evaluate_every: got 4, expected at least record_every, 5"),
        ({"window": 0}, "window: got 0"),
        ({"min_records": 0}, "min_records: got 0"),
        ({"min_records": 31}, "min_records: got 31, expected at most the window, 30"),
        ({"threshold": 1.5}, "threshold: got 1.5"),
        ({"total_steps": 0}, "total_steps: got 0"),
        ({"size": 16}, "size: got 16, but the predictor was made for 8 weights per layer"),
        ({"total_steps": 29}, "30 records, one every 1 steps, .* do not fit in a run of 29 steps"),
        ({"total_steps": 50, "min_records": 1, "evaluate_every": 51}, "a freezing stage every 51 steps do not fit"),
    ],
)
def test_refuses_bad_options(predictor, options, message):
    with pytest.raises(ValueError, match=message):
        policies.smartfrz(predictor, **({"record_every": 1} | options))


def test_refuses_what_is_not_a_predictor():
    with pytest.raises(TypeError, match="predictor: got str, expected a smartfrz_jax"):
        policies.smartfrz("resnet50", total_steps=1000)


def test_stops_at_weights_that_are_not_finite(predictor):
    policy = policies.smartfrz(predictor, record_every=2, window=4)
    broken = START | {"b": jnp.full((4, 4), jnp.nan), "d": jnp.full((4, 4), jnp.inf)}
    state = policy.init(LAYERS, START)
    _, state = policy.update(state, LAYERS, step=1, params=lambda: broken)  # not recorded
    with pytest.raises(FloatingPointError, match="params: not finite after step 2 in layer 'b', 'd', so the policy"):
        policy.update(state, LAYERS, step=2, params=lambda: broken)


def test_stops_at_a_confidence_that_is_not_finite():
    policy = policies.smartfrz(StillnessPredictor(bound=np.nan), record_every=1, evaluate_every=2, window=2)
    with pytest.raises(FloatingPointError, match="confidence: not finite after step 2 in layer 'a', 'b', 'c', so"):
        run(policy, 2)
