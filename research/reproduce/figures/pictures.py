"""Pictures of the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from research.json_lines import Row
from research.reproduce.figures.memory import memory_over_time, moments_of
from research.reproduce.figures.similarity import Curves

mpl.use("Agg")
import matplotlib.pyplot as plt

_WHOLE, _SAMPLE = "#2e6f95", "#d1495b"
_PANELS = 8  # of Figure 3
_LAYERS = 5  # of Figure 4, as in the paper


def gradients(rows: Sequence[Row], path: Path) -> None:
    """Draws Figure 3: a layer of every kind, whole and sampled.

    Args:
        rows: Rows of Figure 3.
        path: PNG file to write.
    """
    chosen: dict[str, tuple[Row, Mapping[str, Any]]] = {}
    for row in rows:
        for kind, histogram in row["histograms"].items():
            chosen.setdefault(kind, (row, histogram))
    figure, axes = plt.subplots(2, _PANELS // 2, figsize=(15, 6.5), layout="constrained")
    for axis in axes.flat[len(chosen) :]:
        axis.set_axis_off()
    for axis, (kind, (row, histogram)) in zip(axes.flat, chosen.items(), strict=False):
        edges = np.linspace(-histogram["range"], histogram["range"], len(histogram["whole"]) + 1)
        axis.stairs(histogram["whole"], edges, fill=True, color=_WHOLE, alpha=0.35, label="whole layer")
        axis.stairs(histogram["sample"], edges, color=_SAMPLE, linewidth=1.4, label="1024 weights")
        distance = next(layer["distance"] for layer in row["layers"] if layer["layer"] == histogram["layer"])
        axis.set_title(f"{kind}: {row['network']}\n{histogram['layer']}, distance {distance:.3f}", fontsize=9)
        axis.set_yscale("log")
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("gradient, standard deviations", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("share of the weights", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def similarity(curves: Sequence[Curves], path: Path) -> None:
    """Draws Figure 4: CKA of five layers of each of some runs.

    Args:
        curves: The runs, at most four.
        path: PNG file to write.
    """
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained", sharex=True)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, _LAYERS))
    for axis, one in zip(axes.flat, curves, strict=False):
        places = np.linspace(0, len(one.layers) - 2, _LAYERS).round().astype(int)  # the head has no output to settle
        for place, colour in zip(places, colours, strict=True):
            axis.plot(one.progress, one.cka[:, place], color=colour, label=f"{place + 1}: {one.layers[place]}")
            moment = one.moments[place]
            if not np.isnan(moment):
                at = int(np.argmin(np.abs(one.progress - moment)))
                axis.plot(moment, one.cka[at, place], "o", color=colour, markersize=5)
        axis.set_title(f"{one.name} ({len(one.layers)} layers)", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    for axis in axes[-1]:
        axis.set_xlabel("share of the run (dots: settled)")
    for axis in axes[:, 0]:
        axis.set_ylabel("CKA with the finished network")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def memory(rows: Sequence[Row], path: Path) -> None:
    """Draws Figure 5: memory over the run, and the moment at which every layer froze.

    Args:
        rows: Rows of Figure 5.
        path: PNG file to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
    colours = plt.get_cmap("tab10").colors  # pyright: ignore[reportAttributeAccessIssue]
    for row, colour in zip(rows, colours, strict=False):
        label = f"{row['network']}, {row['method']}"
        held = memory_over_time(row)
        left.step(np.arange(len(held)) / len(held), held / held[0], where="post", color=colour, label=label)
        moments = moments_of(row)
        places = [row["layers"].index(name) / (len(row["layers"]) - 1) for name in moments]
        right.plot(places, list(moments.values()), "o", color=colour, markersize=5, alpha=0.7, label=label)
    left.set(xlabel="share of the run", ylabel="memory of a step, share of the first", ylim=(0, 1.05))
    right.set(xlabel="place of the layer, from front to back", ylabel="frozen after, share of the run", ylim=(0, 1.02))
    right.set_xlim(-0.02, 1.02)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
