"""What a predictor must beat: simple rules, fitted on the same examples.

Each control takes the training and the test examples and gives the test examples' freeze probabilities. Another one is
a predictor without weights, ``PredictorConfig(encoding=Encoding(weights="none"))``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from smartfrz_jax.learning.examples import Examples
from smartfrz_jax.learning.fitting import ClassWeights, class_factors
from smartfrz_jax.learning.inputs import contexts, mean_and_std
from smartfrz_jax.predictor.context import context_names
from smartfrz_jax.predictor.encoding import WITHOUT_WEIGHTS, Encoding

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Control = Callable[[Examples, Examples], np.ndarray]

_ALL = Encoding(weights="none")
_WITHOUT_WEIGHTS = Encoding(weights="none", regime=WITHOUT_WEIGHTS)
_ROUNDS = 100


def all_context(examples: Examples) -> Encoding:
    """The encoding of all that controls may read of some examples: less if their recordings hold no weights.

    Args:
        examples: The examples.
    """
    return _ALL if examples.has_weights else _WITHOUT_WEIGHTS


def majority(train: Examples, test: Examples) -> Float[np.ndarray, " n"]:
    """The share of *freeze* among the training examples, for every example.

    Args:
        train: The training examples.
        test: The test examples.
    """
    return np.full(len(test), train.target.mean())


def progress(train: Examples, test: Examples) -> Float[np.ndarray, " n"]:
    """Logistic regression on the share of the run that is done.

    Args:
        train: The training examples.
        test: The test examples.
    """
    return _regression(train, test, ("progress",))


def depth(train: Examples, test: Examples) -> Float[np.ndarray, " n"]:
    """Logistic regression on the place of the layer.

    Args:
        train: The training examples.
        test: The test examples.
    """
    return _regression(train, test, ("depth",))


def progress_and_depth(train: Examples, test: Examples) -> Float[np.ndarray, " n"]:
    """Logistic regression on both: the two-scalar rule.

    Args:
        train: The training examples.
        test: The test examples.
    """
    return _regression(train, test, ("progress", "depth"))


def two_scalar_coefficients(train: Examples) -> tuple[float, float, float]:
    """The regression of :func:`progress_and_depth`, for the policy :func:`smartfrz_jax.progress`.

    Args:
        train: The training examples.

    Returns:
        Intercept, weight of progress and weight of depth.
    """
    fitted = _fitted(train, ("progress", "depth"))
    weights = fitted.weights / fitted.std
    return float(fitted.bias - weights @ fitted.mean), float(weights[0]), float(weights[1])


def update_norm(train: Examples, test: Examples) -> Float[np.ndarray, " n"]:
    """Logistic regression on the log of the layer's mean step relative to its size.

    Args:
        train: The training examples.
        test: The test examples.

    Raises:
        ValueError: If the recordings of either hold no weights.
    """
    train.check_reads(_ALL)
    test.check_reads(_ALL)
    return _regression(train, test, ("step",))


def context(train: Examples, test: Examples) -> Float[np.ndarray, " n"]:
    """Logistic regression on all of the context that a predictor may have (:mod:`smartfrz_jax.predictor.context`).

    Args:
        train: The training examples.
        test: The test examples.

    Raises:
        ValueError: If the recordings of either hold no weights.
    """
    train.check_reads(_ALL)
    test.check_reads(_ALL)
    return _regression(train, test, context_names(_ALL))


CONTROLS: dict[str, Control] = {
    control.__name__: control for control in (majority, progress, depth, progress_and_depth, update_norm, context)
}
READING_WEIGHTS = ("update_norm", "context")
"""Those that need recordings with weights."""


def logistic_regression(
    inputs: Float[np.ndarray, "n d"],
    target: Bool[np.ndarray, " n"],
    *,
    ridge: float = 1e-3,
    class_weights: ClassWeights = "balanced",
) -> Float[np.ndarray, " d+1"]:
    """Weights and bias that minimise the mean cross entropy plus ``ridge / 2`` times the squared norm of the weights.

    Newton's method with halved steps in float64: nothing is drawn, and the minimum is the only one.

    Args:
        inputs: Inputs, best of mean zero and variance one, shape ``(n, d)``.
        target: True or false, shape ``(n,)``; both must occur.
        ridge: Above 0, so that there is a minimum even if the classes can be told apart without error.
        class_weights: As in :func:`~smartfrz_jax.learning.fit`.

    Returns:
        The weights, then the bias.

    Raises:
        ValueError: If ``ridge`` is not above 0, or only one class occurs.

    Example:
        >>> logistic_regression(np.array([[-1.0], [0.0], [1.0]]), np.array([False, True, True])).shape
        (2,)
    """
    if not ridge > 0:
        raise ValueError(f"ridge: got {ridge}, expected a number above 0, such as 1e-3")
    x = np.column_stack([np.asarray(inputs, np.float64), np.ones(len(target))])
    sign, factor = np.where(target, 1.0, -1.0), class_factors(target, class_weights)[target.astype(int)] / len(target)
    penalty = np.full(x.shape[1], ridge)
    penalty[-1] = 0

    def value(w: np.ndarray) -> float:
        return float(factor @ np.logaddexp(0, -sign * (x @ w)) + penalty @ w**2 / 2)

    w = np.zeros(x.shape[1])
    for _ in range(_ROUNDS):
        p = _sigmoid(x @ w)
        gradient = x.T @ (factor * (p - target)) + penalty * w
        curvature = (x.T * (factor * p * (1 - p))) @ x + np.diag(penalty)
        step = np.linalg.lstsq(curvature, gradient, rcond=None)[0]
        if gradient @ step < 1e-20:
            break
        while value(w - step) > value(w):
            step = step / 2
        w = w - step
    return w


class _Fitted(NamedTuple):
    """A logistic regression on standardized numbers."""

    chosen: list[int]
    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray
    bias: float


def _fitted(train: Examples, names: tuple[str, ...]) -> _Fitted:
    encoding = all_context(train)
    chosen = [context_names(encoding).index(name) for name in names]
    values, known = (array[:, chosen] for array in contexts(encoding, train))
    mean, std = mean_and_std(values, known)
    std[std == 0] = 1
    # Without class weights, so that probabilities can be read as such.
    w = logistic_regression(np.where(known, (values - mean) / std, 0), train.target, class_weights=None)
    return _Fitted(chosen, mean, std, w[:-1], float(w[-1]))


def _regression(train: Examples, test: Examples, names: tuple[str, ...]) -> np.ndarray:
    """Probabilities for ``test``; an unknown number is taken for the mean of the training examples."""
    fitted = _fitted(train, names)
    values, known = (array[:, fitted.chosen] for array in contexts(all_context(test), test))
    inputs = np.where(known, (values - fitted.mean) / fitted.std, 0)
    return _sigmoid(inputs @ fitted.weights + fitted.bias)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
