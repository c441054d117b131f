"""What is hidden from a predictor at random while it learns, so that it also works without."""

from __future__ import annotations

import dataclasses

import numpy as np

from smartfrz_jax.predictor.observation import Observation
from smartfrz_jax.pytrees import checks


@dataclasses.dataclass(frozen=True)
class Hiding:
    """Shares of the examples from which something is hidden, drawn anew at every step of ``fit``.

    Attributes:
        progress: Share whose progress is unknown, as in a run of unknown length.
        losses: Share whose losses are unknown.
        contribution: Share whose contributions are unknown.
        records: Share whose history is cut to a random number of its newest records, as where a policy records less.
        min_records: Least number of records that are left, if there are as many.

    Example:
        >>> Hiding(progress=0.3, records=0.5)
        Hiding(progress=0.3, losses=0.0, contribution=0.0, records=0.5, min_records=5)
    """

    progress: float = 0.0
    losses: float = 0.0
    contribution: float = 0.0
    records: float = 0.0
    min_records: int = 5

    def __post_init__(self) -> None:
        for name in ("progress", "losses", "contribution", "records"):
            checks.between(getattr(self, name), name, "a share of the examples, from 0 to 1", 0, 1)
        checks.count(self.min_records, "min_records")

    def __call__(self, observation: Observation, rng: np.random.Generator) -> Observation:
        """The observations of a batch without what is hidden.

        Args:
            observation: NumPy arrays with a leading batch axis; they are not changed.
            rng: Source of the draws; as many for every batch of a size, whatever the shares.
        """
        checks.instance(observation, Observation, "observation", "a smartfrz_jax.predictor.Observation")
        checks.instance(rng, np.random.Generator, "rng", "a generator, such as numpy.random.default_rng(0)")
        mask = np.asarray(observation.mask)
        # The last row is not read: the draws are those with which the shipped predictors were fitted.
        no_progress, no_losses, cut, left, no_contribution, _ = rng.random((6, len(mask)))
        records = mask.sum(axis=1)
        least = np.minimum(self.min_records, records)
        kept = np.where(cut < self.records, least + (left * (records - least + 1)).astype(int), records)
        newer = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1]  # this record and those after it
        mask = mask & (newer <= kept[:, None])
        lost = no_losses < self.losses
        return observation.replace(
            records=np.where(mask[:, :, None], observation.records, np.float32(0)),
            mask=mask,
            losses=np.where(mask & ~lost[:, None], observation.losses, np.float32("nan")),
            first_loss=np.where(lost, np.float32("nan"), observation.first_loss),
            progress=np.where(no_progress < self.progress, np.float32("nan"), observation.progress),
            contribution=np.where(no_contribution < self.contribution, np.float32("nan"), observation.contribution),
        )
