"""The end of a comparison of runs: one table and one picture."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import PurePath

import jax
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import Mesh
from matplotlib.axes import Axes

from smartfrz_jax.pytrees.file_paths import Path
from train.log import Run

mpl.use("Agg")

_COLOURS = {"never": "#4d4d4d", "smartfrz": "#d1495b", "progress": "#3a8f5c", "freezeout": "#2e86ab"}
_COLOURS_OF_OTHERS = ("#e09f3e", "#7b5ea7", "#c77dba")  # of runs of a policy that has its colour already


def versions_of(mesh: Mesh | None) -> str:
    """What a run is made with, and runs on."""
    devices = f" x {mesh.size}" if mesh is not None else ""
    return f"jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].device_kind}{devices}"


def _labels(runs: Sequence[Run]) -> list[str]:
    """Names of the policies; behind those that repeat, the folders of the runs, as ``progress (p95)``."""
    names, outs = [run.name for run in runs], [PurePath(run.settings.get("out", "")) for run in runs]
    short = [out.name or str(out) for out in outs]
    folders = short if len(set(short)) == len(short) else map(str, outs)
    return [
        f"{name} ({folder})" if names.count(name) > 1 else name for name, folder in zip(names, folders, strict=True)
    ]


def _colours(runs: Sequence[Run]) -> list[str | None]:
    names = [run.name for run in runs]
    return [
        _COLOURS_OF_OTHERS[number % 3] if name in names[:number] else _COLOURS.get(name)
        for number, name in enumerate(names)
    ]


def table(runs: Sequence[Run]) -> str:
    """A Markdown table with a column for each run; savings are against the first.

    Args:
        runs: The runs, the unfrozen one first; each with at least one step.
    """
    full = runs[0]

    def frozen_at_the_end(run: Run) -> int:
        return sum(len(event.names) - len(event.returned) for event in run.freezes)

    def saved(value: float, of_full: float, text: str) -> str:
        return text if value == of_full else f"{text} ({value / of_full - 1:+.0%})"

    rows = [
        ("", _labels(runs)),
        *((f"{metric}, evaluation split", [_figure(run, metric) for run in runs]) for metric in full.metrics),
        ("training, seconds", [saved(run.seconds, full.seconds, f"{run.seconds:.1f}") for run in runs]),
        (f"{_flops_of(runs)}, TFLOPs", [saved(run.tflops, full.tflops, f"{run.tflops:.3f}") for run in runs]),
        (
            "layers frozen at the end",
            [f"{frozen_at_the_end(run)} of {len(run.layers)}" for run in runs],
        ),
        ("layers frozen, mean of all steps", [f"{run.frozen_share:.0%}" for run in runs]),
        ("of the seconds: policy, its own compilation too", [f"{run.policy_seconds:.2f}" for run in runs]),
        ("not in the seconds: waiting for programs", [f"{run.wait_seconds:.1f}" for run in runs]),
        ("compiling, waited for or beside the training", [f"{run.compile_seconds:.1f}" for run in runs]),
        ("programs", [str(len(run.programs)) for run in runs]),
    ]
    label = max(len(name) for name, _ in rows)
    width = max(len(cell) for _, cells in rows for cell in cells)
    lines = [f"| {name:<{label}} | {' | '.join(f'{cell:>{width}}' for cell in cells)} |" for name, cells in rows]
    lines.insert(1, f"|{'-' * (label + 2)}|{'|'.join('-' * (width + 1) + ':' for _ in runs)}|")
    return "\n".join(lines)


def _figure(run: Run, metric: str) -> str:
    if not run.metrics:
        return "-"
    value = run.metrics[metric]
    return f"{value:.3f}" if metric in ("log-likelihood", "perplexity", "loss") else f"{value:.1%}"


def phases(run: Run) -> str:
    """A Markdown table with a row for each phase of a run: step time and memory over time."""
    head = ("from step", "steps", "layers frozen", "ms a step", "GFLOP a step", "MB, program", "MB held")
    rows = [
        (
            f"{phase.step}",
            f"{phase.steps}",
            f"{phase.frozen} of {len(run.layers)}",
            f"{1e3 * phase.seconds:.1f}",
            f"{phase.flops / 1e9:.3f}",
            f"{phase.peak_bytes / 1e6:.1f}",
            f"{phase.held_bytes / 1e6:.1f}",
        )
        for phase in run.phases
    ]
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    lines.insert(1, f"|{'|'.join('--:' for _ in head)}|")
    return "\n".join(lines)


def picture(runs: Sequence[Run], path: Path, title: str) -> None:
    """Draws which layer froze when in each run but the first, and the cost of every step of all.

    Args:
        runs: The runs, the unfrozen one first; or a single run, which is then drawn itself.
        path: PNG file to write.
        title: Title of the picture.
    """
    shown = list(zip(runs, _labels(runs), _colours(runs), strict=True))
    shown = shown[1:] or shown
    figure = plt.figure(figsize=(max(9.0, 6.2 * len(shown)), 9.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(2, len(shown), height_ratios=(1.25, 1))
    for column, (run, label, colour) in enumerate(shown):
        axes = figure.add_subplot(grid[0, column])
        axes.set_title(f"{label}: trains (grey: frozen)")
        _draw_freezing(axes, run, colour or "#888888", labels=column == 0)
    cost = grid[1, :].subgridspec(1, 3)
    _draw_cost(
        figure.add_subplot(cost[0]),
        runs,
        f"GFLOP per step ({_flops_of(runs)})",
        lambda run: np.array([step.flops for step in run.steps]) / 1e9,
    )
    _draw_cost(
        figure.add_subplot(cost[1]),
        runs,
        "ms per step (mean of a few)",
        lambda run: 1e3 * np.array([step.seconds for step in run.steps]),
    )
    last = figure.add_subplot(cost[2])
    _draw_cost(
        last, runs, "MB of the compiled program", lambda run: np.array([step.peak_bytes for step in run.steps]) / 1e6
    )
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower center", ncols=len(runs))
    with path.open("wb") as opened:
        figure.savefig(opened, dpi=110, format="png")
    plt.close(figure)


def _flops_of(runs: Sequence[Run]) -> str:
    return " or ".join(sorted({run.flops_of for run in runs}))


def _draw_freezing(axes: Axes, run: Run, colour: str, *, labels: bool) -> None:
    steps = len(run.steps)
    for row, layer in enumerate(run.layers):
        axes.barh(row, steps, color=colour, height=0.8)
        since = None
        for event in run.freezes:
            if layer in event.names:
                since = event.step
            elif layer in event.returned and since is not None:
                axes.barh(row, event.step - since, left=since, color="#dfe7ec", height=0.8)
                since = None
        if since is not None:
            axes.barh(row, steps - since, left=since, color="#dfe7ec", height=0.8)
    axes.set_ylim(len(run.layers) - 0.4, -0.6)
    axes.set_xlim(0, steps)
    axes.set_yticks(range(len(run.layers)), run.layers if labels else [""] * len(run.layers), fontsize=8)
    axes.set_xlabel("train step")


def _draw_cost(axes: Axes, runs: Sequence[Run], label: str, values: Callable[[Run], np.ndarray]) -> None:
    for run, name, colour in zip(runs, _labels(runs), _colours(runs), strict=True):
        axes.plot(values(run), label=name, color=colour, drawstyle="steps-post")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("train step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
