"""The page of the figures, from committed rows and recordings alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from research.json_lines import Row
from research.long_runs.report import share
from research.predictors.figures import finite_mean
from research.reproduce.figures.gradients import SIZE, by_kind
from research.reproduce.figures.memory import memory_over_time, moments_of
from research.reproduce.figures.similarity import Curves, Order, order_of, rank_correlation
from research.reproduce.figures.work import FIGURES, missing
from research.reproduce.plans import Scale
from research.reproduce.tables import table

# The largest distance of Kolmogorov and Smirnov that 19 of 20 samples of one distribution stay below.
_CHANCE = 1.358 / np.sqrt(SIZE)

_HEAD = """\
# The paper's figures again

What arXiv 2401.16720 shows in its Figures 3 to 5, measured here. `python -m research.reproduce figure3 figure5` adds
what is missing to `figures.jsonl`, and writes this page from it. *cpu* is small images and few examples on one core,
*paper* the paper's networks at 224 x 224.
"""


def page(rows: Sequence[Row], recorded: Sequence[tuple[str, Curves]]) -> str:
    """The whole page.

    Args:
        rows: Rows of the figures.
        recorded: CKA curves of the recorded runs, each with the name of its network.
    """
    of = {name: [row for row in rows if row["figure"] == name] for name in ("figure3", "figure4", "figure5")}
    curves = [*recorded, *((row["network"], Curves.of_row(row)) for row in of["figure4"])]
    parts = [_HEAD.rstrip(), _gradients(of["figure3"]), _similarity(curves), _memory(of["figure5"]), _not_run(rows)]
    return "\n\n".join(parts) + "\n"


def _gradients(rows: Sequence[Row]) -> str:
    text = f"""\
## Figure 3: the gradients of {SIZE} weights, and of their layer

The paper shows two histograms of one layer, the 30th convolution of ResNet50, and finds them "highly similar".
*Distance* is that of Kolmogorov and Smirnov between the two distributions. A fair sample of this size stays below
{_CHANCE:.3f} in 19 of 20 cases. *Size error* is that of the root mean square that the sample tells, as a share. *Tail*
is the median kurtosis; a normal distribution has 3."""
    if not rows:
        return f"{text}\n\nNot run yet."
    found = []
    for kind, layers in by_kind(rows).items():
        distances, errors = (np.array([layer[name] for layer in layers]) for name in ("distance", "size_error"))
        found.append(
            (
                kind, str(len(layers)), f"{distances.mean():.3f}", f"{distances.max():.3f}", f"{errors.mean():.3f}",
                f"{errors.max():.3f}", f"{np.median([layer['tail'] for layer in layers]):.0f}",
                f"{np.max([layer['zeros'] for layer in layers]):.2f}",
            )
        )  # fmt: skip
    head = ("kind", "layers", "distance", "largest distance", "size error", "largest error", "tail", "most zeros")
    of = "\n".join(f"- {row['network']} on {row['data']} ({row['scale']}), step {row['steps']}" for row in rows)
    layers = [layer for row in rows for layer in row["layers"]]
    above = sum(layer["distance"] > _CHANCE for layer in layers)
    worst = max(layers, key=lambda layer: layer["size_error"])
    return f"""{text}

{table(head, found, text=1)}

Networks:

{of}

![Gradients of whole layers and of samples](figure3.png)

**What it says.** {above or "None"} of {len(layers)} layers {"has" if above == 1 else "have"} a mean distance above
that. It cannot be otherwise: a random sample has the distribution of what it is drawn from, be this a gradient or
anything else. So the figure does not show that a sample tells when a layer is ready. What it can tell badly is a size:
where few weights carry the gradient, most samples miss them. The worst is of the kind {worst["kind"]}:
`{worst["layer"]}`. A sample tells the size of its gradient with an error of {_percent(worst["size_error"])}, as
{100 * worst["zeros"]:.1f} % of it is zero."""


def _similarity(curves: Sequence[tuple[str, Curves]]) -> str:
    text = """\
## Figure 4: when the outputs of layers settle

The paper shows CKA of five layers of ResNet50 with the network as it is after the run. The front settles first, but
for one layer further back that overtakes, "due to the presence of residual connections". *Rank correlation* is that of
place and moment: 1 where the order is strictly from front to back. *Overtaken* is the share of pairs of layers of which
the one further back settles first. *Unsettled* are layers that do so only at the end. Layers settle where CKA stays
within 0.02 of its last level."""
    orders: dict[str, list[Order]] = {}
    for network, one in curves:
        orders.setdefault(network, []).append(order_of(one))
    rows = [
        (network, "yes" if found[0].residual else "no", str(len(found)), *(
            share(finite_mean([getattr(order, field) for order in found]))
            for field in ("correlation", "overtaken", "unsettled")
        ))
        for network, found in sorted(orders.items())
    ]  # fmt: skip
    head = ("network", "residual", "runs", "rank correlation", "overtaken", "unsettled")
    overtaken = {network: finite_mean([order.overtaken for order in found]) for network, found in orders.items()}
    with_residual, without = (
        {
            name: overtaken[name]
            for name, found in orders.items()
            if found[0].residual is residual and overtaken[name] >= 0
        }
        for residual in (True, False)
    )
    least, most = min(with_residual, key=with_residual.__getitem__), max(without, key=without.__getitem__)
    return f"""{text}

{table(head, rows, text=2)}

The runs are the recordings in `benchmarks/recordings` that have a reference, and rows of `figures.jsonl`.

![CKA of layers over four runs](figure4.png)

**What it says.** The front settles first. Mean over the networks, a layer further back overtakes in
{_percent(np.mean(list(with_residual.values())))} of the pairs with residual connections, and in
{_percent(np.mean(list(without.values())))} without. These connections alone do not decide it: {most}, which has none,
has {_percent(without[most])}, {least} has {_percent(with_residual[least])}."""


def _memory(rows: Sequence[Row]) -> str:
    text = """\
## Figure 5: what a step holds, and when layers freeze

The paper saves more than 80 % of ResNet50's memory by the end of the run, and half of VGG11's and MobileNetV2's, on
CIFAR-100. *MB* are what the compiled train step holds at its peak: parameters, optimizer state, batch and temporary
buffers. *Saved* is the share that is gone at the end, *mean* that of all steps. *Moments* are those at which something
froze, *rank correlation* is that of a layer's place and its moment. *SmartFRZ* is the paper's rule with its kind of
predictor, *default* the library's."""
    if not rows:
        return f"{text}\n\nNot run yet."
    found = []
    for row in rows:
        held = memory_over_time(row)
        moments = moments_of(row)
        places = np.array([row["layers"].index(name) for name in moments])
        correlation = rank_correlation(places, np.array(list(moments.values())))
        found.append(
            (
                row["network"], row["data"], row["method"], row["scale"], f"{held[0] / 1e6:.0f}",
                f"{held[-1] / 1e6:.0f}", _percent(1 - held[-1] / held[0]), _percent(1 - held.mean() / held[0]),
                f"{len(moments)} of {len(row['layers'])}", str(len({*moments.values()})),
                share(correlation),
            )
        )  # fmt: skip
    head = (
        "network",
        "data",
        "method",
        "scale",
        "MB",
        "at the end",
        "saved",
        "mean",
        "frozen",
        "moments",
        "rank correlation",
    )
    return f"""{text}

{table(head, found, text=4)}

![Memory over the run, and the moments of freezing](figure5.png)"""


def _not_run(rows: Sequence[Row]) -> str:
    left = [one.key for scale in get_args(Scale) for one in missing(FIGURES, scale, rows)]
    listed = "\n".join(
        f"- {figure.replace('figure', 'Figure ')}, {scale}: {network} on {data}{f', {method}' * (method != 'Full')}"
        for figure, scale, network, data, method in left
    )
    return f"## Not run\n\n{listed}"


def _percent(of_all: Any) -> str:
    return f"{100 * float(of_all):.0f} %"
