"""SmartFRZ itself (paper, sections 3.1 and 3.4): an attention predictor watches every layer's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.layers.select import Selector, Selectors, described
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
from smartfrz_jax.policies.two_phase import Readings, TwoPhase
from smartfrz_jax.predictor.predictor import Predictor, check_trained, freeze_probability
from smartfrz_jax.predictor.probe import PROBE_DEPTHS, Probe
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree

Order = Literal["front_to_back", "any"]

_NAME = "smartfrz"

# Fewer say little about movement; the predictors are trained on windows with at least so many.
_LEAST_RECORDS = 5


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When :func:`smartfrz` records, and when it judges by the records.

    The paper does not say how often; the defaults are this project's.

    Attributes:
        record_every: Train steps between records. Default ``max(1, total_steps // (4 * window))``: the window spans a
            quarter of the run.
        evaluate_every: Train steps between freezing stages. Default ``5 * record_every``.
        window: Records that the predictor sees; 30 in the paper.
        min_records: Records a layer must have before it is judged. Default 5, or the whole window for a predictor on
            raw weights, the paper's.
        patience: Freezing stages in a row at which a layer must be found ready before it freezes; 1 in the paper.
        max_consecutive_errors: Losses in a row that may be other than finite, as of steps that a loss scale of float16
            skips; they are left out of the record. More end the run, at a record.

    Raises:
        ValueError: If one is out of range.
    """

    record_every: int | None = None
    evaluate_every: int | None = None
    window: int = 30
    min_records: int | None = None
    patience: int = 2
    max_consecutive_errors: int = MAX_CONSECUTIVE_ERRORS

    def __post_init__(self) -> None:
        for name in ("record_every", "evaluate_every", "min_records"):
            if getattr(self, name) is not None:
                checks.count(getattr(self, name), name)
        checks.count(self.window, "window")
        checks.count(self.patience, "patience")
        checks.count(self.max_consecutive_errors, "max_consecutive_errors", least=0)
        if self.min_records is not None and self.min_records > self.window:
            raise ValueError(
                f"min_records: got {self.min_records}, expected at most the window, {self.window}; no more are kept"
            )


@dataclasses.dataclass(frozen=True)
class Probing:
    """How :func:`smartfrz` measures what the front has contributed (:mod:`smartfrz_jax.predictor.probe`).

    Attributes:
        probe: From a parameter pytree to the training loss on a batch that is always the same, such as
            :func:`smartfrz_jax.nnx.probe` makes it.
        first_probe: Train steps before the first measurement, a multiple of ``evaluate_every``. Default
            ``2 * evaluate_every``.
        depths: Most depths at which to measure; between them contributions are taken to be linear. The predictor must
            have learned from as many (:func:`smartfrz_jax.predictor.probe.by_policy`).

    Raises:
        TypeError: If ``probe`` is no function.
        ValueError: If a number is out of range.
    """

    probe: Probe
    first_probe: int | None = None
    depths: int = PROBE_DEPTHS

    def __post_init__(self) -> None:
        expected = "a function from parameters to a loss, such as sfj.nnx.probe(model, loss_fn, *batch)"
        checks.function(self.probe, "probe", expected)
        if self.first_probe is not None:
            checks.count(self.first_probe, "first_probe")
        checks.count(self.depths, "depths")


def smartfrz(
    predictor: Predictor,
    *,
    total_steps: int | None = None,
    caution: float = 0.95,
    order: Order = "front_to_back",
    schedule: Schedule | None = None,
    probe: Probe | Probing | None = None,
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

    With ``probe`` it also measures what the front of the network has contributed so far, for a predictor that reads
    that: after ``first_probe`` steps, and again whenever twice as many are done. This takes up to ``depths + 1``
    forward passes each time, by default 16 in a run whose length is given, and keeps the start's parameters on the
    host.

    The paper's own rule is ``caution=0.5, order="any", schedule=Schedule(patience=1)``, with its predictor.

    Args:
        predictor: The predictor, such as ``Predictor.pretrained()``.
        total_steps: Train steps of the run; ``None`` for a run without a set end, whose progress the predictor then
            does not know.
        caution: From 0, save more, to 1, never lose: the probability above which the predictor counts as finding a
            layer ready. 0.5 is the argmax of the paper's Eq. 4; at 1 nothing ever freezes.
        order: ``"front_to_back"``: a layer freezes only with all before it frozen, for only then the backward pass
            ends earlier; kept layers are passed over. ``"any"``: each on its own, as in the paper.
        schedule: When it records and judges; see :class:`Schedule`.
        probe: The training loss on a fixed batch as a function of the parameters, or :class:`Probing`; ``None`` does
            not measure, and neither is measured what the predictor does not read.
        seed: Seed of the sample of weights.
        keep: Layers never to freeze: names, globs, regular expressions, predicates or NNX filters (see
            :func:`smartfrz_jax.layers.select.select`); ``None`` keeps the head, ``()`` nothing.

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
    times = _times(predictor, total_steps, Schedule() if schedule is None else schedule)
    probing = Probing(probe) if probe is not None and not isinstance(probe, Probing) else probe
    rule = _SmartFrz(
        predictor, total_steps, caution, order, times, _measured(predictor, times, probing), seed, kept(keep)
    )
    return TwoPhase(rule.dispatch, rule.conclude).policy(rule.init, rule.options)


class _Times(NamedTuple):
    """A :class:`Schedule` with the defaults filled in."""

    record_every: int
    evaluate_every: int
    window: int
    min_records: int
    patience: int
    max_consecutive_errors: int


@dataclasses.dataclass(frozen=True, eq=False)
class _SmartFrz:
    """The options of :func:`smartfrz`, and what it does with them."""

    predictor: Predictor
    total_steps: int | None
    caution: float
    order: Order
    times: _Times
    probing: Probing | None
    seed: int
    keep: tuple[Selector, ...] | None

    def __post_init__(self) -> None:
        checks.fraction(self.caution, "caution")
        checks.choice(self.order, "order", get_args(Order))
        checks.seed(self.seed)

    @property
    def options(self) -> dict[str, Any]:
        probing = self.probing
        return {
            "name": _NAME,
            "total_steps": None if self.total_steps is None else int(self.total_steps),
            "caution": float(self.caution),
            "order": self.order,
            "patience": int(self.times.patience),
            "record_every": int(self.times.record_every),
            "evaluate_every": int(self.times.evaluate_every),
            "window": int(self.times.window),
            "size": int(self.predictor.config.size),
            "min_records": int(self.times.min_records),
            "first_probe": probing and probing.first_probe and int(probing.first_probe),
            "probe_depths": probing and int(probing.depths),
            "seed": int(self.seed),
            "keep": described(self.keep),
        }

    def init(self, layers: Layers, params: PyTree) -> SmartFrzState:
        freezable(layers, self.keep)
        config, measures = self.predictor.config, self.probing is not None
        size = config.size if config.encoding.reads_weights else None
        return SmartFrzState.create(
            layers, params, window=self.times.window, size=size, seed=self.seed, keep_start=measures
        )

    def dispatch(
        self, state: SmartFrzState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], SmartFrzState, Readings | None]:
        check_update(state, SmartFrzState, layers, step)
        by_hand = signals.get("frozen", ())
        if by_hand:  # else they would hold back the layers behind them
            state = state.replace(frozen=state.frozen | np.array([name in by_hand for name in layers.names]))
        state, readings = state.with_loss(signals.get("loss")), {}
        if step % self.times.record_every == 0:
            state, readings = state.with_record(layers, params())
        may_judge = step % self.times.evaluate_every == 0 and state.records >= self.times.min_records
        if may_judge and (freezable(layers, self.keep) & ~state.frozen).any():
            if self.probing is not None and _is_doubled(step, self.probing.first_probe):
                self._check_record(state, layers, jax.device_get(readings), step)  # whose cause is told better
                state = state.with_contribution(layers, params(), self.probing.probe, self.probing.depths)
            recorded = step - step % self.times.record_every
            progress = np.nan if self.total_steps is None else min(1.0, recorded / self.total_steps)
            readings["confidence"] = freeze_probability(self.predictor, state.observation(progress))
        return names_of(layers, state.frozen), state, readings or None

    def conclude(
        self, state: SmartFrzState, layers: Layers, readings: Mapping[str, np.ndarray], *, step: int
    ) -> tuple[frozenset[str], SmartFrzState]:
        self._check_record(state, layers, readings, step)
        if "confidence" in readings:
            state = self._judged(state, layers, readings["confidence"], step)
        return names_of(layers, state.frozen), state

    def _check_record(self, state: SmartFrzState, layers: Layers, readings: Mapping[str, Any], step: int) -> None:
        if "finite" in readings:
            most = self.times.max_consecutive_errors
            state.check_record(layers, readings, step=step, policy=_NAME, max_consecutive_errors=most)

    def _judged(self, state: SmartFrzState, layers: Layers, confidence: np.ndarray, step: int) -> SmartFrzState:
        judged = freezable(layers, self.keep) & ~state.frozen
        check_finite(layers, judged & ~np.isfinite(confidence), what="confidence", policy=_NAME, step=step)
        streak = np.where(judged & (confidence > self.caution), state.streak + 1, 0).astype(np.int32)
        ready = judged & (streak >= self.times.patience)
        if self.order == "front_to_back":
            ready &= ~np.logical_or.accumulate(judged & ~ready)
        return state.replace(streak=streak, frozen=state.frozen | ready)


def _is_doubled(step: int, first: int | None) -> bool:
    """Whether a step is the first, or twice the one before, four times, ..."""
    return first is not None and step % first == 0 and (step // first).bit_count() == 1


def _measured(predictor: Predictor, times: _Times, probing: Probing | None) -> Probing | None:
    """What is measured of the front, with the defaults filled in."""
    first_probe = 2 * times.evaluate_every if probing is None or probing.first_probe is None else probing.first_probe
    if first_probe % times.evaluate_every:
        raise ValueError(
            f"first_probe: got {first_probe}, expected a multiple of evaluate_every, {times.evaluate_every}; it is "
            "asked for at freezing stages only"
        )
    if probing is None or "contribution" not in predictor.config.encoding.regime_names:
        return None
    return dataclasses.replace(probing, first_probe=first_probe)


def _times(predictor: Predictor, total_steps: int | None, schedule: Schedule) -> _Times:
    """The schedule of a run, with the defaults filled in."""
    check_trained(predictor)
    checks.instance(schedule, Schedule, "schedule", "a smartfrz_jax.policies.Schedule, or None")
    record_every, evaluate_every = _periods(
        total_steps, schedule.record_every, schedule.evaluate_every, schedule.window
    )
    is_raw, min_records = predictor.config.encoding.weights == "raw", schedule.min_records
    if min_records is None:
        min_records = schedule.window if is_raw else min(_LEAST_RECORDS, schedule.window)
    if total_steps is not None:
        _check_fits(total_steps, record_every, evaluate_every, min_records, schedule.patience)
    return _Times(
        record_every,
        evaluate_every,
        schedule.window,
        min_records,
        schedule.patience,
        schedule.max_consecutive_errors,
    )


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
    if evaluate_every is None:
        evaluate_every = 5 * record_every
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
