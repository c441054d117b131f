"""What a predictor sees of a layer at a moment of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flax import struct

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class Observation(struct.PyTreeNode):
    """A layer's recent weights and where in the run it stands; with a leading axis, many layers or examples.

    Attributes:
        records: Tailored weights, oldest first and newest last, zero where there are none, float32 of shape
            ``(window, size)``.
        mask: True where there is a record, shape ``(window,)``. The newest exists.
        start: The same weights before the first step of the run, float32 of shape ``(size,)``.
        elapsed: Intervals between records since the start of the run, float32 scalar: train steps done divided by the
            steps between records.
        losses: Mean training loss over the interval that ended with each record, float32 of shape ``(window,)``; NaN
            where it is unknown.
        first_loss: Mean training loss over the first interval of the run, float32 scalar; NaN if unknown.
        progress: Train steps done as a share of the whole run, float32 scalar; NaN if its length is unknown.
        depth: Place of the layer, 0 for the first and 1 for the last, float32 scalar.
        contribution: What the layers up to this one have contributed to the fall of the training loss so far, in its
            unit (:mod:`smartfrz_jax.predictor.probe`), float32 scalar; NaN if it was not measured.
    """

    records: Float[Array, "*batch window size"]
    mask: Bool[Array, "*batch window"]
    start: Float[Array, "*batch size"]
    elapsed: Float[Array, "*batch"]
    losses: Float[Array, "*batch window"]
    first_loss: Float[Array, "*batch"]
    progress: Float[Array, "*batch"]
    depth: Float[Array, "*batch"]
    contribution: Float[Array, "*batch"]
