"""What a figure is measured from: a queue, most valuable first, that goes on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from research import json_lines
from research.json_lines import Row
from research.reproduce.figures import gradients, similarity
from research.reproduce.figures.setups import (
    GRADIENT_STEPS,
    GRADIENTS,
    MEMORY,
    MEMORY_POLICIES,
    SIMILARITIES,
)
from research.reproduce.plans import Scale, Setup
from research.reproduce.runs import PaperRun, finished, row_of
from train.options import parse

FIGURES = ("figure3", "figure4", "figure5")


class Folders(NamedTuple):
    """Where things are.

    Attributes:
        out: Folder for unfinished runs.
        data: Data directory of TFDS.
        weights: Folder of published weights.
    """

    out: Path
    data: Path
    weights: Path


class Measurement(NamedTuple):
    """One row of results.

    Attributes:
        figure: Name of the figure.
        scale: ``cpu`` or ``paper``.
        run: What is trained.
    """

    figure: str
    scale: Scale
    run: PaperRun

    @property
    def key(self) -> tuple[str, ...]:
        """By which its row is known."""
        return self.figure, self.scale, *self.run.key[:3]

    def measure(self, folders: Folders) -> dict[str, Any]:
        """Its row.

        Raises:
            FileNotFoundError: If data or weights are not there.
            ValueError: If options do not fit.
            FloatingPointError: If the training diverges.
            InterruptedRunError: If it was interrupted.
        """
        out = folders.out / f"{self.figure}-{self.scale}"
        key = dict(zip(("figure", "scale", "network", "data", "method"), self.key, strict=True))
        if self.figure == "figure5":
            return row_of(self.run, finished(self.run, out, folders.data, folders.weights)) | key
        options = parse(self.run.options(out, folders.data, folders.weights))
        if self.figure == "figure3":
            return key | gradients.measure(options, GRADIENT_STEPS[self.scale])
        again = self.run._replace(seed=self.run.seed + 1)
        finished(again, out, folders.data, folders.weights)
        return key | similarity.measure(options, out / again.folder / "model.safetensors")


def measurements(figures: Sequence[str], scale: Scale) -> Iterator[Measurement]:
    """All that figures are made of on a scale."""
    setups: dict[str, tuple[Setup, ...]] = {
        "figure3": GRADIENTS[scale], "figure4": SIMILARITIES[scale], "figure5": MEMORY[scale]
    }  # fmt: skip
    for figure in figures:
        policies = MEMORY_POLICIES if figure == "figure5" else {"Full": ("--policy", "never")}
        for method, policy in policies.items():
            for setup in setups[figure]:
                yield Measurement(figure, scale, PaperRun(setup, method, policy, 0))


def missing(figures: Sequence[str], scale: Scale, rows: Sequence[Row]) -> Iterator[Measurement]:
    """Those that there is no row of."""
    done = {tuple(row[name] for name in ("figure", "scale", "network", "data", "method")) for row in rows}
    return (one for one in measurements(figures, scale) if one.key not in done)


def work(
    figures: Sequence[str],
    scale: Scale,
    folders: Folders,
    *,
    results: Path,
    minutes: float,
    say: Callable[[str], object],
) -> int:
    """Measures what is missing until the time is up; returns the exit code.

    What has begun is not stopped for the time.
    """
    deadline = time.monotonic() + 60 * minutes
    tried: dict[tuple[str, ...], bool] = {}  # whether it failed
    while time.monotonic() < deadline:
        rows = json_lines.read(results, dict)
        one = next((one for one in missing(figures, scale, rows) if one.key not in tried), None)
        if one is None:
            break
        say(f"{' '.join(one.key)}: begins")
        try:
            json_lines.append(results, one.measure(folders))
            tried[one.key] = False
        except (OSError, ValueError, FloatingPointError) as error:  # weights may be missing for one network alone
            say(f"{' '.join(one.key)}: {error}")
            tried[one.key] = True
    return 2 if any(tried.values()) else 0
