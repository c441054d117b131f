"""Learning rates of the strategies: the best in short runs, on sentences that no result is read from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

STEPS = 40  # of a run that only tells how good a rate is
SPLIT = "validation[128:192]"  # what it is judged by
_GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_FIRST = slice(1, 4)
_FIRST_OF_ADAPTERS = slice(3, 6)  # they begin at zero


def tuned_as(name: str) -> str:
    """The strategy whose rate this one takes: with kept moments, that of the same with fresh ones."""
    return name.removesuffix("_kept")


def to_try(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The rates without a result: three, then those beside the best until it is between two others.

    Args:
        rows: The results.
        name: The strategy.
    """
    name = tuned_as(name)
    tried = {row["rate"] for row in rows if row["strategy"] == name and row["tune"]}
    wanted = _GRID[_FIRST_OF_ADAPTERS if name == "lora" else _FIRST]
    if tried.issuperset(wanted):
        place = _GRID.index(best(rows, name))
        wanted = _GRID[max(0, place - 1) : place + 2]
    return [rate for rate in wanted if rate not in tried]


def best(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """The rate with the lowest perplexity.

    Args:
        rows: The results, with all rates of the strategy tried.
        name: The strategy.
    """
    name = tuned_as(name)
    tried = [row for row in rows if row["strategy"] == name and row["tune"]]
    return float(min(tried, key=lambda row: math.inf if row["perplexity"] is None else row["perplexity"])["rate"])
