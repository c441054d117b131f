"""Recordings and examples to fit predictors to."""

import jax
import numpy as np
from flax import nnx

from smartfrz_jax import Predictor
from smartfrz_jax.learning.examples import Examples, make_examples
from smartfrz_jax.learning.fitting import SGD
from smartfrz_jax.learning.recording import Recording
from smartfrz_jax.predictor import PredictorConfig
from smartfrz_jax.predictor.encoding import PAPER


def small_predictor(size, seed=0, encoding=PAPER):
    config = PredictorConfig(size=size, hidden=16, features=8, head_hidden=8, encoding=encoding)
    return Predictor(config, rngs=nnx.Rngs(seed))


def arrays(predictor):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(predictor))]


def random_recording(seed, records=7, layers=("a", "b"), size=3):
    """Weights that grow, and a CKA above 0.7 (the target below) late in the run, for the first layer first."""
    rng = np.random.default_rng(seed)
    growth = np.linspace(0.2, 2, records)[:, None, None]
    return Recording(
        layers=layers,
        steps=np.arange(1, records + 1),
        record_every=1,
        total_steps=records,
        weights=(rng.standard_normal((records, len(layers), size)) * growth).astype(np.float32),
        start=rng.standard_normal((len(layers), size)).astype(np.float32),
        losses=rng.uniform(1, 2, records),
        first_loss=2.0,
        cka=np.linspace(0, 1, records)[:, None] * np.linspace(1, 0.8, len(layers)),
        contribution=np.where(np.arange(records)[:, None] % 2, rng.standard_normal((records, len(layers))), np.nan),
    )


def late(recording):
    return recording.cka > 0.7


def random_examples(runs=3, **kwargs) -> Examples:
    recordings = [random_recording(seed, **kwargs) for seed in range(runs)]
    return make_examples(recordings, window=4, min_records=1, criterion=late)


OPTIONS = {"sgd": SGD(epochs=2, learning_rate=0.05), "held_out": None}
