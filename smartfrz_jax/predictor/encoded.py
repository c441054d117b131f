"""An observation in the form in which a predictor reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flax import struct

from smartfrz_jax.predictor.context import encode_context
from smartfrz_jax.predictor.encoding import Encoding, encode_records
from smartfrz_jax.predictor.observation import Observation

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class Encoded(struct.PyTreeNode):
    """What goes into a predictor, before it is brought to a common scale; with a leading axis, many examples.

    Attributes:
        records: Records as :func:`~smartfrz_jax.predictor.encoding.encode_records` gives them, float32 of shape
            ``(window, width)``.
        mask: Which of them exist, shape ``(window,)``.
        context: Numbers of :func:`~smartfrz_jax.predictor.context.encode_context`, float32 of shape ``(c,)``.
        known: Which of them are known, shape ``(c,)``.
    """

    records: Float[Array, "*batch window width"]
    mask: Bool[Array, "*batch window"]
    context: Float[Array, "*batch c"]
    known: Bool[Array, "*batch c"]


def encode(encoding: Encoding, observation: Observation) -> Encoded:
    """One layer's observation in the form that a predictor reads.

    Args:
        encoding: The form.
        observation: What is known of the layer.
    """
    return Encoded(*encode_records(encoding, observation), *encode_context(encoding, observation))
