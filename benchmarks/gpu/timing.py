"""Timing several programs in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from benchmarks.gpu.cases import Sizes

Key = TypeVar("Key", bound=Hashable)


class Times(NamedTuple):
    """Milliseconds of a step.

    Attributes:
        median: Over the rounds.
        spread: Interquartile range over the median.
    """

    median: float
    spread: float


def in_turns(runs: Mapping[Key, Callable[[], Any]], sizes: Sizes, wait: Callable[[Any], float]) -> dict[Key, Times]:
    """Times steps, all of them in every round, so that none has the device in another state than another has it.

    Args:
        runs: What makes a step, without waiting for it, and returns its loss.
        sizes: How many rounds, and how many steps in a row in each.
        wait: Waits for a loss, and so for all steps before, and returns it.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for warm_up in (True, *[False] * sizes.rounds):
        for key, run in runs.items():
            wait(run())  # the memory of the others is given back, caches are its own
            start = time.perf_counter()
            for _ in range(sizes.steps - 1):
                run()
            loss = wait(run())
            if not warm_up:
                seconds[key].append((time.perf_counter() - start) / sizes.steps)
            if not np.isfinite(loss):
                raise FloatingPointError(f"{key}: the loss is {loss}")
    return {key: _times(values) for key, values in seconds.items()}


def _times(seconds: list[float]) -> Times:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return Times(1e3 * float(median), float((high - low) / median))
