"""Pages with the paper's figures beside ours, from committed results alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from research.json_lines import Row
from research.long_runs.report import Line, lines, share
from research.reproduce.paper import TABLES
from research.reproduce.plans import PLANS, Plan, Setup
from research.reproduce.tables import table

_HEAD = """\
# The paper's tables again

What arXiv 2401.16720 says, and what came out here. *Here* are the [long runs](../long_runs/results.md): smaller
networks and images, whole data sets, each strategy paired with full training of the same seed. *Change* is in points of
accuracy, F1 or Matthews correlation, with its standard error over seeds; *compute* and *time* are shares of those of
full training. Tables 4 and 5 are of small runs with one seed: 4,096 images in five epochs at an untuned learning rate,
with predictors that learned from three of them. `python -m research.reproduce` writes this page; with the name of a
table it runs what is missing.
"""


def page(long_runs: Sequence[Row], paper_runs: Sequence[Row]) -> str:
    """The whole page.

    Args:
        long_runs: Results of :mod:`research.long_runs`.
        paper_runs: Results on the paper's scale.
    """
    parts = [_HEAD.rstrip()]
    for name, plan in PLANS.items():
        number = int(name.removeprefix("table"))
        parts += [f"## Table {number}: {plan.title}", _paper(number)]
        if plan.cases:
            parts.append(_here(plan, long_runs))
        if plan.small:
            parts.append(_own(plan.small, plan, paper_runs, "Here, by `train.finetune`") or "Here: not run yet.")
        if plan.setups:
            title = "On the paper's scale"
            parts.append(_own(plan.setups, plan, paper_runs, title) or f"{title}: not run yet.")
        if plan.missing:
            parts.append(f"Not run: {plan.missing}")
    return "\n\n".join(parts) + "\n"


def _paper(number: int) -> str:
    rows = []
    full = {(said.network, said.data): said for said in TABLES[number] if said.method == "Full"}
    for said in TABLES[number]:
        base = full.get((said.network, said.data))
        change = "-"
        if base and base.accuracy and said.accuracy and said is not base:
            change = f"{said.accuracy - base.accuracy:+.2f}"
        compute = f"{said.tflops / base.tflops:.2f}" if base and base.tflops and said.tflops else "-"
        time = f"{said.time / base.time:.2f}" if base and base.time and said.time else "-"
        figure = "-" if said.accuracy is None else f"{said.accuracy:.2f}"
        rows.append((said.network, said.data, said.method, figure, change, compute, time))
    return "The paper:\n\n" + table(("network", "data", "method", "figure", "change", "compute", "time"), rows, text=3)


def _here(plan: Plan, results: Sequence[Row]) -> str:
    rows = []
    for case in plan.cases:
        found = {line.strategy: line for line in lines(results, case)}
        rows += [_row(case, method, found[name]) for name, method in plan.strategies.items() if name in found]
    if not rows:
        return f"Here ({', '.join(plan.cases)}): not run yet."
    return "Here:\n\n" + table(("case", "method", "seeds", "figure", "change", "compute", "time"), rows, text=2)


def _row(case: str, method: str, line: Line) -> tuple[str, ...]:
    error = "" if np.isnan(line.error) else f" ± {line.error:.2f}"
    change = "-" if line.strategy == "never" else f"{line.difference:+.2f}{error}"
    return case, method, str(line.seeds), f"{line.figure:.2f}", change, f"{line.flops:.2f}", share(line.time)


def _own(setups: Sequence[Setup], plan: Plan, results: Sequence[Row], title: str) -> str:
    rows = []
    for setup in setups:
        mine = [row for row in results if (row["network"], row["data"]) == (setup.network, setup.data)]
        full = {row["seed"]: row for row in mine if row["method"] == "Full"}
        for method in plan.policies:
            runs = [row for row in mine if row["method"] == method]
            if not runs:
                continue
            figures = [row["percent"] for row in runs]
            pairs = [(row, full[row["seed"]]) for row in runs if row["seed"] in full]
            compute, time = (
                f"{np.mean([row[of] / base[of] for row, base in pairs]):.2f}" if pairs else "-"
                for of in ("tflops", "seconds")
            )
            error = f" ± {np.std(figures, ddof=1) / np.sqrt(len(figures)):.2f}" if len(figures) > 1 else ""
            text = f"{np.mean(figures):.2f}{error}"
            rows.append((setup.network, setup.data, method, str(len(runs)), text, compute, time))
    head = ("network", "data", "method", "seeds", "figure", "compute", "time")
    return f"{title}:\n\n" + table(head, rows, text=3) if rows else ""
