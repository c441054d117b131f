"""A map of what can be saved: pre-training x epochs, with the policy that saves most at next to no loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from research.json_lines import Row
from research.long_runs.cases import CASES, Case
from research.long_runs.report import lines
from research.reproduce.tables import table
from research.trials.cases import CASES as SHORT_CASES

RAW = Path(__file__).parents[2] / "benchmarks" / "closed_loop" / "tables.md"
_LOSS = 0.2  # points that may be lost
_EPOCHS = (1, 3, 10)
_LEVELS = ("none", "weak", "good", "strong")
_NOTHING = ("-", "-", "-")  # saved, time, points

_HEAD = f"""\
# What can be saved, and in which regime

For every case that was run: the policy that saves most of the compute among those that lose at most {_LOSS} points
against `never` in the mean over seeds, and the same of shorter schedules. *Saved* is a share of the FLOPs of all steps,
*time* of the processor's time for them, which only the long runs have. A standard error above {_LOSS} means that the
case cannot tell; one seed, which has none, cannot either. *None* names the lengths that were run. Sources: the [long
runs](../long_runs/results.md), and the closed loop in `benchmarks/closed_loop/tables.md`, whose runs have few examples.
`python -m research.reproduce` writes this page.
"""


class Point(NamedTuple):
    """A strategy on a case.

    Attributes:
        strategy: Its name.
        compute: Share of the FLOPs of ``never``.
        loss: Difference to ``never``, in points.
        error: Standard error of that; NaN with one seed.
        time: Share of the processor's time of ``never``; NaN where that was not measured.
    """

    strategy: str
    compute: float
    loss: float
    error: float
    time: float = math.nan


class Regime(NamedTuple):
    """A case, and what was run of it.

    Attributes:
        level: How well its network was pre-trained: ``none``, ``weak``, ``good`` or ``strong``.
        case: Its name.
        epochs: Times that every example is seen.
        examples: In words, how many examples it has.
        points: The strategies, without ``never``.
    """

    level: str
    case: str
    epochs: float
    examples: str
    points: tuple[Point, ...]


def regimes(long_runs: Sequence[Row]) -> list[Regime]:
    """All cases, the least pre-trained first."""
    found = []
    for name, case in CASES.items():
        level = level_of(case)
        points = tuple(
            Point(one.strategy, one.flops, one.difference, one.error, one.cpu)
            for one in lines(long_runs, name)
            if one.strategy != "never"
        )
        found.append(Regime(level, name, case.epochs, "all", points))
    for name, (setup, _) in SHORT_CASES.items():
        level = "strong" if setup.pretraining == "published" else setup.pretraining.rpartition(":")[2]
        epochs = setup.steps * setup.batch_size / setup.examples
        found.append(Regime(level, f"{name} (closed loop)", epochs, f"{setup.examples:,}", closed_loop(name)))
    return sorted(found, key=lambda one: (_LEVELS.index(one.level), -one.epochs))


def level_of(case: Case) -> str:
    """How well the network of a case was pre-trained: ``none``, ``weak``, ``good`` or ``strong``."""
    if case.weights is None:
        return "none"
    if case.weights == "published":
        return "strong"
    return "weak" if CASES[case.weights].epochs < 10 else "good"


def closed_loop(case: str) -> tuple[Point, ...]:
    """The strategies of a case in the raw table of the closed loop, without ``never``."""
    _, _, rest = RAW.read_text().partition(f"### {case}\n")
    first = rest.partition("\nAt the same compute")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines() if line[:2] == "| "]
    points = []
    for name, _, compute, *_, points_lost in cells[1:]:
        loss, _, error = points_lost.partition(" +- ")
        if name != "never":
            points.append(Point(name, float(compute), float(loss), float(error or "nan")))
    return tuple(points)


def best(points: Sequence[Point], *, shorter: bool) -> Point | None:
    """What saves most and loses at most 0.2 points: of policies, or of shorter schedules."""
    kind = [point for point in points if point.strategy.startswith("shorter") is shorter]
    return min((point for point in kind if point.loss >= -_LOSS), key=lambda point: point.compute, default=None)


def page(long_runs: Sequence[Row]) -> str:
    """The whole page.

    Args:
        long_runs: Results of :mod:`research.long_runs`.
    """
    every = regimes(long_runs)
    rows = []
    for one in every:
        if one.points:
            cells = (*_cells(one.points, shorter=False), *_cells(one.points, shorter=True))
            rows.append((one.level, one.case, one.examples, f"{one.epochs:.0f}", *cells))
    figures = ("saved", "time", "points")
    head = ("pre-training", "case", "examples", "epochs", "policy", *figures, "shorter", *figures)
    grid = [(level, *(_runs(every, level, epochs) for epochs in _EPOCHS)) for level in _LEVELS]
    wanted = ("pre-training", *(f"epochs: {epochs}" for epochs in _EPOCHS))
    return (
        f"{_HEAD}\n{table(head, rows, text=3)}\n\n## What is still to be run\n\nWhole data sets, by pre-training and "
        f"length: the number of strategies that were run.\n\n{table(wanted, grid, text=1)}\n"
    )


def _cells(points: Sequence[Point], *, shorter: bool) -> tuple[str, ...]:
    if not (kind := [point for point in points if point.strategy.startswith("shorter") is shorter]):
        return "not run", *_NOTHING
    found = best(points, shorter=shorter)
    if found is None:
        lengths = ", ".join(sorted({f"{point.compute:.2f}" for point in kind}))
        return f"none of {lengths}" if shorter else "none", *_NOTHING
    error = " (one seed)" if math.isnan(found.error) else f" ± {found.error:.2f}"
    return f"`{found.strategy}`", _saved(found.compute), _saved(found.time), f"{found.loss:+.2f}{error}"


def _saved(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * (1 - share):.0f} %"


def _runs(every: Sequence[Regime], level: str, epochs: int) -> str:
    found = [one for one in every if (one.level, one.examples) == (level, "all") and round(one.epochs) == epochs]
    run = sum(len(one.points) for one in found)
    return str(run) if run else "not run"
