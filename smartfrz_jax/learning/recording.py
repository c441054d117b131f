"""A recorded training run, from which the predictor learns; :mod:`.recording_files` keeps such runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SUPERVISION = ("cka", "own_cka", "swap_harm", "branch_harm")

_PARTIAL = ("swap_harm", "branch_harm", "contribution")  # NaN where not measured
# Fields of a recording: arrays, those of them that may be missing, and numbers.
OPTIONAL = (*SUPERVISION, "contribution")
ARRAYS = {"steps": np.int64} | dict.fromkeys(("weights", "start", "losses", *OPTIONAL), np.float32)
SCALARS = {"record_every": int, "total_steps": int, "first_loss": lambda loss: float(np.float32(loss))}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Recording:
    """One training run: weights, losses, and at least one measure of when each layer could have been frozen.

    Attributes:
        layers: Layer names, front to back.
        steps: Train steps done at each record, ``record_every`` apart, int64 of shape ``(records,)``.
        record_every: Train steps between records.
        total_steps: Train steps of the whole run.
        weights: Tailored weights, float32 of shape ``(records, layers, size)``; ``size`` is 0 if they were not kept.
        start: Tailored weights before the first step, float32 of shape ``(layers, size)``.
        losses: Mean training loss over the interval that ended with each record, float32 of shape ``(records,)``; NaN
            where it is unknown.
        first_loss: Mean training loss over the first interval of the run; NaN if unknown.
        cka: CKA of each layer's output with the reference's, float32 of shape ``(records, layers)``, or ``None``.
        own_cka: CKA of each layer's output with its own at the last record, likewise.
        swap_harm: See :func:`smartfrz_jax.learning.harm.swap_harm`, likewise; NaN where it was not measured.
        branch_harm: See :func:`smartfrz_jax.learning.harm.branch_harm`, likewise; NaN where it was not measured.
        contribution: See :func:`smartfrz_jax.predictor.probe.contributions`, likewise; NaN where it was not measured.
        metadata: Anything that JSON can hold: architecture, data set, schedule, seed.

    Raises:
        ValueError: If shapes do not fit, steps are not multiples of ``record_every`` in a row or exceed
            ``total_steps``, all of ``cka``, ``own_cka``, ``swap_harm`` and ``branch_harm`` are missing, a value is
            infinite, or NaN where the above does not allow it, or ``metadata`` is not for JSON.
        TypeError: If an array has a dtype of another kind.
    """

    layers: tuple[str, ...]
    steps: Int[np.ndarray, " records"]
    record_every: int
    total_steps: int
    weights: Float[np.ndarray, "records layers size"]
    start: Float[np.ndarray, "layers size"]
    losses: Float[np.ndarray, " records"]
    first_loss: float
    cka: Float[np.ndarray, "records layers"] | None = None
    own_cka: Float[np.ndarray, "records layers"] | None = None
    swap_harm: Float[np.ndarray, "records layers"] | None = None
    branch_harm: Float[np.ndarray, "records layers"] | None = None
    contribution: Float[np.ndarray, "records layers"] | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def without_weights(self) -> Recording:
        """The same without its tailored weights: of size 0."""
        return dataclasses.replace(self, weights=self.weights[..., :0], start=self.start[..., :0])

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", checks.names(self.layers, "layers"))
        checks.count(self.record_every, "record_every")
        checks.count(self.total_steps, "total_steps", least=0)
        checks.scalar(self.first_loss, "first_loss", "a number, or NaN if it is not known")
        checks.by_name(self.metadata, "metadata", "a dict of what JSON can hold")
        for field, kind in SCALARS.items():
            object.__setattr__(self, field, kind(getattr(self, field)))
        for field, dtype in ARRAYS.items():
            if getattr(self, field) is None and field in OPTIONAL:
                continue
            array = np.asarray(getattr(self, field))
            if not np.can_cast(array.dtype, dtype, "same_kind"):
                raise TypeError(f"{field}: got dtype {array.dtype}, expected {np.dtype(dtype)}")
            object.__setattr__(self, field, array.astype(dtype, copy=False))
        object.__setattr__(self, "metadata", json.loads(_json(self.metadata)))
        self._check_shapes()
        check_steps(self.steps, self.record_every)
        if self.total_steps < self.steps[-1]:
            raise ValueError(
                f"total_steps: got {self.total_steps}, expected at least the last recorded step, {self.steps[-1]}"
            )
        self._check_values()

    def _check_shapes(self) -> None:
        records, layers = len(self.steps) if self.steps.ndim else 0, len(self.layers)
        if not records or not layers or self.steps.ndim != 1:
            raise ValueError(
                f"steps, layers: got steps of shape {self.steps.shape} and {layers} layers, "
                "expected a vector of at least one step and at least one layer"
            )
        if self.weights.ndim != 3 or self.weights.shape[:2] != (records, layers):
            raise ValueError(
                f"weights: got shape {self.weights.shape}, expected ({records}, {layers}, size): "
                f"{records} records of {layers} layers; size 0 if they are not kept"
            )
        expected = {"start": self.weights.shape[1:], "losses": (records,)} | dict.fromkeys(OPTIONAL, (records, layers))
        for field, shape in expected.items():
            array = getattr(self, field)
            if array is not None and array.shape != shape:
                raise ValueError(
                    f"{field}: got shape {array.shape}, expected {shape}, as steps, layers and weights say"
                )
        if all(getattr(self, field) is None for field in SUPERVISION):
            raise ValueError(
                f"{', '.join(SUPERVISION)}: got none of them, expected at least one; without it a recording does not "
                "tell when a layer could have been frozen"
            )

    def _check_values(self) -> None:
        check_finite(self.layers, [0], start=self.start[None])
        check_finite(self.layers, self.steps, weights=self.weights, cka=self.cka, own_cka=self.own_cka)
        for field in _PARTIAL:
            harm = getattr(self, field)
            if harm is not None and (np.isinf(harm).any() or np.isnan(harm).all()):
                raise ValueError(
                    f"{field}: has {int(np.isinf(harm).sum())} infinite and {int(np.isnan(harm).sum())} NaN of "
                    f"{harm.size} values, expected finite numbers, and NaN only where it was not measured; leave it "
                    "out if it was not measured at all"
                )
        if np.isinf(self.losses).any() or np.isinf(self.first_loss):
            raise ValueError(
                "losses, first_loss: one is infinite, expected numbers, or NaN where it is unknown; if the training "
                "diverged, lower its learning rate"
            )


def check_steps(steps: np.ndarray, record_every: int) -> None:
    """Raises unless steps are numbers of train steps, ascending by ``record_every`` from a multiple of it."""
    if steps.dtype.kind not in "iu":
        raise TypeError(f"step: got {steps[-1]!r}, expected an integer, the number of train steps done")
    if record_every < 1:
        raise ValueError(f"record_every: got {record_every}, expected at least 1 train step between records")
    if steps[0] < 0 or steps[0] % record_every:
        raise ValueError(
            f"step: got {steps[0]}, expected a multiple of record_every, {record_every}: the number of train steps done"
        )
    for index in np.flatnonzero(np.diff(steps) != record_every)[:1]:
        raise ValueError(
            f"step: got {steps[index + 1]} after {steps[index]}, expected {steps[index] + record_every}: records are "
            f"record_every, {record_every}, apart; use a new Recorder for a new run"
        )


def check_finite(layers: Sequence[str], steps: Sequence[int] | np.ndarray, **fields: np.ndarray | None) -> None:
    """Raises if a field of shape ``(steps, layers, ...)`` has a value that is NaN or infinite."""
    for field, array in fields.items():
        if array is None:
            continue
        finite = np.isfinite(array).reshape(*array.shape[:2], -1).all(axis=-1)
        for record, layer in np.argwhere(~finite)[:1]:
            raise ValueError(
                f"{field}: not finite for layer {layers[layer]!r} at step {steps[record]}; if the training diverged, "
                "lower its learning rate"
            )


def _json(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata: JSON cannot hold it ({error}); pass numbers, texts, lists and dicts, arrays as lists"
        ) from error
