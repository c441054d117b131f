"""Whose share in the fall of the loss is below its share in the cost of a step; what frozen layers would have of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Saved = Callable[["Bool[np.ndarray, ' layers']", "Bool[np.ndarray, ' layers']"], float]
"""From the layers that are active, and a front of them, to the share of a step's cost that freezing the front saves."""


class Rule(NamedTuple):
    """What makes a front freeze.

    Attributes:
        saved: What it saves.
        factor: By which that is multiplied.
        errors: Standard errors that are added to its share in the fall of the loss.
    """

    saved: Saved
    factor: float
    errors: float

    def front(
        self,
        gains: Float[np.ndarray, "window layers"],
        active: Bool[np.ndarray, " layers"],
        candidates: Bool[np.ndarray, " layers"],
    ) -> Bool[np.ndarray, " layers"]:
        """The longest front of candidates whose share in the fall is below its share in the cost.

        Args:
            gains: Expected fall of the loss by layer at the last measurements.
            active: The layers that fall and cost are shared by.
            candidates: Those of them that may freeze.
        """
        if not gains[:, active].sum() > 0:
            return np.zeros(len(active), bool)
        share, error = shares(gains, active, candidates)
        for end in reversed(np.flatnonzero(candidates & (share + self.errors * error <= self.factor))):
            front = candidates & (np.arange(len(active)) <= end)
            if share[end] + self.errors * error[end] <= self.factor * self.saved(active, front):
                return front
        return np.zeros(len(active), bool)

    def front_that_returns(
        self,
        gains: Float[np.ndarray, "window layers"],
        frozen: Bool[np.ndarray, " layers"],
        active: Bool[np.ndarray, " layers"],
        candidates: Bool[np.ndarray, " layers"],
    ) -> Bool[np.ndarray, " layers"]:
        """The same, with those of the layers that are frozen for which the errors speak: they are taken off the share.

        Args:
            gains: As of :meth:`front`, with what frozen layers would have.
            frozen: The layers that are frozen now.
            active: As of :meth:`front`, and frozen layers too.
            candidates: Those of them that may freeze.
        """
        if not gains[:, active].sum() > 0:
            return frozen
        stay = self._replace(errors=-self.errors).front(gains, active, candidates)
        return self.front(gains, active, candidates) | (stay & frozen)


def shares(
    gains: Float[np.ndarray, "window layers"],
    active: Bool[np.ndarray, " layers"],
    candidates: Bool[np.ndarray, " layers"],
) -> tuple[Float[np.ndarray, " layers"], Float[np.ndarray, " layers"]]:
    """Share in the gain of the active layers of the candidates up to each layer, and its standard error, float64."""
    of_all = gains[:, active].sum(axis=1, dtype=np.float64)
    of_front = np.cumsum(np.where(candidates, gains, 0.0), axis=1, dtype=np.float64)
    share = of_front.mean(axis=0) / of_all.mean()
    residuals = of_front - share * of_all[:, None]
    return share, residuals.std(axis=0, ddof=1) / np.sqrt(len(gains)) / of_all.mean()


class Signals(NamedTuple):
    """What frozen layers show at the last measurements, the latest last, and trained ones beside it.

    A frozen layer has no update, but gradients. The scalar product of those of two batches is on average the square of
    the expected gradient, to which plain SGD's gain is proportional, by the learning rate. So the rate at which a layer
    turned that into gain, relative to all layers that train, is kept from when it trained last.

    Attributes:
        agreements: Scalar products of each layer's gradient with the one before, float32 of shape
            ``(window, layers)``.
        moved: Whether each layer had an update, shape ``(window, layers)``.
        rates: Gain over agreement of each layer when it trained last, relative to that of all that trained, float32 of
            shape ``(layers,)``.
    """

    agreements: Float[np.ndarray, "window layers"]
    moved: Bool[np.ndarray, "window layers"]
    rates: Float[np.ndarray, " layers"]

    def estimates(
        self, gains: Float[np.ndarray, "window layers"]
    ) -> tuple[Float[np.ndarray, "window layers"], Signals] | None:
        """The gains, with what layers that did not train would have had, and the signals with the rates of the others.

        ``None`` where the layers that train show no common rate above zero.
        """
        gain, agreement = float(gains[self.moved].sum()), float(self.agreements[self.moved].sum())
        if not (gain > 0 and agreement > 0):
            return None
        level = gain / agreement
        signals = self._replace(rates=np.where(self.moved.all(axis=0), self._rates(gains, level), self.rates))
        would = level * signals.rates * self.agreements
        return np.where(self.moved, gains, would).astype(np.float32), signals

    def _rates(self, gains: Float[np.ndarray, "window layers"], level: float) -> Float[np.ndarray, " layers"]:
        """Those of layers with little but noise in their agreements are drawn to the level."""
        noise = self.agreements.std(axis=0, ddof=1, dtype=np.float64) * np.sqrt(len(gains))
        weight = np.maximum(self.agreements.sum(axis=0, dtype=np.float64), 0) + noise
        rates = (gains.sum(axis=0, dtype=np.float64) + level * noise) / np.where(weight > 0, weight, 1) / level
        return np.where(weight > 0, rates, 1).astype(np.float32)
