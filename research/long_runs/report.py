"""Tables and pictures of the long runs, from their results alone.

python -m research.long_runs.report
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

from research import json_lines
from research.long_runs.__main__ import RESULTS, best_rate, figure_of, tried
from research.long_runs.cases import CASES
from research.long_runs.labels import label
from research.long_runs.pairs import kept_activations, moments, stood_still
from research.long_runs.rehearsal import PLAN, going_by, is_ready
from research.long_runs.run import REHEARSAL
from research.long_runs.strategies import CACHED, STRATEGIES, WITHDRAWN
from train.command_line import local_path
from train.log import write_whole

mpl.use("Agg")
import matplotlib.pyplot as plt

Result = Mapping[str, Any]
# Dark enough to read a label in; a kind of strategy has the same one in all pictures.
_COLOURS = (
    "#222222", "#2e7d32", "#c62828", "#d9690f", "#8d6e00", "#1565c0", "#00838f", "#7a5195", "#8c564b", "#ad1457",
    "#666666",
)  # fmt: skip

_HEAD = """\
# Long runs

Fine-tunings of whole data sets. Every strategy is paired with `never` (full training) of the same seed. *FLOPs* and
*time* are shares of those of `never`; time has the steps, the policy and the waiting for programs in it. *Processor*
is the processor's time for the steps, and for compiling beside them; other work on the machine changes it by up to a
tenth. A run whose steps took over 1.3 times as long stood still for such work: both its times are left out.
*Difference* is the mean over seeds. It and *processor* have their standard errors. Strategies named `,cached` keep the
activations of the frozen front, of up to three fixed views of every augmented image, or two with `,cached:2`;
computing them is counted. `rehearsal` is the strategy that a rehearsal leads to, its price added. `python -m
research.long_runs.report` writes this page from `results.jsonl`.
"""


class Line(NamedTuple):
    """A strategy on a case, over the seeds that it and ``never`` have both finished.

    Attributes:
        strategy: Its name.
        seeds: Number of seeds.
        flops: Mean share of FLOPs.
        time: Mean share of wall time, over the runs that did not stand still; NaN if all did.
        cpu: Mean share of processor time, over the same runs; NaN if there are none.
        cpu_error: Standard error of that; NaN with one of them.
        figure: Mean of the case's figure, in percent.
        difference: Mean difference to ``never``, in points.
        error: Standard error of the difference; NaN with one seed.
        first: Share of the run after which the first layer froze; NaN where none did.
    """

    strategy: str
    seeds: int
    flops: float
    time: float
    cpu: float
    cpu_error: float
    figure: float
    difference: float
    error: float
    first: float


def lines(results: Iterable[Result], case: str) -> list[Line]:
    """The strategies of a case, the most expensive first; pairs start from the same weights."""
    by_strategy: dict[str, dict[int, Result]] = {}
    for row in results:
        if row["case"] == case and row["strategy"] in (*STRATEGIES, *WITHDRAWN, REHEARSAL):
            by_strategy.setdefault(row["strategy"], {})[row["seed"]] = row
    by_strategy |= going_by(by_strategy.pop(REHEARSAL, {}), by_strategy)
    never = by_strategy.get("never", {})
    paired = {
        name: {seed: run for seed, run in runs.items() if seed in never and _start(run) == _start(never[seed])}
        for name, runs in by_strategy.items()
    }
    found = [_line(name, runs, never) for name, runs in paired.items() if runs]
    return sorted(found, key=lambda line: (-line.flops, line.strategy))


def _line(name: str, runs: Mapping[int, Result], never: Mapping[int, Result]) -> Line:
    seeds = sorted(runs)
    pairs = [(runs[seed], never[seed]) for seed in seeds]
    figure = figure_of(pairs[0][0])
    differences = 100 * np.array([run[figure] - full[figure] for run, full in pairs])
    # What makes a run stand still slows the processor, too.
    timed = [(run, full) for run, full in pairs if not (stood_still(run) or stood_still(full))]
    times = [_seconds(run) / _seconds(full) for run, full in timed]
    processor = np.array([run["train_cpu_seconds"] / full["train_cpu_seconds"] for run, full in timed])
    first = [run["frozen"][0][0] / run["steps"] for run, _ in pairs if run["frozen"]]
    return Line(
        name,
        len(seeds),
        float(np.mean([run["flops"] / full["flops"] for run, full in pairs])),
        float(np.mean(times)) if timed else float("nan"),
        float(processor.mean()) if timed else float("nan"),
        _error(processor),
        100 * float(np.mean([run[figure] for run, _ in pairs])),
        float(differences.mean()),
        _error(differences),
        float(np.mean(first)) if first else float("nan"),
    )


def _start(row: Result) -> int | None:
    """Checksum of the weights that a run began with, where another case has trained them."""
    return row.get("config", {}).get("start")


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _seconds(row: Result) -> float:
    return row["train_seconds"] + row["decide_seconds"] + row["wait_seconds"]


def page(results: Sequence[Result]) -> str:
    """The whole page."""
    parts = [_HEAD]
    for case, setup in CASES.items():
        of_case = [row for row in results if row["case"] == case]
        rows = [row for row in of_case if row["strategy"] != REHEARSAL]
        if not rows:
            continue
        runs = tried(results, case)
        figure = figure_of(rows[0])
        rates = ", ".join(f"{row['rate']:g}: {100 * row[figure]:.2f}" for row in runs)
        text = (
            f"## {case}\n\n{setup.data}, {_epochs(setup.epochs)} of batch {setup.batch_size}, {setup.optimizer}, "
            f"cosine. Figure: {figure}, percent."
        )
        if runs:
            text += f"\n\nLearning rates on held-out training examples, in {_epochs(setup.tuning_epochs)}: {rates}."
        if len(setup.rates) == 1:
            text += f" Learning rate, untried: {setup.rates[0]:g}."
        elif {row["rate"] for row in runs} >= set(setup.rates):
            text += f" Taken: {best_rate(results, case):g}."
        if rehearsals := [row for row in of_case if row["strategy"] == REHEARSAL]:
            text += f"\n\n{_rehearsed(rehearsals)}"
        found = lines(of_case, case)
        parts.append(f"{text}\n\n{_table(found)}\n\n{_provenance(rows)}\n" if found else f"{text}\n")
    parts += [text for text in (moments(results), kept_activations(results)) if text]
    return "\n".join(parts)


def _epochs(number: float) -> str:
    return f"{number:g} epoch" + ("s" if number > 1 else "")


def _rehearsed(rows: Sequence[Result]) -> str:
    """What rehearsals of a case told, in a sentence."""
    ready, steps = sum(map(is_ready, rows)), rows[0]["steps"]
    harms = [row["rehearsal"]["harms"][PLAN.rehearsed][0] for row in rows]
    told = ", ".join("nothing learned" if harm is None else f"{100 * harm:+.1f} %" for harm in harms)
    return (
        f"Rehearsals of {steps} steps: `{PLAN.rehearsed}` is harmless with {ready} of {len(rows)} seeds (harm: {told});"
        f" there `{PLAN.ready}` follows, elsewhere `{PLAN.otherwise}`."
    )


def _table(found: Sequence[Line]) -> str:
    head = (
        "| strategy | seeds | FLOPs | time | processor | figure | difference | first freeze |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    rows = []
    for one in found:
        processor, points = (
            _with_error(share(one.cpu), one.cpu_error),
            _with_error(f"{one.difference:+.2f}", one.error),
        )
        if one.strategy == "never":
            processor, points = share(one.cpu), "-"
        rows.append(
            f"| {one.strategy} | {one.seeds} | {one.flops:.2f} | {share(one.time)} | {processor} | {one.figure:.2f} "
            f"| {points} | {share(one.first)} |"
        )
    return head + "\n".join(rows)


def share(value: float) -> str:
    """A share as text; a dash where there is none."""
    return "-" if np.isnan(value) else f"{value:.2f}"


def _with_error(value: str, error: float) -> str:
    return value if np.isnan(error) else f"{value} ± {error:.2f}"


def _provenance(rows: Sequence[Result]) -> str:
    kinds = {field: sorted({row[field] for row in rows}) for field in ("commit", "versions", "hardware")}
    return textwrap.fill("; ".join(f"{field}: {', '.join(values)}" for field, values in kinds.items()) + ".", 120)


def picture(found: Sequence[Line], path: Path, title: str) -> None:
    """Draws the difference to ``never`` against total time and against FLOPs.

    Args:
        found: The strategies of a case.
        path: PNG file to write.
        title: Title of the picture.
    """
    figure, axes = plt.subplots(1, 2, figsize=(14, 6), sharey=True, layout="constrained")
    figure.suptitle(title)
    for axis, name, text in zip(axes, ("time", "flops"), ("total time", "FLOPs"), strict=True):
        axis.axhline(0, color="#bbbbbb", linewidth=1, zorder=0)
        for one in found:
            place = (getattr(one, name), one.difference)
            axis.errorbar(
                *place, yerr=np.nan_to_num(one.error), fmt=_mark(one.strategy), capsize=3, color=_colour(one.strategy)
            )
        axis.set_xlabel(f"{text}, share of full training")
        axis.grid(alpha=0.3)
        axis.margins(0.08)
    axes[0].set_ylabel("points against full training (bars: standard error)")
    figure.canvas.draw()  # lays it out
    for axis, name in zip(axes, ("time", "flops"), strict=True):
        axis.autoscale(enable=False)
        shown = [one for one in found if not np.isnan(getattr(one, name))]
        places = [(getattr(one, name), one.difference) for one in shown]
        label(axis, places, [one.strategy for one in shown], [_colour(one.strategy) for one in shown])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _colour(strategy: str) -> str:
    kinds = list(dict.fromkeys(map(_kind, (*STRATEGIES, REHEARSAL))))
    return _COLOURS[kinds.index(_kind(strategy)) % len(_COLOURS)]


def _kind(strategy: str) -> str:
    return strategy.removesuffix(CACHED).partition(":")[0]


def _mark(strategy: str) -> str:
    """A square where activations are kept."""
    return "s" if CACHED in strategy else "o"


def main(argv: list[str] | None = None) -> int:
    """Writes the page and the pictures."""
    parser = argparse.ArgumentParser(prog="python -m research.long_runs.report", description=__doc__)
    parser.add_argument("--results", type=local_path, default=RESULTS, help="finished runs (default: %(default)s)")
    parser.add_argument("--out", type=local_path, default=RESULTS.parent, help="where to write (default: %(default)s)")
    args = parser.parse_args(argv)
    results = json_lines.read_with_commit(args.results)
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "results.md", page(results))
    for case in CASES:
        found = [line for line in lines(results, case) if line.strategy not in WITHDRAWN]  # they are in the table
        if len(found) > 2:  # else there is nothing to compare
            picture(found, args.out / f"{case}.png", case)
    return 0


if __name__ == "__main__":
    sys.exit(main())
