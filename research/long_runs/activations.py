"""Batches of a run that keeps the activations of its frozen front, and these again after an interruption."""

from __future__ import annotations

from typing import Any

from flax import nnx

import smartfrz_jax as sfj
from research.recordings.sets import Batches


class Feed:
    """What the steps of a run are called with, behind the model and the optimizer: a pure function of the step.

    Where activations are kept, an epoch has one view of every example from the first frozen layer on, and the next
    epoch the next one; until then it is augmented as any run is. Where they are not, every epoch is.

    Args:
        batches: The batches.
        epoch: Steps of an epoch.
        views: Number of views; 0 if nothing is kept.
    """

    def __init__(self, batches: Batches, epoch: int, views: int):
        self._batches, self._epoch, self._views = batches, epoch, views

    def __call__(self, step: int, *, frozen: bool) -> tuple[tuple[Any, ...], dict[str, int]]:
        """Arguments and keyword arguments of a step, counted from 0.

        Args:
            step: The step.
            frozen: Whether some layers are frozen in it.
        """
        if not self._views:
            batch = self._batches(step)
            return (batch.inputs, batch.labels), {}
        view = self.view(step)
        batch = self._batches.view(step, view) if frozen else self._batches(step)
        return (self._batches.indices(step), batch.inputs, batch.labels), {"view": view}

    def view(self, step: int) -> int:
        """Which view of its examples a step has."""
        return step // self._epoch % self._views

    def keep_again(self, step: sfj.nnx.CachedStep, model: nnx.Module, optimizer: Any, begin: int, end: int) -> None:
        """Computes the activations anew that a run had kept before it was interrupted.

        They are no part of the run's sums: there they were counted when the run computed them first. What the frozen
        set before had kept, and the present one would have used later, is computed here, too; no sum has that.

        Args:
            step: The step, just told of the checkpoint.
            model: The model of the checkpoint.
            optimizer: Its optimizer.
            begin: First of the steps whose activations are kept.
            end: The step behind the last of them.
        """
        args, _ = self(begin, frozen=True)
        step.program(model, optimizer, *args)  # makes the cache
        if step.cache is None or step.cache.store is None:
            return
        for number in range(begin, end):
            if not step.cache.store.has(self._batches.indices(number), self.view(number)):
                (indices, *inputs), options = self(number, frozen=True)
                step.cache.fetch(model, indices, *inputs, **options)
