"""What rehearsals told, beside what the full runs came to, and what it comes to if one goes by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import smartfrz_jax as sfj
from research.trials.result import Result, beside_never, mean_and_error


class Rehearsed(NamedTuple):
    """A rehearsal of a fine-tuning.

    Attributes:
        case: Name of the fine-tuning.
        seed: Its seed.
        share: Steps of the rehearsal, as a share of the full run's.
        compute: FLOPs of all of the rehearsal, evaluation included, as a share of those of the full run.
        rehearsal: What it came to.
    """

    case: str
    seed: int
    share: float
    compute: float
    rehearsal: sfj.policies.Rehearsal

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Rehearsed:
        """From a JSON object."""
        of = fields["rehearsal"]
        harms = {
            name: sfj.policies.Harm(*np.array(harm, float).tolist()) for name, harm in of["harms"].items()
        }  # null is NaN
        rehearsal: dict[str, Any] = of | {"harms": harms}
        parsed: dict[str, Any] = fields | {"rehearsal": sfj.policies.Rehearsal(**rehearsal)}
        return cls(**parsed)

    def as_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return self._asdict() | {"rehearsal": self.rehearsal._asdict()}


class Plan(NamedTuple):
    """How one goes by a rehearsal; names of strategies.

    Attributes:
        rehearsed: What is rehearsed.
        ready: What the long run does if it was harmless there.
        otherwise: What it does if it was not.
    """

    rehearsed: str
    ready: str
    otherwise: str

    def chosen(self, rehearsal: sfj.policies.Rehearsal) -> str:
        """What the long run does."""
        return self.otherwise if rehearsal.chosen is None else self.ready


_Runs = Mapping[tuple[str, int, str], Result]  # by case, seed and strategy


def _paired(full: _Runs, row: Rehearsed, strategy: str) -> tuple[Result, Result] | None:
    """The runs of ``never`` and of a strategy that the rehearsal stands for; ``None`` if one is missing."""
    never, run = (full.get((row.case, row.seed, name)) for name in ("never", strategy))
    return None if never is None or run is None else (never, run)


def report(rehearsals: Sequence[Rehearsed], results: Sequence[Result], plan: Plan) -> str:
    """Markdown tables, two for each length of rehearsals: what they told, and what it comes to if one goes by them.

    Columns of the first: seeds rehearsed, and with how many of them freezing was harmless; its harm in rehearsals, the
    mean over those in which enough was learned to tell, and how many were left out as it was not (NaN in
    :class:`smartfrz_jax.policies.Harm`); the price of a rehearsal. Then how many of these seeds were run in full, and
    the mean over them of held-out loss, and accuracy in points, less those of ``never`` with the same seed. Everywhere
    ``+-`` is the standard error over seeds. The last table has all full runs; its *time* is the median of the
    quotients with ``never``, of seconds in which other things may have run, too.

    In full runs harm is not given as a share of what was learned, as in rehearsals: their loss before the first step is
    not known on the same examples, and where ``never`` hardly learns it would be a share of next to nothing.

    Args:
        rehearsals: All rehearsals.
        results: Full runs of ``never`` and the strategies of the plan, with the seeds of some of the rehearsals.
        plan: How one goes by a rehearsal.
    """
    full = {(result.case, result.seed, result.strategy): result for result in results}
    parts = []
    for share in sorted({row.share for row in rehearsals}):
        by_case: dict[str, list[Rehearsed]] = {}
        for row in rehearsals:
            if row.share == share:
                by_case.setdefault(row.case, []).append(row)
        parts.append(f"### Rehearsals of {share:.1%} of the steps\n\n{_told(by_case, full, plan)}")
        if outcomes := _outcomes(by_case, full, plan):
            parts.append(f"The long run then has `{plan.ready}` or `{plan.otherwise}`:\n\n{outcomes}")
    if in_full := _in_full(results):
        parts.append(f"### Full runs, less `never` with the same seed\n\n{in_full}")
    return "\n\n".join(parts)


def _told(by_case: Mapping[str, Sequence[Rehearsed]], full: _Runs, plan: Plan) -> str:
    lines = [
        f"| fine-tuning | seeds | {plan.rehearsed} harmless | harm | price | full runs | loss | points |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case, rows in by_case.items():
        harmless = sum(row.rehearsal.chosen is not None for row in rows)
        rehearsed = [100 * row.rehearsal.harms[plan.rehearsed].harm for row in rows]
        told = [harm for harm in rehearsed if np.isfinite(harm)]  # elsewhere nothing was learned
        left_out = f" ({len(rows) - len(told)} left out)" if len(told) < len(rows) else ""
        losses, points = [], []
        for row in rows:
            if found := _paired(full, row, plan.rehearsed):
                never, run = found
                losses.append(run.loss - never.loss)
                points.append(100 * (run.accuracy - never.accuracy))
        price = np.mean([row.compute for row in rows])
        lines.append(
            f"| {case} | {len(rows)} | {harmless} | {mean_and_error(told, 1, ' %')}{left_out} | {price:.2f} | "
            f"{len(points)} | {mean_and_error(losses, 3)} | {mean_and_error(points, 2)} |"
        )
    return "\n".join(lines)


def _outcomes(by_case: Mapping[str, Sequence[Rehearsed]], full: _Runs, plan: Plan) -> str:
    """Empty if there are no full runs of what is chosen."""
    lines = []
    for case, rows in by_case.items():
        compute, cached, points, ready = [], [], [], 0
        for row in rows:
            chosen = plan.chosen(row.rehearsal)
            if found := _paired(full, row, chosen):
                never, run = found
                compute.append(run.compute + row.compute)
                cached.append(run.compute_cached + row.compute)
                points.append(100 * (run.accuracy - never.accuracy))
                ready += chosen == plan.ready
        if points:
            means = f"{np.mean(compute):.2f} | {np.mean(cached):.2f} | {mean_and_error(points, 2)}"
            lines.append(f"| {case} | {len(points)} | {ready} | {means} |")
    if not lines:
        return ""
    head = f"| fine-tuning | seeds | {plan.ready} | compute, rehearsal included | with kept activations | points |"
    return "\n".join([head, "|---|--:|--:|--:|--:|--:|", *lines])


def _in_full(results: Sequence[Result]) -> str:
    """Empty if nothing ran beside ``never``."""
    pairs = beside_never(results)
    if not pairs:
        return ""
    lines = [
        "| fine-tuning | strategy | seeds | compute | with kept activations | time | loss | points | median |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    order = {case: place for place, case in enumerate(dict.fromkeys(case for case, _ in pairs))}
    for (case, strategy), runs in sorted(pairs.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        compute = f"{np.mean([run.compute for _, run in runs]):.2f}"
        cached = f"{np.mean([run.compute_cached for _, run in runs]):.2f}"
        time = np.median([run.seconds / never.seconds for never, run in runs])
        losses = [run.loss - never.loss for never, run in runs]
        points = [100 * (run.accuracy - never.accuracy) for never, run in runs]
        lines.append(
            f"| {case} | {strategy} | {len(runs)} | {compute} | {cached} | {time:.2f} | {mean_and_error(losses, 3)} | "
            f"{mean_and_error(points, 2)} | {np.median(points):+.2f} |"
        )
    return "\n".join(lines)
