"""What is measured, most valuable first, and what of it is done."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import jax

from benchmarks.gpu.cached import cached
from benchmarks.gpu.cases import NAMES, Case, Skipped
from benchmarks.gpu.decisions import decisions
from benchmarks.gpu.pytorch import pytorch
from benchmarks.gpu.step_time import memory, step_time
from benchmarks.gpu.whole_run import whole_run

Row = Mapping[str, Any]


class Task(NamedTuple):
    """Something to measure, in a process of its own.

    Attributes:
        kind: What.
        network: Of which network.
        seconds: What it may take on a GPU, compiling included: an estimate, not yet measured.
    """

    kind: str
    network: str
    seconds: int

    @property
    def name(self) -> str:
        """As on the command line and in the rows."""
        return f"{self.kind}/{self.network}"


TASKS = (
    Task("step_time", "resnet50", 80),
    Task("step_time", "bert_base", 60),
    Task("pytorch", "resnet50", 20),
    Task("pytorch", "bert_base", 20),
    Task("step_time", "deit_tiny", 60),
    Task("step_time", "mobilenetv2", 80),
    Task("whole_run", "efficientnet_lite0", 120),
    Task("pytorch", "deit_tiny", 20),
    Task("pytorch", "mobilenetv2", 20),
    *(Task("memory", name, 20) for name in NAMES),
    Task("cached", "resnet50", 45),
    Task("cached", "deit_tiny", 45),
    Task("decisions", "resnet50", 20),
    Task("decisions", "bert_base", 20),
)

# The steps themselves run in PyTorch; JAX only names the layers.
ENVIRONMENT = {"pytorch": {"JAX_PLATFORMS": "cpu"}}

_OF_A_NETWORK: dict[str, Callable[[Case], dict[str, Any]]] = {
    "step_time": step_time,
    "memory": memory,
    "cached": cached,
    "decisions": decisions,
}


def missing(rows: Sequence[Row], *, tiny: bool) -> list[Task]:
    """Tasks of which there is no figure yet, in order."""
    done = {row["task"] for row in rows if is_figure(row) and row["tiny"] == tiny}
    return [task for task in TASKS if task.name not in done]


def is_figure(row: Row) -> bool:
    """Whether a row has figures, and not a reason why there are none."""
    return "skipped" not in row and "failed" not in row


def measure(task: Task, rows: Sequence[Row], *, tiny: bool) -> dict[str, Any]:
    """A row with the figures of a task, or with the reason why there are none.

    Args:
        task: The task.
        rows: Those that are there already.
        tiny: Whether at a size for processors.
    """
    device = jax.devices()[0]
    try:
        found = _figures(task, rows, tiny=tiny)
    except Skipped as reason:
        found = {"skipped": str(reason)}
    return row_of(task, tiny=tiny, platform=device.platform, device=device.device_kind) | found


def row_of(task: Task, *, tiny: bool, **fields: Any) -> dict[str, Any]:
    """What every row has."""
    versions = f"jax {jax.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
    date = datetime.now(UTC).date().isoformat()
    return {"task": task.name, "tiny": tiny, "versions": versions, "date": date, **fields}


def _figures(task: Task, rows: Sequence[Row], *, tiny: bool) -> dict[str, Any]:
    if task.kind == "whole_run":
        return whole_run(tiny=tiny)
    case = Case(task.network, tiny=tiny)
    if task.kind != "pytorch":
        return _OF_A_NETWORK[task.kind](case)
    name = f"step_time/{task.network}"
    ours = [row for row in rows if row["task"] == name and row["tiny"] == tiny and is_figure(row)]
    if not ours:
        raise Skipped(f"which layers to freeze is what {name} says, which is missing")
    return pytorch(case, [share["layers"] for share in ours[-1]["shares"]])
