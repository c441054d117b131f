"""Figures of predictors and controls on held-out runs, one row for each fold and seed, and the table of their means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from research import json_lines

_COLUMNS = ("auc", "run_auc", "moment_auc", "balanced_accuracy", "calibration_error")


class Figures(NamedTuple):
    """What one predictor, or control, reached on one fold.

    Attributes:
        target: Name of the target.
        split: What was held out.
        fold: Which of it.
        variant: Name of the predictor or control.
        seed: Seed of the predictor; 0 for controls.
        n: Held-out examples.
        positives: How many of them are to be frozen.
        auc: Area under the ROC curve.
        run_auc: The same within each run, over its layers and moments: which runs can be frozen earlier than others
            does not count.
        moment_auc: The same across the layers of a run at one moment.
        balanced_accuracy: Mean share decided rightly, of both classes.
        calibration_error: Expected calibration error.
        seconds: Of training.
        stride: Records between moments.
        recordings: Digest of the recordings.
    """

    target: str
    split: str
    fold: str
    variant: str
    seed: int
    n: int
    positives: int
    auc: float
    run_auc: float
    moment_auc: float
    balanced_accuracy: float
    calibration_error: float
    seconds: float
    stride: int
    recordings: str

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Figures:
        """From a JSON object."""
        return cls(**json_lines.with_nan(fields))


def table(figures: Iterable[Figures]) -> str:
    """A Markdown table: means over folds, with the standard deviation of that mean over seeds."""
    lines = [
        "| predictor | seeds | folds | AUC | AUC, within runs | AUC, across layers | balanced accuracy | "
        "calibration error | worst fold |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    by_variant: dict[str, list[Figures]] = {}
    for row in figures:
        by_variant.setdefault(row.variant, []).append(row)
    for variant, rows in by_variant.items():
        seeds, folds = sorted({row.seed for row in rows}), sorted({row.fold for row in rows})
        cells = []
        for column in _COLUMNS:
            means = [finite_mean([getattr(row, column) for row in rows if row.seed == seed]) for seed in seeds]
            spread = f" +- {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
            cells.append(f"{finite_mean(means):.3f}{spread}")
        worst = min((finite_mean([row.auc for row in rows if row.fold == fold]), fold) for fold in folds)
        lines.append(f"| {variant} | {len(seeds)} | {len(folds)} | {' | '.join(cells)} | {worst[0]:.3f} ({worst[1]}) |")
    return "\n".join(lines)


def finite_mean(values: Iterable[float]) -> float:
    """Of those that are finite; NaN if none is."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
