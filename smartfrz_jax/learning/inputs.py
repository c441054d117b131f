"""Training examples that are encoded once and read many times."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import TYPE_CHECKING, Self

import jax
import numpy as np

from smartfrz_jax.learning.examples import Examples, check_examples
from smartfrz_jax.learning.hiding import Hiding
from smartfrz_jax.predictor.encoded import Encoded, encode
from smartfrz_jax.predictor.encoding import Encoding
from smartfrz_jax.predictor.observation import Observation
from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

_BATCH = 256


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
