"""A predictor whose decisions are known."""

import pytest

from tests.policies.smartfrz.predictors import StillnessPredictor


@pytest.fixture
def predictor():
    StillnessPredictor.traces = 0
    return StillnessPredictor()
