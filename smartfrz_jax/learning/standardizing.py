"""A predictor's inputs over a set of examples, and the scale to which it brings them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smartfrz_jax.learning.examples import Examples
from smartfrz_jax.learning.inputs import EncodedExamples
from smartfrz_jax.predictor.context import encode_context
from smartfrz_jax.predictor.encoded import Encoded
from smartfrz_jax.predictor.encoding import Encoding
from smartfrz_jax.predictor.observation import Observation
from smartfrz_jax.predictor.predictor import Predictor, Statistic

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_MEASURED = 8192  # examples, evenly spaced; more would change nothing
_BATCH = 256
_LEAST_STD = 1e-3  # of numbers around one; less is rounding


def standardized(predictor: Predictor, examples: Examples) -> Predictor:
    """A copy of a predictor that brings its context to mean zero and variance one over the examples.

    Unknown numbers do not count, and one that is always the same is only centred. The paper's predictor takes its
    inputs as they are.

    Args:
        predictor: The predictor.
        examples: The examples, at least one.
    """
    predictor, encoding = nnx.clone(predictor), predictor.config.encoding
    if not nnx.state(predictor, Statistic):
        return predictor
    some = examples.select(np.unique(np.linspace(0, len(examples) - 1, _MEASURED).astype(int)))
    mean, std = mean_and_std(*contexts(encoding, some))
    predictor.context_mean[...] = jnp.asarray(mean, jnp.float32)
    predictor.context_std[...] = jnp.asarray(np.where(std < _LEAST_STD, 1, std), jnp.float32)
    return predictor


def mean_and_std(
    values: Float[np.ndarray, "n c"], known: Bool[np.ndarray, "n c"]
) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Mean and standard deviation of each column over what is known of it; zero where nothing is.

    Args:
        values: The numbers, shape ``(n, c)``.
        known: Which of them are known, shape ``(n, c)``.
    """
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, values, 0).sum(axis=0) / count
    return mean, np.sqrt(np.where(known, (values - mean) ** 2, 0).sum(axis=0) / count)


def contexts(encoding: Encoding, examples: Examples) -> tuple[Float[np.ndarray, "n c"], Bool[np.ndarray, "n c"]]:
    """The context of every example, as :func:`~smartfrz_jax.predictor.context.encode_context` gives it.

    Args:
        encoding: What of it is wanted.
        examples: The examples, at least one.

    Returns:
        The numbers, float64, and which are known, shape ``(n, c)`` each.
    """
    if isinstance(examples, EncodedExamples):
        examples.check(encoding)
    parts = []
    for start in range(0, len(examples), _BATCH):
        chosen = np.arange(start, min(start + _BATCH, len(examples)))
        observation, _ = examples.batch(np.pad(chosen, (0, _BATCH - len(chosen)), mode="edge"))
        parts.append([part[: len(chosen)] for part in jax.device_get(_context_of(encoding, observation))])
    values, known = (np.concatenate(part) for part in zip(*parts, strict=True))
    return values.astype(np.float64), known


@functools.partial(jax.jit, static_argnums=0)
def _context_of(encoding: Encoding, observation: Observation | Encoded) -> tuple[jax.Array, jax.Array]:
    if isinstance(observation, Encoded):
        return observation.context, observation.known
    return jax.vmap(functools.partial(encode_context, encoding))(observation)
