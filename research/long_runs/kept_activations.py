"""Runs that keep the activations of their frozen front, against the same runs without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from research.long_runs.strategies import CACHED

Result = Mapping[str, Any]

_HEAD = """\
## Kept activations

Runs that keep the activations of their frozen front, as shares of those of the same seed that keep none; *points* is
the difference in the case's figure.

| case | strategy | seeds | FLOPs | processor | points |
|---|---|--:|--:|--:|--:|
"""


def kept_activations(results: Iterable[Result], figure_of: Callable[[Result], str]) -> str:
    """A section on strategies that were run with and without; empty if there are none.

    Args:
        results: All results.
        figure_of: From a result to the name of the figure by which its case is judged.
    """
    runs = {(row["case"], row["strategy"], row["seed"]): row for row in results}
    pairs: dict[tuple[str, str], list[tuple[Result, Result]]] = {}
    for (case, strategy, seed), kept in sorted(runs.items()):
        name, _, _ = strategy.partition(CACHED)
        if name != strategy and (plain := runs.get((case, name, seed))) is not None:
            pairs.setdefault((case, strategy), []).append((plain, kept))
    rows = []
    for (case, strategy), found in pairs.items():
        flops, cpu = (
            np.mean([kept[name] / plain[name] for plain, kept in found]) for name in ("flops", "train_cpu_seconds")
        )
        figure = figure_of(found[0][0])
        points = 100 * np.mean([kept[figure] - plain[figure] for plain, kept in found])
        rows.append(f"| {case} | {strategy} | {len(found)} | {flops:.2f} | {cpu:.2f} | {points:+.2f} |")
    return _HEAD + "\n".join(rows) + "\n" if rows else ""
