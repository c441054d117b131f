"""Which activations of a batch are still missing, and what they are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from smartfrz_jax.caching.split_loss import Grown
from smartfrz_jax.caching.store import ActivationCache
from smartfrz_jax.pytrees.types import PyTree


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
            for batch in in_parts(np.flatnonzero(self.store.filled[:, view]), size):
                yield view, batch

    def grow_into(self, store: ActivationCache, params: PyTree, size: int) -> None:
        """Computes all activations of which those of the set before are stored, ``size`` at a time."""
        for view, rows in self.batches(size):
            store.put(rows, self.grown(params, self.store.take(rows, view)), view)


class Base(NamedTuple):
    """By way of which activations others are computed.

    Attributes:
        computed: A function of ``(params, inputs, dtype)`` to these.
        grown: From these to the others.
    """

    computed: Callable[..., tuple[jax.Array, ...]]
    grown: Grown


class Part(NamedTuple):
    """Examples of a batch whose activations are computed together.

    Attributes:
        rows: Their places in the batch; some may be in it twice.
        source: What they are computed from; ``None`` for the inputs.
    """

    rows: np.ndarray
    source: Source | None


def missing(store: ActivationCache, source: Source | None, indices: np.ndarray, view: int, size: int) -> list[Part]:
    """What of a batch is to be computed, in parts of one size, as every size is a program with a rounding of its own.

    Args:
        store: What is there.
        source: What is there of the frozen set before.
        indices: Which examples of the data set the batch has.
        view: Which view of them.
        size: Examples in a part.
    """
    absent = ~store.stored(indices, view)
    there = np.zeros_like(absent) if source is None else absent & source.store.stored(indices, view)
    parts = [Part(rows, None) for rows in in_parts(np.flatnonzero(absent & ~there), size)]
    if source is not None and source.needs_no_inputs:
        return parts
    return parts + [Part(rows, source) for rows in in_parts(np.flatnonzero(there), size)]


def in_parts(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows in parts of that size, the last one filled up with rows that are there."""
    parts = -(-len(rows) // size)
    return np.split(np.resize(rows, parts * size), parts) if parts else []
