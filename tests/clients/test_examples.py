"""Examples of Flax and optax as clients: with nothing frozen every bit is as without this library; a freeze saves."""

import numpy as np
import pytest

from tests.clients import optax_cookbook
from tests.clients.doors import Freezing, Stock, assert_equal, flops
from tests.clients.flax_examples import (
    linen_big_vision,
    linen_examples,
    linen_imagenet,
    linen_language,
    nnx_arguments,
    nnx_language,
    nnx_models,
)

MODULES = (
    linen_big_vision,
    linen_examples,
    linen_imagenet,
    linen_language,
    nnx_arguments,
    nnx_language,
    nnx_models,
    optax_cookbook,
)
EXAMPLES = [example for module in MODULES for example in module.EXAMPLES]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults")]


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=lambda example: f"{example.__module__.rpartition('.')[2]}.{example.__name__}"
)
def test_runs_as_without_a_frozen_set_and_freezes(example):
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
