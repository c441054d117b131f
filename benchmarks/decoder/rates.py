"""Learning rates of the strategies: the best of three in short runs, on sentences that no result is read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STEPS = 40  # of a run that only tells how good a rate is
SPLIT = "validation[128:192]"  # what it is judged by
_RATES = (3e-5, 1e-4, 3e-4)
_RATES_OF_ADAPTERS = (3e-4, 1e-3, 3e-3)  # they begin at zero


def candidates(name: str) -> tuple[float, ...]:
    """The rates tried for a strategy."""
    return _RATES_OF_ADAPTERS if name == "lora" else _RATES


def tuned_as(name: str) -> str:
    """The strategy whose rate this one takes: with kept moments, that of the same with fresh ones."""
    return name.removesuffix("_kept")


def to_try(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The rates without a result.

    Args:
        rows: The results.
        name: The strategy.
    """
    name = tuned_as(name)
    tried = {row["rate"] for row in rows if row["strategy"] == name and row["tune"]}
    return [rate for rate in candidates(name) if rate not in tried]


def best(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """The rate with the lowest perplexity.

    Args:
        rows: The results, with all rates of the strategy tried.
        name: The strategy.
    """
    name = tuned_as(name)
    tried = [row for row in rows if row["strategy"] == name and row["tune"]]
    return float(min(tried, key=lambda row: row["perplexity"])["rate"])
