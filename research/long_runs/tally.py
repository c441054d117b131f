"""What a run has cost and seen so far; kept beside its checkpoint."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import smartfrz_jax as sfj
from train.log import write_whole

_POINTS = 50  # of the curve of the training loss


@dataclasses.dataclass
class Tally:
    """Sums over the steps of a run.

    Attributes:
        steps: Train steps done.
        train_seconds: Wall time of the steps, without waiting for programs.
        train_cpu_seconds: The same of the processor; where something else runs beside it, this is the one to compare.
        decide_seconds: Wall time of the policy, and of moving the optimizer state.
        wait_seconds: Wall time in which the run stood still for its programs; each counted once, however often the run
            was interrupted.
        flops: FLOPs of the compiled programs, summed over the steps, and of computing activations that are kept.
        programs: For every frozen set that was used: number of layers, FLOPs of a step, peak bytes, seconds of tracing
            and compiling.
        stored_bytes: Of the activations that were kept, at most.
        kept_from: Steps done before the first whose activations are among those that are kept; None if none are.
        losses: Sum of the losses of each fiftieth of the run, and the number of steps in it.
    """

    steps: int = 0
    train_seconds: float = 0.0
    train_cpu_seconds: float = 0.0
    decide_seconds: float = 0.0
    wait_seconds: float = 0.0
    flops: float = 0.0
    programs: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    stored_bytes: int = 0
    kept_from: int | None = None
    losses: list[list[float]] = dataclasses.field(default_factory=lambda: [[0.0, 0] for _ in range(_POINTS)])

    def add_program(self, program: sfj.Program, waited: float) -> None:
        """Counts a program, unless it was there before an interruption."""
        key = ",".join(sorted(program.frozen.names))
        if key not in self.programs:
            cost = program.cost
            seconds = cost.trace_seconds + cost.compile_seconds
            self.programs[key] = [len(program.frozen.names), cost.flops, cost.peak_bytes, seconds]
            self.wait_seconds += waited

    def add_loss(self, loss: float, total_steps: int) -> None:
        """Counts the loss of the step just done."""
        point = self.losses[min(_POINTS - 1, (self.steps - 1) * _POINTS // total_steps)]
        point[0] += loss
        point[1] += 1

    def add_kept(self, nbytes: int) -> None:
        """Counts the bytes that the step just done had kept; 0 if it kept nothing."""
        self.stored_bytes = max(self.stored_bytes, nbytes)
        if not nbytes:
            self.kept_from = None
        elif self.kept_from is None:
            self.kept_from = self.steps - 1

    @property
    def curve(self) -> list[float]:
        """Mean training loss of each fiftieth of the run."""
        return [round(total / n, 5) if n else float(np.nan) for total, n in self.losses]

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        write_whole(path, json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Tally:
        """Reads what :meth:`write` wrote."""
        fields: dict[str, Any] = json.loads(path.read_text())
        return cls(**fields)


class Clock:
    """Wall time and processor time of a ``with`` block."""

    wall = cpu = 0.0

    def __enter__(self) -> Clock:
        self.wall, self.cpu = -time.perf_counter(), -time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()
