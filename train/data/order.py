"""Which examples are in the batch of a step: a pure function of the seed and the step."""

from __future__ import annotations

import dataclasses
import functools

import grain
import numpy as np


@dataclasses.dataclass(frozen=True)
class Order:
    """Order of the examples of a split.

    Each epoch is a permutation of its own, which grain computes index by index: nothing is stored, and any step can be
    asked for at once.

    Attributes:
        examples: Examples in the split.
        batch_size: Examples in a batch.
        seed: Seed of the permutations, 0 to 2**32 - 1.
        drop_last: Whether the examples that do not fill a batch are left out at the end of an epoch. Otherwise the last
            batch is filled up with other examples of the epoch, of weight 0.

    Example:
        >>> order = Order(examples=5, batch_size=2, seed=0, drop_last=False)
        >>> order.steps_per_epoch, sorted(int(i) for step in range(3) for i in order(step)[0][: (2, 2, 1)[step]])
        (3, [0, 1, 2, 3, 4])
    """

    examples: int
    batch_size: int
    seed: int = 0
    drop_last: bool = True

    def __post_init__(self):
        for argument in ("examples", "batch_size"):
            if getattr(self, argument) < 1:
                raise ValueError(f"{argument}: got {getattr(self, argument)}, expected at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed}, expected 0 to 2**32 - 1")
        if self.drop_last and self.batch_size > self.examples:
            raise ValueError(
                f"batch_size: got {self.batch_size}, expected at most {self.examples}, the examples of the split, as "
                "the last partial batch is dropped; take smaller batches, or drop_last=False"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(self.examples, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch of a step, counted from 0 over all epochs.

        Returns:
            Indices, int64 of shape ``(batch,)``, and weights, float32 of shape ``(batch,)``.

        Raises:
            ValueError: If ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step: got {step}, expected at least 0; steps count from 0 over all epochs")
        epoch, step = divmod(step, self.steps_per_epoch)
        places, weights = in_order(self.examples, self.batch_size, step)
        return np.array([self._shuffled[epoch * self.examples + int(place)] for place in places], np.int64), weights

    def view(self, step: int, views: int) -> int:
        """Which of so many views of its examples a step has: an epoch has one; 0 if there are none."""
        return step // self.steps_per_epoch % views if views else 0

    @functools.cached_property
    def _shuffled(self) -> grain.MapDataset[int]:
        return grain.MapDataset.range(self.examples).seed(self.seed).shuffle().repeat()


def in_order(examples: int, batch_size: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Batch number ``step`` of the examples one after the other.

    Where the last batch is not full it goes on from example 0, with weight 0.

    Returns:
        Indices, int64 of shape ``(batch,)``, and weights, float32 of shape ``(batch,)``.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return places % examples, (places < examples).astype(np.float32)


def steps_in_order(examples: int, batch_size: int) -> int:
    """Batches that hold every example once."""
    return -(-examples // batch_size)
