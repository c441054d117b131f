"""The policy ``smartfrz`` compiles its predictor once, and moves nothing between devices unasked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax import policies
from tests.policies.smartfrz.predictors import LAYERS, START, StillnessPredictor, run


@pytest.mark.slow
def test_compiles_the_predictor_once(predictor):
    """However many layers are frozen and records there are; after the first round nothing at all is compiled."""
    compiled = []

    def listener(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs.get("fun_name"))

    def speeds(step):
        return np.array([step < 10, step < 20, step < 30, 1.0], np.float64)

    policy = policies.smartfrz(
        predictor, total_steps=40, schedule=policies.Schedule(record_every=1, evaluate_every=2, window=6, min_records=2)
    )
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
    policy = policies.smartfrz(predictor, schedule=policies.Schedule(record_every=1, evaluate_every=2, window=2))
    state, on_device = policy.init(LAYERS, START), jnp.float32(3)
    for guard in ("allow", "disallow"):  # constants go to the device when programs are compiled
        with jax.transfer_guard(guard):
            for step in (1, 2, 3, 4):
                for loss in (np.float32(1), 2.0, on_device, None):
                    names, later = policy.update(state, LAYERS, step=step, params=lambda: START, loss=loss)
                state = later
        assert names == {"a", "b", "c"}
        state = policy.init(LAYERS, START)
