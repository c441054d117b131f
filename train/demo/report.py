"""What the demo ends with: a table, a picture, and all figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from train.demo.fine_tune import Costs

mpl.use("Agg")

_COLOURS = ("#4d4d4d", "#d1495b")


class Point(NamedTuple):
    """An evaluation.

    Attributes:
        costs: What the run had cost by then.
        accuracy: Share of the test images that is classified right.
    """

    costs: Costs
    accuracy: float


class Run(NamedTuple):
    """One run.

    Attributes:
        way: How it was trained.
        seed: Its seed.
        first: What it had cost after the first step.
        points: Its evaluations, the last one after the last step.
    """

    way: str
    seed: int
    first: Costs
    points: list[Point]

    @property
    def end(self) -> Point:
        """The evaluation after the last step."""
        return self.points[-1]


def table(runs: Sequence[Run]) -> str:
    """A Markdown table with a column for each way; what is saved is against the first.

    Args:
        runs: The runs, those of the first way first.
    """
    by_way = _by_way(runs)
    full = next(iter(by_way.values()))

    def row(name: str, value: Callable[[Run], float], form: str, *, saved: bool = False) -> tuple[str, ...]:
        base = np.mean([value(run) for run in full])
        cells = []
        for several in by_way.values():
            values = [value(run) for run in several]
            spread = f" ± {format(np.std(values, ddof=1), form)}" if len(values) > 1 and np.ptp(values) else ""
            less = f" ({np.mean(values) / base - 1:+.0%})" if saved and several is not full else ""
            cells.append(f"{format(np.mean(values), form)}{spread}{less}")
        return name, *cells

    seeds = len(full)
    rows = [
        (f"{seeds} seeds, mean ± standard deviation" if seeds > 1 else "1 seed", *by_way),
        row("**total time, s**", lambda run: run.end.costs.seconds, ".1f", saved=True),
        row("of it until the first step is done, s", lambda run: run.first.seconds, ".1f"),
        row("accuracy on test images, %", lambda run: 100 * run.end.accuracy, ".1f"),
        row("memory of a step, MB", lambda run: run.end.costs.step_bytes / 1e6, ".0f", saved=True),
        row("memory of kept activations, MB", lambda run: run.end.costs.kept_bytes / 1e6, ".0f"),
        row(f"frozen layers, of {full[0].end.costs.layers}", lambda run: run.end.costs.frozen, ".0f"),
    ]
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    name, *others = widths
    lines = [
        f"| {label:<{name}} | {' | '.join(f'{cell:>{width}}' for cell, width in zip(cells, others, strict=True))} |"
        for label, *cells in rows
    ]
    lines.insert(1, f"|{'-' * (name + 2)}|{'|'.join('-' * (width + 1) + ':' for width in others)}|")
    return "\n".join(lines)


def picture(runs: Sequence[Run], path: Path, title: str) -> None:
    """Draws accuracy against total time, a line for each run.

    Args:
        runs: The runs, those of the first way first.
        path: PNG file to write.
        title: Title of the picture.
    """
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    ends = {}
    for (way, several), colour in zip(_by_way(runs).items(), _COLOURS, strict=True):
        for number, run in enumerate(several):
            seconds = [point.costs.seconds for point in run.points]
            accuracy = [100 * point.accuracy for point in run.points]
            label = way if number == 0 else None
            axes.plot(seconds, accuracy, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
        ends[way] = np.mean([run.end.costs.seconds for run in several])
        axes.axvline(ends[way], color=colour, linestyle=":", linewidth=1.2)
    full, frozen = ends.values()
    axes.annotate(
        "", (frozen, 0.06), (full, 0.06), xycoords=axes.get_xaxis_transform(), arrowprops={"arrowstyle": "->"}
    )
    axes.text((full + frozen) / 2, 0.08, f"{frozen / full - 1:+.0%} time", transform=axes.get_xaxis_transform(),
              ha="center")  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel("total time, seconds: compiling and keeping activations included")
    axes.set_ylabel("accuracy on test images, %")
    axes.set_title(title, fontsize=11, pad=26)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)  # hides no line there
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_json(runs: Sequence[Run], path: Path, settings: Mapping[str, object]) -> None:
    """Writes all figures.

    Args:
        runs: The runs.
        path: File to write.
        settings: What the demo was started with, and where.
    """
    rows = [
        {
            "way": run.way,
            "seed": run.seed,
            "first": run.first._asdict(),
            "points": [point.costs._asdict() | {"accuracy": point.accuracy} for point in run.points],
        }
        for run in runs
    ]
    path.write_text(json.dumps({"settings": settings, "runs": rows}, indent=1, allow_nan=False) + "\n")


def _by_way(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.way, []).append(run)
    return found
