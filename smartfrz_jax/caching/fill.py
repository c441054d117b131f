"""Which activations of a batch are still missing, and what they are computed from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from smartfrz_jax.caching.split_loss import Grown
from smartfrz_jax.caching.store import ActivationCache


class Source(NamedTuple):
    """What activations are computed from where the frozen set has grown.

    Attributes:
        store: Those of the set before.
        grown: From these to the new ones.
        build_flops: FLOPs that one example of them took.
    """

    store: ActivationCache
    grown: Grown
    build_flops: float

    @property
    def needs_no_inputs(self) -> bool:
        """Whether all that is stored can be gone through at once."""
        return not self.grown.needed

    def batches(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """A view and which of its examples are stored, in batches; of the last one some may be in it twice."""
        for view in range(self.store.filled.shape[1]):
            rows = np.flatnonzero(self.store.filled[:, view])
            count = -(-len(rows) // size)
            for batch in np.split(np.resize(rows, count * size), count) if count else []:
                yield view, batch


class Part(NamedTuple):
    """Examples of a batch whose activations are computed together.

    Attributes:
        rows: Their places in the batch; some may be in it twice.
        source: What they are computed from; ``None`` for the inputs.
    """

    rows: np.ndarray
    source: Source | None


def missing(store: ActivationCache, source: Source | None, indices: np.ndarray, view: int) -> list[Part]:
    """What of a batch is to be computed, in parts of two sizes, as every size is a program.

    Args:
        store: What is there.
        source: What is there of the frozen set before.
        indices: Which examples of the data set the batch has.
        view: Which view of them.
    """
    absent = ~store.stored(indices, view)
    there = np.zeros_like(absent) if source is None else absent & source.store.stored(indices, view)
    parts = [Part(rows, None) for rows in _in_parts(np.flatnonzero(absent & ~there), len(indices))]
    if source is not None and source.needs_no_inputs:
        return parts
    return parts + [Part(rows, source) for rows in _in_parts(np.flatnonzero(there), len(indices))]


def _in_parts(rows: np.ndarray, n: int) -> list[np.ndarray]:
    """Rows, in quarters of a batch, or all at once if they take all four, filled up with rows that are there."""
    quarter = max(2, -(-n // 4))
    parts = -(-len(rows) // quarter)
    if parts * quarter >= n:
        return [rows if len(rows) == n else np.resize(rows, n)]
    return np.split(np.resize(rows, parts * quarter), parts) if parts else []
