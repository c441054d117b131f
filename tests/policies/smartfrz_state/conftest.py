"""A predictor, and what it is shown."""

import importlib

import jax.numpy as jnp
import pytest
from flax import nnx

from smartfrz_jax import Predictor
from smartfrz_jax.predictor import PredictorConfig
from tests.policies.smartfrz_state.runs import SIZE


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
