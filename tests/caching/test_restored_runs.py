"""A run with kept activations that is interrupted ends with the bits of one that is not."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.caching import Storage
from tests.support.train_steps import loss_fn, make_step

EXAMPLES, BATCH, STEPS = 32, 16, 14
IMAGES = np.random.default_rng(0).standard_normal((EXAMPLES, 9, 16), np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, EXAMPLES).astype(np.int32)
# Layers freeze in the midst of an epoch, before everything is stored, one trains again, and freezes again.
SETS = {0: 0, 1: 1, 4: 3, 8: 1, 11: 4}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults")]


class Net(nnx.Module):
    """Attention and normalisation: what XLA computes differently in batches of another size."""

    def __init__(self, rngs):
        self.first = nnx.Linear(16, 32, rngs=rngs)
        self.query, self.value = (nnx.Linear(32, 32, rngs=rngs) for _ in range(2))
        self.norm, self.second = nnx.LayerNorm(32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)
        self.head = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.gelu(self.first(x))
        weights = jax.nn.softmax(self.query(x) @ x.swapaxes(1, 2))
        x = x + weights @ nnx.tanh(self.value(x))
        x = nnx.gelu(self.second(self.norm(x)))
        return self.head(x.mean(1))


class Training:
    """A model, its optimizer, its step and its freezer."""

    def __init__(self, storage, lead=0):
        self.model = Net(nnx.Rngs(0))
        layers = sfj.nnx.find_layers(self.model, IMAGES[:BATCH])
        self.optimizer = sfj.nnx.Optimizer(self.model, optax.adamw(1e-2), layers=layers)
        self.step = sfj.nnx.CachedStep(make_step, loss_fn, examples=EXAMPLES, storage=storage)

        def update(state, layers, *, step, params, **signals):
            return frozenset(layers.names[: SETS[max(at for at in SETS if at <= step)]]), state

        policy = sfj.Policy(lambda layers, params: (), update)
        self.freezer = sfj.nnx.Freezer(self.model, self.optimizer, policy, train_step=self.step, lead=lead)

    def run(self, stop, save=()):
        """Goes on until so many steps are done, and writes checkpoints after some, into the folders they name."""
        while self.freezer.steps < stop:
            at = self.freezer.steps
            order = np.random.default_rng(at // (EXAMPLES // BATCH)).permutation(EXAMPLES)
            indices = order[at % (EXAMPLES // BATCH) * BATCH :][:BATCH]
            self.step(self.model, self.optimizer, indices, IMAGES[indices], LABELS[indices])
            self.freezer.step()
            if self.freezer.steps in save:
                self.freezer.save(save[self.freezer.steps])

    def arrays(self):
        return sfj.pytrees.paths.flatten(nnx.as_pure(nnx.state((self.model, self.optimizer))))


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        assert np.asarray(got[name]).tobytes() == np.asarray(leaf).tobytes(), name


@pytest.mark.parametrize(
    ("storage", "lead", "moments"),
    [(Storage(), 0, (5, 12)), (Storage("host"), 2, (7,)), (Storage(dtype="bfloat16"), 0, (12,))],
)
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, storage, lead, moments):
    straight = Training(storage, lead)
    straight.run(STEPS, {at: tmp_path / str(at) for at in moments})
    assert [event.step for event in straight.freezer.events] == [at + lead for at in list(SETS)[1:]]
    assert straight.step.cache is not None
    expected = straight.arrays()
    for at in moments:
        again = Training(storage, lead)
        again.freezer.restore(tmp_path / str(at))
        again.run(STEPS)
        assert_same_bits(again.arrays(), expected)
    if len(moments) > 1:
        straight.freezer.restore(tmp_path / str(moments[0]))  # back to parameters that what is stored is not of
        straight.run(STEPS)
        assert_same_bits(straight.arrays(), expected)
