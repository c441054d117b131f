"""Accuracy against compute: a table and a picture for each case, every strategy paired with ``never`` by seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np

from research.trials.result import Result

mpl.use("Agg")
import matplotlib.pyplot as plt

_LOWEST = -8.0  # points; what lost more than that would squeeze all else
_COLOURS = {
    "never": "#222222",
    "smartfrz": "#d1495b",
    "paper": "#e08e79",
    "cka": "#8d6e63",
    "own_cka": "#9ccc65",
    "swap_harm": "#5c6bc0",
    "progress": "#2e6f95",
    "static": "#3a8f5c",
    "shorter": "#c9a227",
    "linear": "#7a5195",
    "autofreeze": "#8c564b",
    "similarity_guided": "#17a2b8",
    "random": "#999999",
}


class Row(NamedTuple):
    """A strategy on a case, over seeds.

    Attributes:
        strategy: Its name.
        seeds: Number of seeds.
        compute: Mean share of the full run's FLOPs.
        compute_cached: The same with the frozen front's activations kept.
        time: Median over seeds of its seconds as a share of those of ``never`` with the same seed.
        accuracy: Mean accuracy, in percent.
        difference: Mean difference to ``never`` with the same seed, in points.
        error: Standard error of that difference; NaN with one seed.
    """

    strategy: str
    seeds: int
    compute: float
    compute_cached: float
    time: float
    accuracy: float
    difference: float
    error: float


def rows(results: Iterable[Result]) -> list[Row]:
    """The strategies of one case, the cheapest last; of those shorter, at each length only the best learning rate.

    The best rate is that which was tried most, so chosen with one of the seeds that are shown, or else the one that
    shows best: both favour shorter schedules.
    """
    by_strategy: dict[str, dict[int, Result]] = {}
    for result in results:
        by_strategy.setdefault(result.strategy, {})[result.seed] = result
    never = by_strategy.get("never", {})
    found = [_row(name, runs, never) for name, runs in by_strategy.items() if runs.keys() & never.keys()]
    tuned: dict[str, Row] = {}
    for row in [row for row in found if row.strategy.startswith("shorter")]:
        length = row.strategy.split(",")[0]
        if length not in tuned or (row.seeds, row.difference) > (tuned[length].seeds, tuned[length].difference):
            tuned[length] = row
    found = [row for row in found if not row.strategy.startswith("shorter") or row in tuned.values()]
    return sorted(found, key=lambda row: -row.compute)


def _row(name: str, runs: dict[int, Result], never: dict[int, Result]) -> Row:
    seeds = sorted(runs.keys() & never.keys())
    differences = 100 * np.array([runs[seed].accuracy - never[seed].accuracy for seed in seeds])
    return Row(
        name,
        len(seeds),
        float(np.mean([runs[seed].compute for seed in seeds])),
        float(np.mean([runs[seed].compute_cached for seed in seeds])),
        float(np.median([runs[seed].seconds / never[seed].seconds for seed in seeds])),
        100 * float(np.mean([runs[seed].accuracy for seed in seeds])),
        float(differences.mean()),
        float(differences.std(ddof=1) / np.sqrt(len(seeds))) if len(seeds) > 1 else float("nan"),
    )


def table(found: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [
        "| strategy | seeds | compute | with kept activations | time | accuracy, % | against never, points |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.strategy} | {row.seeds} | {row.compute:.2f} | {row.compute_cached:.2f} | {row.time:.2f} | "
        f"{row.accuracy:.2f} | {_points(row.difference, row.error)} |"
        for row in found
    ]
    return "\n".join(lines)


def matched(results: Iterable[Result], kind: str = "smartfrz", *, cached: bool = False) -> str:
    """A Markdown table: a kind of strategy less each other kind at the same compute, in points of accuracy.

    What another kind reaches at that compute is taken from the straight line between its two nearest settings, of which
    ``never`` is one, seed by seed; there is nothing below its cheapest setting.

    Args:
        results: The results of one case.
        kind: The kind: the names of its strategies begin with it.
        cached: Whether compute is that with kept activations.
    """
    results = list(results)
    never = {result.seed: result for result in results if result.strategy == "never"}
    by_kind: dict[str, dict[str, dict[int, Result]]] = {}
    for result in results:
        by_strategy = by_kind.setdefault(result.strategy.split(":")[0], {})
        by_strategy.setdefault(result.strategy, {})[result.seed] = result
    shown = {row.strategy for row in rows(results)}
    others = [other for other in by_kind if other not in (kind, "never")]
    lines = [f"| strategy | compute | {' | '.join(f'less {other}' for other in others)} |"]
    lines.append(f"|---|--:|{'--:|' * len(others)}")
    for name, runs in by_kind.get(kind, {}).items():
        cells = []
        for other in others:
            settings = [never, *(of for strategy, of in by_kind[other].items() if strategy in shown)]
            differences = []
            for seed, run in runs.items():
                curve = sorted((_cost(of[seed], cached=cached), of[seed].accuracy) for of in settings if seed in of)
                compute, accuracy = np.array(curve).T if curve else (np.array([np.inf]), np.array([np.nan]))
                if _cost(run, cached=cached) >= compute[0]:
                    differences.append(run.accuracy - np.interp(_cost(run, cached=cached), compute, accuracy))
            cells.append(_mean_and_error(differences) if len(differences) == len(runs) else "-")
        compute = np.mean([_cost(run, cached=cached) for run in runs.values()])
        lines.append(f"| {name} | {compute:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cost(run: Result | Row, *, cached: bool) -> float:
    return run.compute_cached if cached else run.compute


def _mean_and_error(differences: Sequence[float]) -> str:
    points = 100 * np.array(differences)
    error = points.std(ddof=1) / np.sqrt(len(points)) if len(points) > 1 else np.nan
    return _points(float(points.mean()), float(error))


def _points(difference: float, error: float) -> str:
    return f"{difference:+.2f}" if np.isnan(error) else f"{difference:+.2f} +- {error:.2f}"


def picture(found: Sequence[Row], path: Path, title: str) -> None:
    """Draws accuracy against compute, without and with kept activations.

    Settings of one kind are joined, with ``never`` at the end of each line, for that is where a careful enough setting
    comes to. What lost more than is shown stands at the lower edge, with its loss.

    Args:
        found: The strategies of a case.
        path: PNG file to write.
        title: Title of the picture.
    """
    kinds: dict[str, list[Row]] = {}
    for row in found:
        kinds.setdefault(row.strategy.split(":")[0], []).append(row)
    never = kinds.pop("never", [])
    figure, axes = plt.subplots(1, 2, figsize=(15, 6.5), sharey=True, layout="constrained")
    figure.suptitle(title)
    for axis, cached in zip(axes, (False, True), strict=True):
        axis.axhline(0, color="#bbbbbb", linewidth=1, zorder=0)
        for kind, of_kind in kinds.items():
            single = len(of_kind) == 1
            line = sorted(of_kind if single else of_kind + never, key=lambda row: _cost(row, cached=cached))
            axis.errorbar(
                [_cost(row, cached=cached) for row in line],
                [max(row.difference, _LOWEST) for row in line],
                yerr=[np.nan_to_num(row.error) if row.difference > _LOWEST else 0 for row in line],
                fmt="o" if single else "o-",
                linewidth=1,
                color=_COLOURS.get(kind, "#555555"),
                capsize=3,
                label=kind,
            )
            for row in of_kind:
                below = f" ({row.difference:.0f})" if row.difference < _LOWEST else ""
                axis.annotate(
                    (row.strategy.partition(":")[2] or kind) + below,
                    (_cost(row, cached=cached), max(row.difference, _LOWEST)),
                    (4, 5),
                    textcoords="offset points",
                    fontsize=7,
                    color=_COLOURS.get(kind, "#555555"),
                )
        axis.plot(1, 0, "o", color=_COLOURS["never"], label="never")
        axis.set_ylim(bottom=_LOWEST - 0.3)
        axis.set_xlabel("share of the full run's FLOPs" + (", activations of the frozen front kept" if cached else ""))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy against never, points (bars: standard error)")
    axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)
