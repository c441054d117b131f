"""Figure 5: what a train step holds while layers freeze, and when they do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from research.json_lines import Row

if TYPE_CHECKING:
    from jaxtyping import Int


def memory_over_time(row: Row) -> Int[np.ndarray, " steps"]:
    """Bytes that the program of each step holds at its peak.

    Args:
        row: A run, as :func:`research.reproduce.runs.row_of` gives it.
    """
    firsts = [step for step, _, _ in row["memory"]]
    lengths = np.diff([*firsts, row["steps"] + 1])
    return np.repeat([peak for *_, peak in row["memory"]], lengths)


def moments_of(row: Row) -> dict[str, float]:
    """Share of the run after which each layer froze, by name; of those that did."""
    return {name: step / row["steps"] for step, names, _ in row["frozen"] for name in names}
