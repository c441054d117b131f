"""Flax's examples as clients: with nothing frozen every bit is as with Flax's own door; a freeze holds and saves."""

import numpy as np
import pytest

from tests.clients import (
    linen_big_vision,
    linen_examples,
    linen_imagenet,
    linen_language,
    nnx_arguments,
    nnx_language,
    nnx_models,
)
from tests.clients.doors import Freezing, Stock, assert_equal, flops

MODULES = (
    linen_big_vision,
    linen_examples,
    linen_imagenet,
    linen_language,
    nnx_arguments,
    nnx_language,
    nnx_models,
)
EXAMPLES = [example for module in MODULES for example in module.EXAMPLES]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults")]


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=lambda example: f"{example.__module__.rpartition('.')[2]}.{example.__name__}"
)
def test_runs_as_with_flax_and_freezes(example):
    stock, run = example(Stock()), example(Freezing())
    for _ in range(3):
        loss = stock.advance()
        np.testing.assert_array_equal(run.advance(), loss)
        assert np.isfinite(loss).all()
    assert_equal(run.arrays(), stock.arrays())

    (held, active), before = run.freeze(), run.arrays()
    for _ in range(2):
        run.advance()
    after = run.arrays()
    assert held
    assert_equal({name: after[name] for name in held}, {name: before[name] for name in held})
    assert not [name for name in active if np.array_equal(after[name], before[name])]
    unfrozen, frozen = flops(run)
    assert frozen < unfrozen
