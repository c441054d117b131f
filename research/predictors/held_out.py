"""A small file of held-out examples: what a predictor reads of them, and the verdict it should come to."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

import smartfrz_jax as sfj
from smartfrz_jax.learning.inputs import EncodedExamples
from smartfrz_jax.predictor.encoded import Encoded


def write(path: Path, examples: EncodedExamples) -> None:
    """Writes examples whose predictor reads no weights, as a NumPy archive.

    Args:
        path: The file to make.
        examples: The examples; of their records only the mask is kept.

    Raises:
        ValueError: If their encoding holds weights, which would make the file large.
    """
    if examples.encoding.weights != "none":
        raise ValueError(f"examples: hold weights ({examples.encoding.weights}), expected an encoding with 'none'")
    encoded, target = examples.batch(np.arange(len(examples)))
    np.savez_compressed(
        path,
        mask=encoded.mask,
        context=encoded.context,
        known=encoded.known,
        target=target,
        moment=sfj.learning.moments(examples),
    )


def judge(path: Path, predictor: sfj.Predictor) -> sfj.learning.Evaluation:
    """Evaluates a predictor on such a file.

    Args:
        path: The file.
        predictor: The predictor.
    """
    with np.load(path) as file:
        records = np.zeros((*file["mask"].shape, 0), np.float32)
        parts = (records, file["mask"], file["context"], file["known"])
        probability = np.asarray(sfj.predictor.freeze_probability(predictor, Encoded(*map(jnp.asarray, parts))))
        return sfj.learning.evaluate(probability, file["target"], groups=file["moment"])
