"""Linear centered kernel alignment (CKA): how similar two layers' outputs are on the same examples.

Paper, Eq. 5; Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019 (arXiv 1905.00414). With
features ``X`` and ``Y`` centred over the examples,

    CKA(X, Y) = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


def linear_cka(x: Float[Array, "examples ..."], y: Float[Array, "examples ..."]) -> Float[Array, ""]:
    """Linear CKA of two sets of features of the same examples, computed in float32.

    Works under ``jax.jit`` and ``jax.vmap``. The result does not change if either side is shifted, scaled or rotated.

    Args:
        x: Features, shape ``(examples, ...)``; all axes but the first are flattened.
        y: Features of the same examples; there may be more or fewer of them than in ``x``.

    Returns:
        float32 scalar from 0 to 1. It is 0 if either side is the same for all examples, as no similarity can be shown
        then. Where a feature is NaN or infinite it is NaN under ``jax.jit`` and ``jax.vmap``, and an error elsewhere.

    Raises:
        TypeError: If one is no array of real numbers.
        ValueError: If the numbers of examples differ or are below 2, there are no features, or one is not finite.

    Example:
        >>> x = jnp.array([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
        >>> round(float(linear_cka(x, 5.0 * x[:, ::-1] + 7.0)), 4)
        1.0
    """
    _check(x, y, "x", "y")
    similarity = _linear_cka(x, y)
    if not isinstance(similarity, Tracer) and jnp.isnan(similarity):
        _refuse_infinite({"x": x, "y": y})
    return similarity


def layer_cka(features: Mapping[str, Array], reference: Mapping[str, Array]) -> Float[Array, " layers"]:
    """Linear CKA of every layer with the same layer of a reference network, in one compiled call.

    Args:
        features: Output of each layer on a batch, shape ``(examples, ...)``, by layer name.
        reference: Output of the same layers of the reference network on the same batch.

    Returns:
        float32 of shape ``(layers,)``, in the order of ``features``.

    Raises:
        TypeError: If one is no mapping to arrays of real numbers.
        ValueError: If the two have different layers, or a layer's outputs do not fit (see :func:`linear_cka`).
    """
    similarity = layer_similarity(features, reference)
    if not isinstance(similarity, Tracer) and jnp.isnan(similarity).any():
        for argument, outputs in (("features", features), ("reference", reference)):
            _refuse_infinite({f"{argument}[{name!r}]": x for name, x in outputs.items()})
    return similarity


def layer_similarity(features: Mapping[str, Array], reference: Mapping[str, Array]) -> Float[Array, " layers"]:
    """As :func:`layer_cka`, without waiting for the result: NaN for a layer with outputs that are NaN or infinite."""
    for argument, outputs in (("features", features), ("reference", reference)):
        checks.by_name(outputs, argument, "a dict from layer names to outputs")
    for argument, missing in (
        ("reference", [name for name in features if name not in reference]),
        ("features", [name for name in reference if name not in features]),
    ):
        if missing:
            raise ValueError(
                f"{argument}: lacks the output of {len(missing)} layer(s): {', '.join(map(repr, missing))}; "
                "pass the outputs of the same layers of both networks"
            )
    if not features:
        raise ValueError("features: got no layers; pass the output of each layer by layer name")
    for name, x in features.items():
        _check(x, reference[name], f"features[{name!r}]", f"reference[{name!r}]")
    return _layer_cka(tuple(features.values()), tuple(reference[name] for name in features))


def layer_gram(features: Mapping[str, Array]) -> Float[Array, "layers pairs"]:
    """What is left of every layer's outputs for CKA with any other: scalar products of these vectors are linear CKAs.

    A layer's vector is the upper triangle of ``K / ||K||_F``, where ``K = X X^T`` is the Gram matrix of its centred
    outputs, with the off-diagonal elements times the square root of 2, as each stands for two. It has
    ``examples * (examples + 1) / 2`` elements, however wide the layer is, so a layer's outputs at many moments can be
    kept and compared later.

    Args:
        features: Output of each layer on a batch, shape ``(examples, ...)``, by layer name.

    Returns:
        float32 of shape ``(layers, examples * (examples + 1) / 2)``, in the order of ``features``. A layer whose output
        is the same for all examples has zeros, as in :func:`linear_cka`.

    Raises:
        ValueError: If there are no layers, or a layer has fewer than 2 examples, another number than the first, or no
            features.

    Example:
        >>> x = jnp.array([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
        >>> grams = layer_gram({"a": x, "b": 5.0 * x[:, ::-1] + 7.0})
        >>> round(float(grams[0] @ grams[1]), 4)
        1.0
    """
    checks.by_name(features, "features", "a dict from layer names to outputs")
    if not features:
        raise ValueError("features: got no layers; pass the output of each layer by layer name")
    first, *_ = features
    for name, x in features.items():
        _check(x, features[first], f"features[{name!r}]", f"features[{first!r}]")
    return _layer_gram(tuple(features.values()))


def _refuse_infinite(features: Mapping[str, Any]) -> None:
    for name, x in features.items():
        if not jnp.isfinite(x).all():
            raise ValueError(
                f"{name}: not finite, expected features without NaN and infinity; if the training diverged, go back to "
                "an earlier checkpoint or lower the learning rate"
            )


def _check(x: Any, y: Any, x_name: str, y_name: str) -> None:
    for name, array in ((x_name, x), (y_name, y)):
        checks.numbers(array, name, "an array of real numbers, of shape (examples, ...)")
    x, y = x.shape, y.shape
    for name, shape in ((x_name, x), (y_name, y)):
        if not shape or shape[0] < 2 or 0 in shape[1:]:
            raise ValueError(
                f"{name}: got shape {shape}, expected (examples, ...) with at least 2 examples and 1 feature"
            )
    if x[0] != y[0]:
        raise ValueError(
            f"{x_name}, {y_name}: got {x[0]} and {y[0]} examples (shapes {x} and {y}), expected as many; "
            "compute both on the same batch"
        )


def stabilised(
    cka: Float[np.ndarray, "records layers"], *, window: int = 5, tolerance: float = 0.02
) -> Bool[np.ndarray, "records layers"]:
    """Has the curve been flat lately? Needs no hindsight, so a policy can ask it while the network trains.

    Args:
        cka: CKA of every layer at every record.
        window: Number of records, this one included, that are looked at.
        tolerance: Largest difference between two of them.

    Returns:
        Shape ``(records, layers)``; false for the first ``window - 1`` records. It may become false again.

    Raises:
        ValueError: If ``cka`` is not a finite matrix, ``window`` is below 2 or ``tolerance`` below 0.
    """
    cka = check_curves(cka, window, tolerance)
    flat = np.zeros(cka.shape, bool)
    if len(cka) >= window:
        windows = np.lib.stride_tricks.sliding_window_view(cka, window, axis=0)
        flat[window - 1 :] = np.ptp(windows, axis=-1) <= tolerance
    return flat


def check_curves(cka: Any, window: int, tolerance: float) -> np.ndarray:
    """CKA as a float64 matrix; raises ``ValueError`` unless it, and what is asked of it, is in order."""
    cka = checks.array(cka, "cka", "a matrix (records, layers) of numbers").astype(np.float64)
    if cka.ndim != 2 or not len(cka) or not np.isfinite(cka).all():
        raise ValueError(
            f"cka: got shape {cka.shape}, {int((~np.isfinite(cka)).sum())} values not finite; "
            "expected (records, layers), all finite"
        )
    check_flatness(window, tolerance)
    return cka


def check_flatness(window: int, tolerance: float) -> None:
    """Raises ``ValueError`` unless a window and a tolerance say what a flat curve is."""
    checks.count(window, "window", least=2)
    checks.between(tolerance, "tolerance", "a difference in CKA of 0 or more", 0, np.inf)


@jax.jit
def _layer_cka(features: tuple[jax.Array, ...], reference: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack([_linear_cka(x, y) for x, y in zip(features, reference, strict=True)])


@jax.jit
def _layer_gram(features: tuple[jax.Array, ...]) -> jax.Array:
    examples = features[0].shape[0]
    rows, columns = np.triu_indices(examples)
    weight = np.where(rows == columns, 1.0, np.sqrt(2.0)).astype(np.float32)
    vectors = []
    for x in map(_normalised, features):
        vector = _product(x, x.T)[rows, columns] * weight
        norm = jnp.sqrt(jnp.sum(jnp.square(vector)))
        vectors.append(vector / jnp.where(norm == 0, 1.0, norm))
    return jnp.stack(vectors)


@jax.jit
def _linear_cka(x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = _normalised(x), _normalised(y)
    n, (p, q) = x.shape[0], (x.shape[1], y.shape[1])
    if n * (p + q) < p * p + p * q + q * q:  # ||Y^T X||_F^2 = <X X^T, Y Y^T>: the same from products over the features
        gram_x, gram_y = _product(x, x.T), _product(y, y.T)
        similarity = jnp.sum(gram_x * gram_y)
    else:
        gram_x, gram_y = _product(x.T, x), _product(y.T, y)
        similarity = jnp.sum(jnp.square(_product(y.T, x)))
    norm = jnp.sqrt(jnp.sum(jnp.square(gram_x))) * jnp.sqrt(jnp.sum(jnp.square(gram_y)))
    return jnp.clip(similarity / jnp.where(norm == 0, 1.0, norm), 0.0, 1.0)


def _normalised(x: jax.Array) -> jax.Array:
    """Features as a centred float32 matrix of Frobenius norm 1, or all zero."""
    x = x.reshape(x.shape[0], math.prod(x.shape[1:])).astype(jnp.float32)
    # First relative to one example: that rounds no more than the spread does, however large the mean, and leaves exact
    # zeros where a feature is constant. Then twice by numbers that neither overflow nor underflow when squared.
    x = x - x[:1]
    x = x - jnp.mean(x, axis=0, keepdims=True)
    largest = jnp.max(jnp.abs(x))
    x = x / jnp.where(largest == 0, 1.0, largest)
    norm = jnp.sqrt(jnp.sum(jnp.square(x)))
    return x / jnp.where(norm == 0, 1.0, norm)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
