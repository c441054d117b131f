"""Runs of strategies that differ in one thing: in the moments of layers that return, or in kept activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from research.long_runs.__main__ import figure_of
from research.long_runs.strategies import CACHED, KEPT

Result = Mapping[str, Any]
Pairs = dict[tuple[str, str], list[tuple[Result, Result]]]

_STILL = 1.3  # wall time over processor time of the steps, above which a run stood still for other work

_MOMENTS = """\
## Fresh or kept moments

Layers that take turns return with fresh moments, or with those that they had. Both runs of a pair have one seed, one
learning rate (that of `never`) and the same sets at the same steps. *Kept less fresh* is the mean over the pairs with
its standard error.

| case | strategy | seeds | figure, fresh | kept | kept less fresh | loss, fresh | kept | kept less fresh |
|---|---|--:|--:|--:|--:|--:|--:|--:|
"""

_ACTIVATIONS = """\
## Kept activations

Runs that keep the activations of their frozen front, as shares of those of the same seed that keep none; *points* is
the difference in the case's figure. The ten epochs were run at commit 00ef64d; before it, computing activations took
more of the processor's time.

| case | strategy | seeds | FLOPs | processor | points |
|---|---|--:|--:|--:|--:|
"""


def stood_still(row: Result) -> bool:
    """Whether a run had to wait for other work on the machine, so that its times tell nothing."""
    return row["train_seconds"] > _STILL * row["train_cpu_seconds"]


def pairs_of(results: Iterable[Result], mark: str) -> Pairs:
    """Runs of which the name of one strategy has a mark and what is behind it more, by case and that name.

    Args:
        results: All results.
        mark: The mark, such as ``,kept``.

    Returns:
        Pairs of the run without and the run with it, of one seed.
    """
    runs = {(row["case"], row["strategy"], row["seed"]): row for row in results}
    pairs: Pairs = {}
    for (case, strategy, seed), run in sorted(runs.items()):
        name, found, _ = strategy.partition(mark)
        if found and (other := runs.get((case, name, seed))) is not None:
            pairs.setdefault((case, strategy), []).append((other, run))
    return pairs


def moments(results: Iterable[Result]) -> str:
    """A section on strategies that were run with fresh and with kept moments; empty if there are none."""
    rows = [
        f"| {case} | {strategy.removesuffix(KEPT)} | {len(found)} | {_compared(found, figure_of(found[0][0]), 100, 2)} "
        f"| {_compared(found, 'loss', 1, 4)} |"
        for (case, strategy), found in pairs_of(results, KEPT).items()
    ]
    return _MOMENTS + "\n".join(rows) + "\n" if rows else ""


def kept_activations(results: Iterable[Result]) -> str:
    """A section on strategies that were run with and without kept activations; empty if there are none."""
    rows = []
    for (case, strategy), found in pairs_of(results, CACHED).items():
        figure = figure_of(found[0][0])
        flops = np.mean([kept["flops"] / plain["flops"] for plain, kept in found])
        points = 100 * np.mean([kept[figure] - plain[figure] for plain, kept in found])
        timed = [pair for pair in found if not any(map(stood_still, pair))]
        cpu = [kept["train_cpu_seconds"] / plain["train_cpu_seconds"] for plain, kept in timed]
        processor = f"{np.mean(cpu):.2f}" if cpu else "-"
        rows.append(f"| {case} | {strategy} | {len(found)} | {flops:.2f} | {processor} | {points:+.2f} |")
    return _ACTIVATIONS + "\n".join(rows) + "\n" if rows else ""


def _compared(pairs: Sequence[tuple[Result, Result]], name: str, factor: float, digits: int) -> str:
    one, other = factor * np.array([[run[name] for run in pair] for pair in pairs]).T
    difference = other - one
    text = f"{one.mean():.{digits}f} | {other.mean():.{digits}f} | {difference.mean():+.{digits}f}"
    if len(pairs) > 1:
        text += f" ± {difference.std(ddof=1) / np.sqrt(len(pairs)):.{digits}f}"
    return text
