"""``nnx.CachedStep``: an epoch's last batch, which is smaller, leaves what is kept as it is."""

import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from tests.support.train_steps import loss_fn, make_step

EXAMPLES, BATCH = 40, 16
IMAGES = np.random.default_rng(0).standard_normal((EXAMPLES, 6), np.float32)
LABELS = np.arange(EXAMPLES, dtype=np.int32) % 3

pytestmark = [pytest.mark.usefixtures("jax_defaults"), pytest.mark.slow]


@pytest.mark.parametrize("rest", [3, 1])
@pytest.mark.parametrize("freeze_at", [0, 1, 2], ids=["frozen from the beginning", "before the rest", "after it"])
def test_a_smaller_batch_sizes_no_cache_and_ends_none(rest, freeze_at):
    steps = {False: sfj.TrainStep(make_step(loss_fn)), True: sfj.nnx.CachedStep(make_step, loss_fn, examples=EXAMPLES)}
    batches = [np.arange(BATCH), np.arange(BATCH, BATCH + rest), np.arange(BATCH, 2 * BATCH)]
    losses = {}
    for keeps, step in steps.items():
        model = nnx.Sequential(*(nnx.Linear(6, size, rngs=nnx.Rngs(size)) for size in (6, 6, 3)))
        layers = sfj.nnx.find_layers(model, IMAGES[:2])
        optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=layers)
        losses[keeps] = []
        for number, indices in enumerate(batches):
            if number == freeze_at:
                optimizer.freeze(model, layers.names[:2])
            batch = (*[indices] * keeps, IMAGES[indices], LABELS[indices])
            losses[keeps].append(float(step(model, optimizer, *batch)))
            assert step.program(model, optimizer, *batch) is step.last
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-5)
    assert steps[True].cache.store.stored(batches[2]).all()
    assert steps[True].cache._loss.part == BATCH // 4
