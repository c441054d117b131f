"""When should a layer have been frozen? Freeze/keep targets from recorded runs, by several criteria.

Paper, section 3.4: once a layer's CKA with the well-trained reference has stabilised, the target is *freeze*. What
"stabilised" means the paper leaves open: :func:`settled` is with hindsight, ``stabilised`` without. The criteria
:class:`Settled` and :class:`Harmless` ask a whole recording, the second not whether a layer has stopped changing but
what it costs to freeze it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np

from smartfrz_jax.learning.harm import fill
from smartfrz_jax.learning.recording import Recording
from smartfrz_jax.predictor.cka import check_curves, check_flatness, stabilised
from smartfrz_jax.pytrees import checks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Criterion = Callable[[Recording], np.ndarray]


def settled(
    cka: Float[np.ndarray, "records layers"], *, window: int = 5, tolerance: float = 0.02
) -> Bool[np.ndarray, "records layers"]:
    """Has the curve come to its end? With hindsight: for targets.

    A layer has settled at the first record at which its curve has stabilised and from which on, to the end of the
    run, it stays within ``tolerance`` of its final level, the mean of its last ``window`` records. A plateau that the
    curve leaves again does not count. It remains settled from there on, as a frozen layer remains frozen, even where
    the curve then wanders, within ``tolerance`` of the final level, by more than that allows.

    Args:
        cka: CKA of every layer at every record.
        window: Number of records over which the curve must be flat, and whose mean is its final level.
        tolerance: Largest distance from the final level, and largest difference within the window.

    Returns:
        Shape ``(records, layers)``; false for the first ``window - 1`` records.

    Raises:
        ValueError: If ``cka`` is not a finite matrix, ``window`` is below 2 or ``tolerance`` below 0.
    """
    cka = check_curves(cka, window, tolerance)
    near = np.abs(cka - cka[-window:].mean(axis=0)) <= tolerance
    stays = np.logical_and.accumulate(near[::-1], axis=0)[::-1]
    return np.logical_or.accumulate(stays & stabilised(cka, window=window, tolerance=tolerance), axis=0)


@dataclasses.dataclass(frozen=True)
class Settled:
    """Criterion: the layer's CKA has come to its end (:func:`settled`).

    Attributes:
        supervision: ``"cka"``, with a well-trained reference network, as in the paper, or ``"own_cka"``, with the
            network's own end.
        window: Records over which the curve must be flat, and whose mean is its final level.
        tolerance: Largest distance from the final level, and largest difference within the window.
    """

    supervision: Literal["cka", "own_cka"] = "cka"
    window: int = 5
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        checks.choice(self.supervision, "supervision", ("cka", "own_cka"))
        check_flatness(self.window, self.tolerance)

    def __call__(self, recording: Recording) -> Bool[np.ndarray, "records layers"]:
        """True where the layer should be frozen.

        Raises:
            ValueError: If the recording lacks the CKA, or an option is out of range.
        """
        return settled(_of(recording, self.supervision), window=self.window, tolerance=self.tolerance)


@dataclasses.dataclass(frozen=True)
class Harmless:
    """Criterion: freezing all layers up to this one costs at most a small part of the loss that the run began with.

    As a share of the first training loss the tolerance means the same for losses of any unit and for tasks of any
    number of classes. (As a share of what the run gains it would be less than the noise of the measurement in runs that
    gain little.) What was not measured is filled in by :func:`smartfrz_jax.learning.harm.fill`; where that has nothing
    to go by (deeper than the deepest layer that was measured, before the first moment) the layer is kept.

    Attributes:
        supervision: ``"swap_harm"`` or ``"branch_harm"``.
        tolerance: Largest harm, as a share of the first training loss.
    """

    supervision: Literal["swap_harm", "branch_harm"] = "swap_harm"
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        checks.choice(self.supervision, "supervision", ("swap_harm", "branch_harm"))
        checks.between(self.tolerance, "tolerance", "a share of the first training loss, 0 or more", 0, np.inf)

    def __call__(self, recording: Recording) -> Bool[np.ndarray, "records layers"]:
        """True where the layer should be frozen.

        Raises:
            ValueError: If the recording lacks the harm, or its first loss is unknown or not above 0.
        """
        harm = fill(_of(recording, self.supervision), recording.steps, recording.total_steps)
        if not recording.first_loss > 0:
            raise ValueError(
                f"recording: its first_loss is {recording.first_loss}, expected a loss above 0; pass each record its "
                "training loss, or choose a criterion that needs none, such as Settled"
            )
        return np.nan_to_num(harm, nan=np.inf) <= self.tolerance * float(recording.first_loss)


def _of(recording: Recording, supervision: str) -> np.ndarray:
    checks.instance(recording, Recording, "recording", "a smartfrz_jax.learning.Recording")
    array = getattr(recording, supervision)
    if array is None:
        raise ValueError(f"recording: has no {supervision}; record it, or choose a criterion by what was recorded")
    return array
