"""What a training run did, as JSON lines on disk and as an object: settings, steps, programs, freezes, evaluations."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np

import smartfrz_jax as sfj
from smartfrz_jax.pytrees.file_paths import Path, is_remote


class Step(NamedTuple):
    """One train step.

    Attributes:
        step: Its number, from 1.
        loss: Loss of its batch; None if it is not finite.
        seconds: Seconds it took, compilation apart, and the policy after it included: the mean over the steps that the
            loop looked at together, as it does not wait for each.
        policy_seconds: Of these, seconds that the loop spent on the policy: dispatching what it computes, waiting for
            verdicts, moving the optimizer state. What the device computes for it meanwhile is not told apart.
        frozen: Number of layers frozen in it.
        flops: FLOPs of its compiled program on all devices, and of activations to be kept; predicted where blocks are
            scanned, of which XLA counts one.
        peak_bytes: Bytes that program needs on a device: parameters, optimizer state, batch, temporary buffers.
    """

    step: int
    loss: float | None
    seconds: float
    policy_seconds: float
    frozen: int
    flops: float
    peak_bytes: int


class Compiled(NamedTuple):
    """A program of the train step; the first with the same layers frozen begins a phase.

    Attributes:
        step: Step that needed it first.
        frozen: Number of layers frozen in it.
        seconds: Seconds it took to trace and compile, in whichever run it was first needed.
        ahead: Whether it was compiled while training went on.
        waited: Seconds that this run stood still for it.
        held_bytes: Bytes of the arrays that the run holds after its first step: model, optimizer, policy, batch, and
            activations that are kept.
        reason: Why it was compiled though there was one for the same frozen layers; None if there was none.
    """

    step: int
    frozen: int
    seconds: float
    ahead: bool
    waited: float
    held_bytes: int
    reason: str | None = None


class Phase(NamedTuple):
    """Steps in a row with the same layers frozen.

    Attributes:
        step: The first of them.
        steps: Their number.
        frozen: Number of layers frozen.
        seconds: Median over the steps of their seconds, which are means of a few steps.
        flops: Median of the FLOPs of a step.
        peak_bytes: Bytes that the program needs.
        held_bytes: Bytes of the arrays that the run holds between the steps, from the first time of its program.
    """

    step: int
    steps: int
    frozen: int
    seconds: float
    flops: float
    peak_bytes: int
    held_bytes: int


class Evaluation(NamedTuple):
    """Figures on the evaluation split.

    Attributes:
        step: Number of train steps done before.
        metrics: The figures by name, the main one first.
    """

    step: int
    metrics: dict[str, float]


@dataclasses.dataclass
class Run:
    """What one run did and cost.

    Attributes:
        name: Name of the policy.
        layers: Layer names, front to back.
        settings: What the run was started with.
        steps: The train steps.
        programs: The programs they ran.
        freezes: What froze when.
        evaluations: Figures on the evaluation split, in order.
    """

    name: str
    layers: tuple[str, ...]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: list[Step] = dataclasses.field(default_factory=list)
    programs: list[Compiled] = dataclasses.field(default_factory=list)
    freezes: list[sfj.FreezeEvent] = dataclasses.field(default_factory=list)
    evaluations: list[Evaluation] = dataclasses.field(default_factory=list)

    @property
    def flops_of(self) -> str:
        """What the FLOPs of the steps are those of; see :class:`Step`."""
        loops = self.settings.get("scan") or self.settings.get("accumulate", 1) > 1
        return "predicted steps" if loops else "compiled programs"

    @property
    def tflops(self) -> float:
        """TFLOPs of all steps."""
        return sum(step.flops for step in self.steps) / 1e12

    @property
    def skipped(self) -> int:
        """Number of steps that were left out: where a run goes on after a loss that is not finite, they were."""
        return sum(step.loss is None for step in self.steps)

    @property
    def policy_seconds(self) -> float:
        """Seconds of the loop for the policy, which are part of :attr:`seconds`."""
        return sum(step.policy_seconds for step in self.steps)

    @property
    def seconds(self) -> float:
        """Seconds of all steps, the policy's included, without compilation and evaluation."""
        return sum(step.seconds for step in self.steps)

    @property
    def compile_seconds(self) -> float:
        """Seconds of tracing and compiling the programs of this run."""
        return sum(program.seconds for program in self.programs)

    @property
    def wait_seconds(self) -> float:
        """Seconds that the run stood still for tracing and compiling."""
        return sum(program.waited for program in self.programs)

    @property
    def phases(self) -> list[Phase]:
        """The phases, in order: step time and memory over time."""
        held_bytes = {program.frozen: program.held_bytes for program in self.programs}
        phases = []
        for _, group in itertools.groupby(self.steps, key=lambda step: (step.frozen, step.peak_bytes)):
            steps = list(group)
            first = steps[0]
            seconds, flops = (float(np.median([getattr(step, of) for step in steps])) for of in ("seconds", "flops"))
            phases.append(
                Phase(
                    first.step,
                    len(steps),
                    first.frozen,
                    seconds,
                    flops,
                    first.peak_bytes,
                    held_bytes.get(first.frozen, 0),
                )
            )
        return phases

    @property
    def frozen_share(self) -> float:
        """Share of the layers that were frozen, over all steps."""
        return float(np.mean([step.frozen for step in self.steps])) / len(self.layers)

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of the last evaluation; empty before the first."""
        return self.evaluations[-1].metrics if self.evaluations else {}


_KINDS = {"step": ("steps", Step), "program": ("programs", Compiled), "freeze": ("freezes", sfj.FreezeEvent),
          "evaluation": ("evaluations", Evaluation)}  # fmt: skip


class Log:
    """Writes a run to a file as it goes on: a line of JSON for the settings, then one for each thing that happens.

    Every line has a key ``event``: ``run``, ``step``, ``program``, ``freeze`` or ``evaluation``; the other keys are the
    attributes of :class:`Run`, :class:`Step`, :class:`Compiled`, ``FreezeEvent`` and :class:`Evaluation`.

    Args:
        path: The file; None for a run that another process writes down. It is written anew; one that is there stays
            whole until all the run has is written. In an object store, where nothing can be added to a file, it is
            written again by :meth:`flush` and at the end.
        run: The run; lines are written for what it has already.
        callbacks: What is told of every step, of the figures of every evaluation, and of what freezes.

    Raises:
        OSError: If the file cannot be written.

    A context manager, which closes the file.
    """

    def __init__(self, path: Path | None, run: Run, callbacks: Sequence[sfj.callbacks.Callback] = ()):
        self.run, self._callbacks = run, callbacks
        lines = [_line("run", {"name": run.name, "layers": run.layers, "settings": run.settings})]
        for event, (field, _) in _KINDS.items():
            lines += [_line(event, item._asdict()) for item in getattr(run, field)]
        self._path, self._lines = path, lines
        self._file: TextIO | None = None
        if path is None:
            return
        write_whole(path, "".join(lines))
        if not is_remote(path):
            self._file = path.open("a")  # pyright: ignore[reportAttributeAccessIssue]

    def add(self, *items: Step | Compiled | sfj.FreezeEvent | Evaluation) -> None:
        """Adds what happened to the run and to the file."""
        lines = []
        for item in items:
            event, field = next((event, field) for event, (field, kind) in _KINDS.items() if isinstance(item, kind))
            getattr(self.run, field).append(item)
            lines.append(_line(event, item._asdict()))
        if self._file is not None:
            self._file.write("".join(lines))
            self._file.flush()
        elif self._path is not None:
            self._lines += lines
        for callback in self._callbacks:
            for item in items:
                _tell(callback, item)

    def flush(self) -> None:
        """Writes what was added, where that is not done at once: call it before a checkpoint that is to go with it.

        Raises:
            OSError: If it cannot be written.
        """
        if self._file is None and self._path is not None:
            write_whole(self._path, "".join(self._lines))

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def _tell(callback: sfj.callbacks.Callback, item: Step | Compiled | sfj.FreezeEvent | Evaluation) -> None:
    match item:
        case Step():
            loss = math.nan if item.loss is None else item.loss
            metrics = {name: value for name, value in item._asdict().items() if name not in ("step", "frozen")}
            callback.on_step(item.step, metrics | {"loss": loss, "frozen_layers": item.frozen})
        case Evaluation():
            callback.on_step(item.step, {f"evaluation/{name}": value for name, value in item.metrics.items()})
        case sfj.FreezeEvent():
            callback.on_freeze(item)


def _line(event: str, fields: dict[str, Any]) -> str:
    return json.dumps({"event": event} | fields, allow_nan=False) + "\n"


def finite(value: float) -> float | None:
    """``value``, or None if it is infinite or not a number, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def read(path: Path, *, until: int | None = None, argument: str = "path") -> Run:
    """Reads a log.

    Args:
        path: The file.
        until: Leave out what happened after this step; all is read by default.
        argument: What errors name, where the path is not what was asked for.

    Returns:
        The run, as far as it was written.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If it is not a log.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: {path} is not there; expected the log.jsonl of a run")
    # A line without its end was being written when the run was killed.
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    try:
        entries = [json.loads(line) for line in lines]
        head = entries[0]
        run = Run(head["name"], tuple(head["layers"]), head["settings"])
        for entry in entries[1:]:
            field, kind = _KINDS[entry.pop("event")]
            item = kind(**entry)
            if until is None or item.step <= until:
                getattr(run, field).append(item)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{argument}: {path} is not the log of a run ({type(error).__name__}: {error}); expected the log.jsonl "
            "that train.finetune writes"
        ) from error
    run.freezes = [sfj.FreezeEvent(at, tuple(names), tuple(returned)) for at, names, returned in run.freezes]
    return run


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside another and puts it in its place: killed at any moment, one of the two is there whole.

    Args:
        path: The file; it is made if it is not there.
        text: What is to be in it.

    Raises:
        OSError: If it cannot be written.
    """
    if is_remote(path):  # where files are only written whole
        path.write_text(text)
        return
    target = path.resolve()  # of a link, what it points to
    part = target.with_name(f"{target.name}.part")
    part.write_text(text)
    os.replace(part, target)
