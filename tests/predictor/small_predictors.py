"""Small predictors and records."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smartfrz_jax import Predictor
from smartfrz_jax.predictor import PredictorConfig
from smartfrz_jax.predictor.encoding import PAPER, Encoding

SMALL = PredictorConfig(size=12, hidden=10, features=6, head_hidden=5, encoding=PAPER)
ENCODINGS = {
    "raw, no context": PAPER,
    "raw": Encoding("raw", regime=False),
    "scale-free": Encoding(),
    "scale-free, records": Encoding(context_in="records"),
    "scale-free, classifier": Encoding(context_in="classifier"),
    "scale-free, no context": dataclasses.replace(PAPER, weights="scale_free"),
    "context": Encoding("none"),
    "some context": Encoding("none", regime=("displacement", "loss_level")),
}


def records_of(*shape: int) -> jax.Array:
    """The same for every call, so that no test depends on which ran before it."""
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), jnp.float32)


def predictor_with_biases(config: PredictorConfig, seed: int = 0) -> Predictor:
    """As initialised the biases are zero, and an error in their use would not show."""
    predictor = Predictor(config, rngs=nnx.Rngs(seed))
    state = nnx.state(predictor)
    nnx.update(predictor, jax.tree.map(lambda w: w + 0.1 * jnp.abs(records_of(*w.shape)), state))
    return predictor
