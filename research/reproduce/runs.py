"""Runs on the paper's scale: what is missing, most valuable first, by ``train.finetune``, and what a run came to."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from research import json_lines
from research.long_runs.__main__ import figure_of
from research.reproduce.plans import Plan, Scale, Setup
from train import finetune
from train.log import Run, read

_INTERRUPTED = (75, 130)  # exit codes of a run that goes on when it is called again


class InterruptedRunError(Exception):
    """A run was interrupted; it goes on when it is called again.

    Args:
        code: Exit code of the interrupted run.
    """

    def __init__(self, code: int):
        super().__init__(f"interrupted ({code}); the same command goes on")
        self.code = code


class PaperRun(NamedTuple):
    """A run to do.

    Attributes:
        setup: What is trained.
        method: What freezes, as the paper calls it.
        policy: Options of ``train.finetune`` that choose it.
        seed: The seed.
    """

    setup: Setup
    method: str
    policy: tuple[str, ...]
    seed: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        """By which its result is known."""
        return self.setup.network, self.setup.data, self.method, self.seed

    @property
    def folder(self) -> str:
        """A name for its folder."""
        return "-".join(map(str, self.key)).replace(" ", "-").lower()

    def options(self, out: Path, data_dir: Path, weights_dir: Path) -> list[str]:
        """The command line."""
        files = [part for option, name in self.setup.files.items() for part in (option, str(weights_dir / name))]
        where = ["--out", str(out / self.folder), "--data-dir", str(data_dir), "--seed", str(self.seed), "--quiet"]
        resume = ["--resume"] if (out / self.folder / "log.jsonl").exists() else []
        policy = [part.replace("{state}", str(out)) for part in self.policy]
        return [*self.setup.options, *policy, *files, *where, *resume]


def missing(
    plans: Sequence[Plan], rows: Sequence[Mapping[str, Any]], seeds: int, scale: Scale = "paper"
) -> Iterator[PaperRun]:
    """The runs that no row is of: seed by seed, table by table."""
    done = {(row["network"], row["data"], row["method"], row["seed"]) for row in rows}
    for seed, plan in product(range(seeds), plans):
        setups = plan.setups if scale == "paper" else plan.small
        for setup, (method, policy) in product(setups, plan.policies.items()):
            run = PaperRun(setup, method, policy, seed)
            if run.key not in done:
                yield run


def work(
    plans: Sequence[Plan],
    *,
    results: Path,
    out: Path,
    data_dir: Path,
    weights_dir: Path,
    seeds: int,
    minutes: float,
    scale: Scale,
) -> int:
    """Runs what is missing until the time is up; returns the exit code.

    A run that has begun is not stopped for the time; one that was interrupted goes on when this is called again.

    Raises:
        InterruptedRunError: If one was interrupted.
    """
    deadline = time.monotonic() + 60 * minutes
    failed: set[tuple[str, str, str, int]] = set()
    while time.monotonic() < deadline:
        runs = missing(plans, json_lines.read(results, dict), seeds, scale)
        run = next((one for one in runs if one.key not in failed), None)
        if run is None:
            break
        print(f"{run.folder}: begins", flush=True)
        try:
            log = finished(run, out, data_dir, weights_dir)
        except ValueError as error:  # it has said why; weights or data may be missing for this network alone
            print(error, file=sys.stderr)
            failed.add(run.key)
            continue
        json_lines.append(results, row_of(run, log))
    return 2 if failed else 0


def finished(run: PaperRun, out: Path, data_dir: Path, weights_dir: Path) -> Run:
    """Runs it, or goes on with it, or only reads what it came to.

    Raises:
        ValueError: If it cannot run; it has said why.
        InterruptedRunError: If it was interrupted.
    """
    if not (out / run.folder / "model.safetensors").exists():  # written last
        code = finetune.main(run.options(out, data_dir, weights_dir))
        if code in _INTERRUPTED:
            raise InterruptedRunError(code)
        if code:
            raise ValueError(f"{run.folder}: could not run")
    return read(out / run.folder / "log.jsonl")


def row_of(run: PaperRun, log: Run) -> dict[str, Any]:
    """What a run came to: figures in percent, seconds with waiting for programs, TFLOPs of the compiled steps."""
    name = figure_of(log.metrics)
    return {
        "network": run.setup.network,
        "data": run.setup.data,
        "method": run.method,
        "seed": run.seed,
        "metric": name,
        "percent": 100 * log.metrics[name],
        "seconds": log.seconds + log.wait_seconds,
        "tflops": log.tflops,
        "options": [*run.setup.options, *run.policy],
        "frozen": [[event.step, list(event.names), list(event.returned)] for event in log.freezes],
        "layers": list(log.layers),
        "steps": len(log.steps),
        "memory": [[phase.step, phase.frozen, phase.peak_bytes] for phase in log.phases],
    }
