"""Questions that the paper leaves: one small table each, from committed rows, recordings and raw tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from research.json_lines import Row
from research.reproduce.figures.gradients import by_kind
from research.reproduce.figures.similarity import Curves
from research.reproduce.predictors.settings import AVERAGED, JUDGED, LEARNED, LONG, PAPER, SCALE_FREE, WINDOWS, Setting
from research.reproduce.tables import table
from smartfrz_jax.learning.targets import settled
from smartfrz_jax.predictor.cka import stabilised

RAW = Path(__file__).parents[2] / "benchmarks" / "predictors" / "tables.md"
_STAGES = (120, 60, 24, 10, 4)  # freezing stages in a run
_WINDOW, _TOLERANCE = 5, 0.02

_HEAD = """\
# Questions that the paper leaves

One small table each. `python -m research.reproduce questions` adds what is missing to `predictors.jsonl`, and writes
this page from it, from the recordings in `benchmarks/recordings` and from the raw tables in
`benchmarks/predictors/tables.md`. *AUC* is that of telling layers that have settled, by CKA with
a trained network, from those that have not; 0.5 is guessing.
"""


def page(predictors: Sequence[Row], figures: Sequence[Row], recorded: Sequence[Curves]) -> str:
    """The whole page.

    Args:
        predictors: Rows of predictors.
        figures: Rows of the figures.
        recorded: CKA curves of the recorded runs.
    """
    parts = [_HEAD.rstrip(), _windows(predictors), _sampling(figures), _stages(recorded), _averaging(predictors)]
    return "\n\n".join([*parts, _transformers(predictors), _encodings()]) + "\n"


def _windows(rows: Sequence[Row]) -> str:
    text = "## Do windows beyond 50 help, and on other networks?"
    return f"{text}\n\n{_scores(rows, (*WINDOWS, LONG))}"


def _scores(rows: Sequence[Row], settings: Sequence[Setting]) -> str:
    """AUC of predictors on each group of networks."""
    known = {row["setting"]: row["scores"] for row in rows}
    found = [
        (setting.name, *(f"{known[setting.name][group]['auc']:.3f}" for group in JUDGED))
        for setting in settings
        if setting.name in known
    ]
    not_run = [setting.name for setting in settings if setting.name not in known]
    of = f"Learned from {len(LEARNED)} short runs; a name is records x weights."
    parts = [table(("predictor", *JUDGED), found, text=1), of] if found else []
    parts += [f"Not run: {', '.join(not_run)}."] if not_run else []
    return "\n\n".join(parts)


def _sampling(figures: Sequence[Row]) -> str:
    rows = [row for row in figures if row["figure"] == "figure3"]
    text = """\
## Does a sample of 1024 weights stand for layers of every kind?

The error with which a sample tells the size (root mean square) of its layer's gradient, from
[Figure 3](figures.md)."""
    if not rows:
        return f"{text}\n\nNot run."
    errors = {kind: [layer["size_error"] for layer in layers] for kind, layers in by_kind(rows).items()}
    ordered = sorted(errors.items(), key=lambda item: -float(np.mean(item[1])))
    cells = [(kind, str(len(found)), f"{np.mean(found):.2f}", f"{max(found):.2f}") for kind, found in ordered]
    worst, best = ordered[0], ordered[-1]
    return f"""{text}

{table(("kind", "layers", "mean error", "largest"), cells, text=1)}

Not for all alike. Told worst: {worst[0]}, with a mean error of {np.mean(worst[1]):.2f}. Told best: {best[0]}, with
{np.mean(best[1]):.2f}."""


def _stages(recorded: Sequence[Curves]) -> str:
    """What a rule without hindsight freezes, by how often it is asked."""
    cells = []
    for stages in _STAGES:
        known, saved, early = np.mean([frozen_by(one, stages) for one in recorded], axis=0)
        cells.append((str(stages), f"{known:.2f}", f"{saved:.2f}", f"{early:.2f}"))
    head = ("stages in a run", "frozen with hindsight", "frozen by the rule", "of these too early")
    return f"""\
## How often should it be decided?

Of {len(recorded)} recorded runs, the share of all steps and layers that is frozen. *With hindsight* a layer freezes at
the first stage after its CKA has settled for good. *The rule* has none: it freezes a layer whose CKA has changed by at
most {_TOLERANCE} in the last {_WINDOW} records. *Too early* is the share of its layers that have not settled by then.

{table(head, cells, text=0)}

Deciding seldom saves less and errs less: with {_STAGES[-1]} stages instead of {_STAGES[0]} the rule freezes
{cells[-1][2]} in place of {cells[0][2]}, and {cells[-1][3]} of its layers too early in place of {cells[0][3]}."""


def frozen_by(curves: Curves, stages: int) -> tuple[float, float, float]:
    """What a run's layers would be frozen of, by how often it is decided.

    Args:
        curves: CKA of the layers over the run.
        stages: Freezing stages in the run, evenly spaced.

    Returns:
        Share of steps and layers that is frozen with hindsight; by the rule; and of the layers that the rule freezes
        the share that has not settled.
    """
    records = len(curves.progress)
    at = np.unique(np.round(np.arange(1, stages + 1) / stages * records).astype(int).clip(1, records) - 1)
    right = settled(curves.cka, window=_WINDOW, tolerance=_TOLERANCE)
    flat = stabilised(curves.cka, window=_WINDOW, tolerance=_TOLERANCE)
    shares, firsts = [], []
    for decision in (right, flat):
        first = np.where(decision[at].any(axis=0), at[np.argmax(decision[at], axis=0)], records - 1)
        firsts.append(first)
        shares.append(float(np.mean(1 - curves.progress[first])))
    frozen = flat[at].any(axis=0)
    early = ~right[firsts[1], np.arange(right.shape[1])] & frozen
    return shares[0], shares[1], float(early.sum() / max(1, frozen.sum()))


def _averaging(rows: Sequence[Row]) -> str:
    of = {row[0]: row for row in raw_table("own_cka, held out by architecture")}
    attention, mean = of["scale-free, t/T, depth, regime"], of["the same, mean pooling"]
    return f"""\
## Is attention better than plain averaging?

In the raw tables, held out by architecture, both by CKA with the network's own end:

{table(("pooling", "AUC", "AUC, across layers"), [("attention", *attention[3:5]), ("mean", *mean[3:5])], text=1)}

No. Of predictors on raw weights, as the paper has them:

{_scores(rows, (PAPER, AVERAGED))}"""


def _transformers(rows: Sequence[Row]) -> str:
    return f"""\
## Does a predictor carry over from convolutions to transformers?

{_scores(rows, (PAPER, SCALE_FREE))}

The next table names the worst of five families that were held out, for each input."""


def _encodings() -> str:
    rows = raw_table("cka, held out by architecture")
    wanted = ("progress_and_depth", "t/T, depth", "t/T, depth, given, loss", "t/T, depth, regime", "raw (paper)")
    cells = [(row[0], *row[3:5], row[-1]) for name in wanted for row in rows if row[0] == name]
    return f"""\
## Which input carries over at all?

From the raw tables, by CKA with a trained network, on architectures that the predictor has not seen:

{table(("what it reads", "AUC", "AUC, across layers", "worst family"), cells, text=1)}

Raw weights do not. The progress of the run and the depth of the layer do. With the *regime*, that is how far weights
have moved, what layers have contributed and how the loss falls, the AUC rises, and most in the worst family. Between
the layers at one moment it tells less well."""


def raw_table(heading: str) -> list[list[str]]:
    """Rows of the raw table whose heading begins so; those of the first, if there are several."""
    _, _, rest = RAW.read_text().partition(f"### {heading}")
    lines = rest.partition("\n#")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return rows[1:]
