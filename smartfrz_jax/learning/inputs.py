"""What a predictor reads of training examples: encoded once and read many times, and brought to one scale."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import TYPE_CHECKING, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smartfrz_jax.learning.examples import Examples, Hiding, check_examples
from smartfrz_jax.predictor.context import encode_context
from smartfrz_jax.predictor.encoded import Encoded, encode
from smartfrz_jax.predictor.encoding import Encoding
from smartfrz_jax.predictor.observation import Observation
from smartfrz_jax.predictor.predictor import Predictor, Statistic
from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_BATCH = 256
_MEASURED = 8192  # examples, evenly spaced; more would change nothing
_LEAST_STD = 1e-3  # of numbers around one; less is rounding


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedExamples(Examples):
    """Examples whose observations are encoded already, for predictors of one encoding.

    Training on them takes a fraction of the time, and all folds and seeds can share them. They are held in memory:
    ``window * width`` floats for each, which is too much for raw weights, where there is nothing to be gained.

    Attributes:
        encoding: The encoding.
        encoded: All that were encoded, NumPy arrays with a leading axis of rows.
        row: Which row belongs to each example, int32 of shape ``(n,)``.
    """

    encoding: Encoding
    encoded: Encoded
    row: Int[np.ndarray, " n"]

    def batch(self, indices: Int[np.ndarray, " batch"]) -> tuple[Encoded, Bool[np.ndarray, " batch"]]:
        """Some of the examples.

        Args:
            indices: Which examples.

        Returns:
            What a predictor reads, NumPy arrays with a leading batch axis, and the targets.
        """
        rows = self.row[indices]
        return jax.tree.map(lambda array: array[rows], self.encoded), self.target[indices]

    def select(self, chosen: np.ndarray) -> Self:
        """The examples at some indices, or at which a boolean array of shape ``(n,)`` is true; same arrays."""
        return dataclasses.replace(super().select(chosen), row=self.row[chosen])

    def check(self, encoding: Encoding) -> None:
        """Checks that the examples can be read by a predictor of some encoding.

        Args:
            encoding: Its encoding; where context goes does not matter.

        Raises:
            ValueError: If they cannot.
        """
        if dataclasses.replace(encoding, context_in=self.encoding.context_in) != self.encoding:
            raise ValueError(
                f"examples: are encoded as {self.encoding}, expected {encoding}; encode them again, "
                "encode_examples(examples, predictor.config.encoding)"
            )


def encode_examples(
    examples: Examples, encoding: Encoding, *, hiding: Hiding | None = None, copies: int = 1, seed: int = 0
) -> EncodedExamples:
    """Encodes all observations of some examples.

    Args:
        examples: The examples.
        encoding: The encoding of the predictors that are to read them.
        hiding: What is hidden from each copy, drawn anew for each; default nothing. For training only.
        copies: How often each example occurs; one epoch goes over all of them.
        seed: Seed of what is hidden.

    Returns:
        The examples, all of the first copy first.

    Raises:
        ValueError: If ``copies`` is below 1, the examples are encoded already, or the encoding reads weights that the
            recordings do not hold.

    Example:
        >>> from smartfrz_jax.learning import Recording, make_examples
        >>> run = Recording(
        ...     layers=("a",), steps=np.arange(6), record_every=1, total_steps=6, weights=np.ones((6, 1, 4)),
        ...     start=np.zeros((1, 4)), losses=np.ones(6), first_loss=1.0, cka=np.ones((6, 1)),
        ... )
        >>> encoded = encode_examples(make_examples([run], window=3), Encoding("none"), copies=2)
        >>> len(encoded), encoded.encoded.context.shape
        (4, (4, 22))
    """
    check_examples(examples)
    checks.count(copies, "copies")
    checks.seed(seed)
    if hiding is not None:
        checks.instance(hiding, Hiding, "hiding", "a smartfrz_jax.learning.Hiding, or None to hide nothing")
    examples.check_reads(encoding)
    rng, parts = np.random.default_rng(seed), []
    for _ in range(copies):
        for start in range(0, len(examples), _BATCH):
            chosen = np.arange(start, min(start + _BATCH, len(examples)))
            observation, _ = examples.batch(np.pad(chosen, (0, _BATCH - len(chosen)), mode="edge"))
            if isinstance(observation, Encoded):
                raise ValueError("examples: are encoded already; take those that make_examples gives")
            if hiding is not None:
                observation = hiding(observation, rng)
            encoded, valid = jax.device_get(_encode(encoding, observation)), slice(len(chosen))
            parts.append(jax.tree.map(operator.itemgetter(valid), encoded))
    repeated = examples.select(np.tile(np.arange(len(examples)), copies))
    return EncodedExamples(
        **{field.name: getattr(repeated, field.name) for field in dataclasses.fields(Examples)},
        encoding=encoding,
        encoded=jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts),
        row=np.arange(len(repeated), dtype=np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def _encode(encoding: Encoding, observation: Observation) -> Encoded:
    return jax.vmap(functools.partial(encode, encoding))(observation)


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
