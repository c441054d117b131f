"""SmartFRZ itself (paper, sections 3.1 and 3.4): an attention predictor watches every layer's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import numpy as np

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.layers.select import Selectors, described
from smartfrz_jax.policies.base import (
    MAX_CONSECUTIVE_ERRORS,
    Policy,
    check_finite,
    check_update,
    freezable,
    kept,
    names_of,
)
from smartfrz_jax.policies.smartfrz_state import SmartFrzState
from smartfrz_jax.predictor.predictor import Predictor, check_trained, freeze_probability
from smartfrz_jax.predictor.probe import PROBE_DEPTHS, Probe, check_probe
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree

Order = Literal["front_to_back", "any"]

_NAME = "smartfrz"

# Fewer say little about movement; the predictors are trained on windows with at least so many.
_LEAST_RECORDS = 5


def smartfrz(
    predictor: Predictor,
    *,
    total_steps: int | None = None,
    caution: float = 0.95,
    order: Order = "front_to_back",
    patience: int = 2,
    record_every: int | None = None,
    evaluate_every: int | None = None,
    window: int = 30,
    size: int | None = None,
    min_records: int | None = None,
    probe: Probe | None = None,
    first_probe: int | None = None,
    probe_depths: int = PROBE_DEPTHS,
    max_consecutive_errors: int = MAX_CONSECUTIVE_ERRORS,
    seed: int = 0,
    keep: Selectors | None = None,
) -> Policy:
    """A policy that freezes each layer when the predictor finds that it is ready.

    Every ``record_every`` steps it records a fixed random sample of each active layer's weights, unless the predictor
    reads none (as that of ``Predictor.pretrained()``), and the mean of the training loss, if the loop passes that. At a
    freezing stage, every ``evaluate_every`` steps, the predictor judges each active layer by its own records,
    independently of the others. A frozen layer stays frozen, its records are dropped, and it is not judged again. The
    predictor is compiled once, for all layers together, however many of them are frozen.

    ``caution`` is the knob to turn. On the same training run, the layers that are frozen at any stage with more caution
    are among those that are with less; the same holds of ``patience``.

    With ``probe`` it also measures what the front of the network has contributed so far
    (:mod:`smartfrz_jax.predictor.probe`), for a predictor that reads that: after ``first_probe`` steps, and again
    whenever twice as many are done. This takes up to ``probe_depths + 1`` forward passes each time, so by default 16 in
    a run whose length is given, and keeps a copy of the parameters on the host.

    The paper does not say how often to record and to judge; the defaults are this project's. Its own rule is
    ``caution=0.5, order="any", patience=1``, with its predictor.

    Args:
        predictor: The predictor, such as ``Predictor.pretrained()``.
        total_steps: Train steps of the run; ``None`` for a run without a set end, whose progress the predictor then
            does not know.
        caution: From 0, save more, to 1, never lose: the probability above which the predictor counts as finding a
            layer ready. 0.5 is the argmax of the paper's Eq. 4; at 1 nothing ever freezes.
        order: ``"front_to_back"``: a layer freezes only with all before it frozen, for only then the backward pass
            ends earlier; kept layers are passed over. ``"any"``: each on its own, as in the paper.
        patience: Freezing stages in a row at which a layer must be found ready before it freezes.
        record_every: Train steps between records. Default ``max(1, total_steps // (4 * window))``: the window spans a
            quarter of the run.
        evaluate_every: Train steps between freezing stages. Default ``5 * record_every``.
        window: Records that the predictor sees; 30 in the paper.
        size: Weights sampled per layer; that for which the predictor was made.
        min_records: Records a layer must have before it is judged. Default 5, or the whole window for a predictor on
            raw weights, the paper's.
        probe: From a parameter pytree to the training loss on a batch that is always the same, such as
            :func:`smartfrz_jax.nnx.probe` makes it; ``None`` does not measure, and neither is
            measured what the predictor does not read.
        first_probe: Train steps before the first measurement, a multiple of ``evaluate_every``. Default
            ``2 * evaluate_every``.
        probe_depths: Most depths at which to measure; between them contributions are taken to be linear. The predictor
            must have learned from as many (:func:`smartfrz_jax.predictor.probe.by_policy`).
        max_consecutive_errors: Losses in a row that may be other than finite, as of steps that a loss scale of float16
            skips; they are left out of the record. More end the run, at a record.
        seed: Seed of the sample.
        keep: Layers never to freeze: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` keeps the head, ``()`` nothing.

    Returns:
        The policy.

    Raises:
        TypeError: If ``predictor`` is not a :class:`~smartfrz_jax.Predictor`, or ``probe`` not a function.
        ValueError: If an option is out of range, a weight of the predictor is not finite, or no layer could freeze
            before the run ends; at ``init``, if ``keep`` names no layer of the network; in ``update``, if the loss is
            not a scalar, or the probe's not a finite one.
        FloatingPointError: In ``update``, if sampled weights or the predictor's confidence are not finite, or more
            losses in a row than ``max_consecutive_errors``.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from smartfrz_jax.predictor import PredictorConfig
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> policy = smartfrz(Predictor(PredictorConfig(size=8), rngs=nnx.Rngs(0)), total_steps=1000)
        >>> frozen, state = policy.update(policy.init(layers, params), layers, step=8, params=lambda: params)
        >>> state.history.count.tolist()
        [1, 1]
    """
    check_trained(predictor)
    if size is None:
        size = predictor.config.size
    checks.count(size, "size")
    if size != predictor.config.size:
        raise ValueError(
            f"size: got {size}, but the predictor was made for {predictor.config.size} weights per layer; leave size "
            "out, or take a predictor of that size"
        )
    checks.fraction(caution, "caution")
    checks.choice(order, "order", get_args(Order))
    checks.seed(seed)
    checks.count(patience, "patience")
    checks.count(window, "window")
    if min_records is None:
        min_records = window if predictor.config.encoding.weights == "raw" else min(_LEAST_RECORDS, window)
    checks.count(min_records, "min_records")
    if min_records > window:
        raise ValueError(f"min_records: got {min_records}, expected at most the window, {window}; no more are kept")
    record_every, evaluate_every = _periods(total_steps, record_every, evaluate_every, window)
    if total_steps is not None:
        _check_fits(total_steps, record_every, evaluate_every, min_records, patience)
    check_probe(probe)
    if "contribution" not in predictor.config.encoding.regime_names:
        probe = None
    first_probe = 2 * evaluate_every if first_probe is None else first_probe
    checks.count(first_probe, "first_probe")
    checks.count(probe_depths, "probe_depths")
    checks.count(max_consecutive_errors, "max_consecutive_errors", least=0)
    if first_probe % evaluate_every:
        raise ValueError(
            f"first_probe: got {first_probe}, expected a multiple of evaluate_every, {evaluate_every}; it is asked for "
            "at freezing stages only"
        )
    keep = kept(keep)

    def init(layers: Layers, params: PyTree) -> SmartFrzState:
        freezable(layers, keep)
        sampled = size if predictor.config.encoding.reads_weights else None
        return SmartFrzState.create(
            layers, params, window=window, size=sampled, seed=seed, keep_start=probe is not None
        )

    def update(
        state: SmartFrzState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], SmartFrzState]:
        check_update(state, SmartFrzState, layers, step)
        by_hand = signals.get("frozen", ())
        if by_hand:  # else they would hold back the layers behind them
            state = state.replace(frozen=state.frozen | np.array([name in by_hand for name in layers.names]))
        state = state.with_loss(signals.get("loss"))
        if step % record_every == 0:
            state = state.with_record(
                layers, params(), step=step, policy=_NAME, max_consecutive_errors=max_consecutive_errors
            )
        if step % evaluate_every == 0:
            state = evaluate(state, layers, step, params)
        return names_of(layers, state.frozen), state

    def evaluate(state: SmartFrzState, layers: Layers, step: int, params: Callable[[], PyTree]) -> SmartFrzState:
        may_freeze = freezable(layers, keep)
        judged = may_freeze & ~state.frozen
        if state.records < min_records or not judged.any():
            return state
        if probe is not None and step % first_probe == 0 and (step // first_probe).bit_count() == 1:
            state = state.with_contribution(layers, params(), probe, probe_depths)
        recorded = step - step % record_every
        observation = state.observation(np.nan if total_steps is None else min(1.0, recorded / total_steps))
        confidence = np.asarray(jax.device_get(freeze_probability(predictor, observation)))
        check_finite(layers, judged & ~np.isfinite(confidence), what="confidence", policy=_NAME, step=step)
        streak = np.where(judged & (confidence > caution), state.streak + 1, 0).astype(np.int32)
        ready = judged & (streak >= patience)
        if order == "front_to_back":
            ready &= ~np.logical_or.accumulate(judged & ~ready)
        return state.replace(streak=streak, frozen=state.frozen | ready)

    options = {
        "name": _NAME,
        "total_steps": None if total_steps is None else int(total_steps),
        "caution": float(caution),
        "order": order,
        "patience": int(patience),
        "record_every": int(record_every),
        "evaluate_every": int(evaluate_every),
        "window": int(window),
        "size": int(size),
        "min_records": int(min_records),
        "first_probe": None if probe is None else int(first_probe),
        "probe_depths": None if probe is None else int(probe_depths),
        "seed": int(seed),
        "keep": described(keep),
    }
    return Policy(init, update, frozenset(), options)


def _periods(
    total_steps: int | None, record_every: int | None, evaluate_every: int | None, window: int
) -> tuple[int, int]:
    """Steps between records and between freezing stages, with the defaults filled in."""
    if total_steps is not None:
        checks.count(total_steps, "total_steps")
    if record_every is None:
        if total_steps is None:
            raise ValueError("record_every: got none; pass it, or total_steps for the default")
        record_every = max(1, total_steps // (4 * window))
    checks.count(record_every, "record_every")
    if evaluate_every is None:
        evaluate_every = 5 * record_every
    checks.count(evaluate_every, "evaluate_every")
    if evaluate_every < record_every:
        raise ValueError(
            f"evaluate_every: got {evaluate_every}, expected at least record_every, {record_every}; without a new "
            "record the verdict is the same"
        )
    return record_every, evaluate_every


def _check_fits(total_steps: int, record_every: int, evaluate_every: int, min_records: int, patience: int) -> None:
    """Refuses options with which nothing would ever freeze."""
    first_stage = -(-min_records * record_every // evaluate_every)
    if (first_stage + patience - 1) * evaluate_every > total_steps:
        raise ValueError(
            f"min_records, patience: {min_records} records, one every {record_every} steps, and then {patience} "
            f"freezing stage(s), one every {evaluate_every} steps, do not fit in a run of {total_steps} steps, so "
            "nothing would ever freeze; lower min_records, patience, record_every, or evaluate_every"
        )
