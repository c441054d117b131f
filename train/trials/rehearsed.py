"""What rehearsals told, beside what the full runs came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import smartfrz_jax as sfj
from train.trials.result import Result


class Rehearsed(NamedTuple):
    """A rehearsal of a fine-tuning.

    Attributes:
        case: Name of the fine-tuning.
        seed: Its seed.
        share: Steps of the rehearsal, as a share of the full run's.
        compute: FLOPs of all of the rehearsal, as a share of those of the full run.
        rehearsal: What it came to.
    """

    case: str
    seed: int
    share: float
    compute: float
    rehearsal: sfj.Rehearsal

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Rehearsed:
        """From a JSON object."""
        of = fields["rehearsal"]
        harms = {name: sfj.Harm(*harm) for name, harm in of["harms"].items()}
        rehearsal: dict[str, Any] = of | {"harms": harms}
        parsed: dict[str, Any] = fields | {"rehearsal": sfj.Rehearsal(**rehearsal)}
        return cls(**parsed)

    def as_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return self._asdict() | {"rehearsal": self.rehearsal._asdict()}


def report(rehearsals: Sequence[Rehearsed], results: Sequence[Result], policies: Sequence[str]) -> str:
    """Markdown tables, one for each length of rehearsals: the harm that they told, and that of full runs.

    Args:
        rehearsals: All rehearsals.
        results: Full runs of ``never`` and the policies, with the seeds of some of the rehearsals.
        policies: Strategies that were rehearsed, in the order of the rehearsal.
    """
    full = {(result.case, result.seed, result.strategy): result for result in results}
    titles = [f"{name}: rehearsed | full run | points" for name in policies]
    parts = []
    for share in sorted({row.share for row in rehearsals}):
        by_case: dict[str, list[Rehearsed]] = {}
        for row in rehearsals:
            if row.share == share:
                by_case.setdefault(row.case, []).append(row)
        lines = [
            f"| fine-tuning | seeds, full | {' | '.join(titles)} | chosen | compute |",
            f"|---|--:|{'--:|--:|--:|' * len(policies)}---|--:|",
        ]
        for case, rows in by_case.items():
            pairs = [{(case, row.seed, name) for name in ("never", policies[0])} for row in rows]
            seeds = f"{len(rows)}, {sum(pair <= full.keys() for pair in pairs)}"
            cells = [cell for name in policies for cell in _harms(rows, full, name)]
            chosen = [row.rehearsal.chosen or "none" for row in rows]
            counts = ", ".join(f"{name} {chosen.count(name)}" for name in sorted(set(chosen)))
            compute = np.mean([row.compute for row in rows])
            lines.append(f"| {case} | {seeds} | {' | '.join(cells)} | {counts} | {compute:.2f} |")
        parts.append(f"### Rehearsals of {share:.0%} of the steps\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _harms(rows: Sequence[Rehearsed], full: Mapping[tuple[str, int, str], Result], policy: str) -> tuple[str, str, str]:
    """Of one fine-tuning: harm in rehearsals; harm of full runs, in the same terms; and their points of accuracy."""
    rehearsed = [100 * row.rehearsal.harms[policy].harm for row in rows]
    rehearsed = [harm for harm in rehearsed if np.isfinite(harm)]  # elsewhere nothing was learned
    harms, points = [], []
    for row in rows:
        never, run = (full.get((row.case, row.seed, name)) for name in ("never", policy))
        if never is not None and run is not None:
            harms.append(100 * (run.loss - never.loss) / (row.rehearsal.start - never.loss))
            points.append(100 * (run.accuracy - never.accuracy))
    return (
        f"{_mean(rehearsed, 1)} %" if rehearsed else "-",
        f"{_mean(harms, 1)} %" if harms else "-",
        _mean(points, 2) if points else "-",
    )


def _mean(values: Sequence[float], digits: int) -> str:
    """The mean with its standard error."""
    mean = f"{np.mean(values):+.{digits}f}"
    return f"{mean} +- {np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}" if len(values) > 1 else mean
