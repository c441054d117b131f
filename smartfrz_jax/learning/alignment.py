"""How well a layer's outputs tell the labels, and whether they tell them better than when the run began.

The measure is the linear CKA of the outputs with the labels as one-hot vectors, on a batch that is always the same
(centred kernel-target alignment; Cortes, Mohri and Rostamizadeh, 2012, arXiv 1203.0550). Where the front of a network
came ready, its alignment stays as it was while that of the layers behind it rises; where the front still learns the
task, its alignment rises, too. Unlike :mod:`smartfrz_jax.predictor.probe` it asks nothing of layers that have adapted
to the front since. It takes one forward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from smartfrz_jax.predictor.cka import layer_similarity
from smartfrz_jax.predictor.probe import due_records

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def label_alignments(
    features: Mapping[str, Array], labels: Int[np.ndarray, " examples"] | Float[np.ndarray, "examples targets"]
) -> Float[Array, " layers"]:
    """Linear CKA of every layer's outputs with the labels.

    Args:
        features: Output of each layer on a batch, shape ``(examples, ...)``, by layer name, such as
            ``sfj.nnx.features(model, layers, *inputs)(model, *inputs)``.
        labels: Class of each example, integers from 0 of shape ``(examples,)``, or numbers to predict, floats of shape
            ``(examples, ...)``; these may be traced.

    Returns:
        float32 of shape ``(layers,)`` from 0 to 1, in the order of ``features``; 0 if all labels are the same.

    Raises:
        ValueError: If there are no layers, or another number of labels than of examples.
        TypeError: If labels are neither floats nor a vector of integers.

    Example:
        >>> outputs = jnp.array([[0.0, 2.0], [0.0, 2.0], [1.0, 0.0], [1.0, 0.0]])
        >>> label_alignments({"a": outputs}, np.array([0, 0, 1, 1])).round(4).tolist()
        [1.0]
    """
    return layer_similarity(features, dict.fromkeys(features, _targets(labels)))


def _targets(labels: Any) -> jax.Array:
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return jnp.asarray(labels, jnp.float32)
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise TypeError(
            f"labels: got {labels.dtype} of shape {labels.shape}, expected classes (integers of shape (examples,)) or "
            "floats to predict"
        )
    return jnp.asarray(labels[:, None] == np.unique(labels), jnp.float32)


def known_by_policy(measured: Float[np.ndarray, "records layers"]) -> Float[np.ndarray, "records layers"]:
    """What a policy would have known at every record: that last measured when it was due.

    A predictor must learn from no more.

    Args:
        measured: NaN where not measured; of all layers at once.

    Returns:
        Shape ``(records, layers)``; NaN before the first measurement.
    """
    known, due = np.full(measured.shape, np.nan, np.float32), due_records(measured)
    for record, until in itertools.pairwise([*due, len(measured)]):
        known[record:until] = measured[record]
    return known
