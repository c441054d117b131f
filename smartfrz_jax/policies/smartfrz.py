"""SmartFRZ itself (paper, sections 3.1 and 3.4): an attention predictor watches every layer's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smartfrz_jax.history import History
from smartfrz_jax.layers import Layers
from smartfrz_jax.policies.base import Policy, check_count, check_finite, check_fraction, freezable, kept, names_of
from smartfrz_jax.predictor import Predictor, freeze_probability
from smartfrz_jax.tailoring import Tailoring

if TYPE_CHECKING:
    from jaxtyping import Bool

PyTree = Any

_NAME = "smartfrz"


class SmartFrzState(NamedTuple):
    """State of :func:`smartfrz`.

    Attributes:
        tailoring: Positions of the sampled weights. They are saved with the run, not drawn again from the seed, so that
            a run resumed under another version of jax does not mix two samples in one history.
        history: The recent records of every active layer.
        frozen: Which layers are frozen, shape ``(layers,)``.
    """

    tailoring: Tailoring
    history: History
    frozen: Bool[np.ndarray, " layers"]


def smartfrz(
    predictor: Predictor,
    *,
    total_steps: int | None = None,
    record_every: int | None = None,
    evaluate_every: int | None = None,
    window: int = 30,
    size: int | None = None,
    min_records: int | None = None,
    threshold: float = 0.5,
    seed: int = 0,
    keep: Iterable[str] | None = None,
) -> Policy:
    """A policy that freezes each layer when the predictor finds that its recent weights have settled.

    Every ``record_every`` steps it records a fixed random sample of each active layer's weights; every
    ``evaluate_every`` steps it judges each active layer by its own records, independently of the others. A frozen layer
    stays frozen, its records are dropped, and it is not judged again. The predictor is compiled once, for all layers
    together, however many of them are frozen.

    The paper does not say how often to record and to judge; the defaults are this project's.

    Args:
        predictor: The predictor, such as ``Predictor.restore(path)``.
        total_steps: Train steps of the run; only for the defaults below.
        record_every: Train steps between records. Default ``max(1, total_steps // (4 * window))``: the window spans a
            quarter of the run.
        evaluate_every: Train steps between freezing stages. Default ``5 * record_every``.
        window: Records that the predictor sees; 30 in the paper.
        size: Weights sampled per layer; that for which the predictor was made.
        min_records: Records a layer must have before it is judged. Default ``window``.
        threshold: Confidence above which a layer freezes; 0.5 is the argmax of Eq. 4.
        seed: Seed of the sample.
        keep: Names of layers never to freeze; ``None`` keeps the head, ``()`` nothing.

    Returns:
        The policy.

    Raises:
        TypeError: If ``predictor`` is not a :class:`~smartfrz_jax.Predictor`.
        ValueError: If an option is out of range, or no layer could be judged before the run ends; at ``init``, if
            ``keep`` names no layer of the network.
        FloatingPointError: In ``update``, if sampled weights or the predictor's confidence are not finite.

    Example:
        >>> from flax import nnx
        >>> from smartfrz_jax import PredictorConfig, find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> policy = smartfrz(Predictor(PredictorConfig(size=8), rngs=nnx.Rngs(0)), total_steps=1000)
        >>> frozen, state = policy.update(policy.init(layers, params), layers, step=8, params=lambda: params)
        >>> state.history.count.tolist()
        [1, 1]
    """
    if not isinstance(predictor, Predictor):
        raise TypeError(
            f"predictor: got {type(predictor).__name__}, expected a smartfrz_jax.Predictor, such as "
            "Predictor.restore(path)"
        )
    if size is None:
        size = predictor.config.size
    if size != predictor.config.size:
        raise ValueError(
            f"size: got {size}, but the predictor was made for {predictor.config.size} weights per layer; leave size "
            "out, or take a predictor of that size"
        )
    check_count(window, "window")
    if min_records is None:
        min_records = window
    check_count(min_records, "min_records")
    if min_records > window:
        raise ValueError(f"min_records: got {min_records}, expected at most the window, {window}; no more are kept")
    check_fraction(threshold, "threshold")
    record_every, evaluate_every = _periods(total_steps, record_every, evaluate_every, window, min_records)
    keep = kept(keep)

    def init(layers: Layers, params: PyTree) -> SmartFrzState:
        freezable(layers, keep)
        return SmartFrzState(
            Tailoring.create(layers, params, size=size, seed=seed),
            History.create(len(layers), window, size),
            np.zeros(len(layers), bool),
        )

    def update(
        state: SmartFrzState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], SmartFrzState]:
        if step % record_every == 0:
            state = _record(state, layers, params(), step)
        if step % evaluate_every == 0:
            state = _evaluate(state, layers, step)
        return names_of(layers, state.frozen), state

    def _evaluate(state: SmartFrzState, layers: Layers, step: int) -> SmartFrzState:
        records = np.asarray(jax.device_get(state.history.count))
        judged = ~state.frozen & freezable(layers, keep) & (records >= min_records)
        if not judged.any():
            return state
        confidence = np.asarray(jax.device_get(freeze_probability(predictor, *state.history.chronological())))
        check_finite(layers, judged & ~np.isfinite(confidence), what="confidence", policy=_NAME, step=step)
        return state._replace(frozen=state.frozen | (judged & (confidence > threshold)))

    return Policy(init, update)


def _periods(
    total_steps: int | None, record_every: int | None, evaluate_every: int | None, window: int, min_records: int
) -> tuple[int, int]:
    """Steps between records and between freezing stages, with the defaults filled in."""
    if total_steps is not None:
        check_count(total_steps, "total_steps")
    if record_every is None:
        if total_steps is None:
            raise ValueError("record_every: got none; pass it, or total_steps for the default")
        record_every = max(1, total_steps // (4 * window))
    check_count(record_every, "record_every")
    if evaluate_every is None:
        evaluate_every = 5 * record_every
    check_count(evaluate_every, "evaluate_every")
    if evaluate_every < record_every:
        raise ValueError(
            f"evaluate_every: got {evaluate_every}, expected at least record_every, {record_every}; without a new "
            "record the verdict is the same"
        )
    if total_steps is not None and max(min_records * record_every, evaluate_every) > total_steps:
        raise ValueError(
            f"min_records: {min_records} records, one every {record_every} steps, and a freezing stage every "
            f"{evaluate_every} steps do not fit in a run of {total_steps} steps, so nothing would ever freeze; lower "
            "min_records or window, record_every, or evaluate_every"
        )
    return record_every, evaluate_every


def _record(state: SmartFrzState, layers: Layers, params: PyTree, step: int) -> SmartFrzState:
    weights = state.tailoring(params)
    finite = np.asarray(jax.device_get(_rows_finite(weights)))
    check_finite(layers, ~state.frozen & ~finite, what="params", policy=_NAME, step=step)
    return state._replace(history=state.history.record(weights, jax.device_put(~state.frozen)))


@jax.jit
def _rows_finite(weights: jax.Array) -> jax.Array:
    return jnp.isfinite(weights).all(axis=1)
