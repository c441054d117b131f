"""A queue of long fine-tunings, most valuable first, that goes on where it was stopped.

    python -m research.long_runs --data-dir data/tfds --weights data/weights --state runs/long --minutes 120

Every finished run is a line of ``results.jsonl``, and is not run again. First the learning rate of a case is chosen on
held-out training examples, then ``never`` runs with every policy watching, and then these run from where they leave
it. A rehearsal runs behind the first ones. Programs are compiled anew in every run, as that is part of what it takes.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import jax

from research import json_lines
from research.long_runs.bench import Bench
from research.long_runs.cases import CASES, tuned_as
from research.long_runs.rehearsal import PLAN, rehearse
from research.long_runs.run import REHEARSAL, Job, Runner, strategy_of
from research.long_runs.strategies import FIRST, STRATEGIES
from train.command_line import local_path

NAMES = (*list(STRATEGIES)[:FIRST], REHEARSAL, *list(STRATEGIES)[FIRST:])
RESULTS = Path(__file__).parent / "results.jsonl"
Row = Mapping[str, Any]


def jobs(
    rows: Sequence[Row], cases: Sequence[str], seeds: range, strategies: Sequence[str] = NAMES, first: int = FIRST
) -> Iterator[Job]:
    """What is missing, most valuable first: the first strategies seed by seed and case by case, then the others."""
    done = _done(rows)
    every = list(strategies)
    for names, seed, case in product((every[:first], every[first:]), seeds, cases):
        rates = CASES[case].rates
        missing = sorted(set(rates) - {row["rate"] for row in tried(rows, case)})
        if missing and len(rates) > 1:
            yield from (Job(tuned_as(case), "tune", 0, rate) for rate in missing)
            return  # the rest depends on what comes out
        finished = [other for other in seeds if other != seed and (case, "never", other) in done]
        for name in names:
            strategy = STRATEGIES[PLAN.rehearsed if name == REHEARSAL else name]
            if (case, name, seed) not in done and (finished or not strategy.reference):  # else nothing to compare with
                yield Job(case, name, seed, best_rate(rows, case) * strategy.rate)


def best_rate(rows: Sequence[Row], case: str) -> float:
    """The learning rate with the best figure on held-out training examples, or the only one of a case."""
    if len(CASES[case].rates) == 1:
        return CASES[case].rates[0]
    return max(tried(rows, case), key=lambda row: row[figure_of(row)])["rate"]


def tried(rows: Sequence[Row], case: str) -> list[Row]:
    """Results of the runs in which the learning rates of a case are tried."""
    return [row for row in rows if row["strategy"] == "tune" and row["case"] == tuned_as(case)]


def figure_of(row: Row) -> str:
    """Name of the figure by which a case is judged, as in the paper's tables."""
    return next(name for name in ("matthews", "f1", "accuracy") if name in row)


def work(args: argparse.Namespace) -> None:
    """Runs what is missing until the time is up."""
    deadline = time.monotonic() + 60 * args.minutes
    args.state.mkdir(parents=True, exist_ok=True)
    benches: dict[str, Bench] = {}
    while time.monotonic() < deadline:
        rows = json_lines.read(args.results, dict)
        job = next(jobs(rows, args.cases, range(args.from_seed, args.seeds), args.strategies, args.first), None)
        if job is None:
            return
        if job.case not in benches:
            benches = {job.case: _bench(args, job.case)}  # one at a time: each holds its data
        bench = benches[job.case]
        begin = time.perf_counter()
        if job.name == REHEARSAL:
            json_lines.append(args.results, rehearse(bench, job, state=args.state) | provenance())
        elif not _run(args, bench, job, _done(rows), deadline):
            return
        _say(f"{job.key}: done in {(time.perf_counter() - begin) / 60:.1f} min here")


def _run(args: argparse.Namespace, bench: Bench, job: Job, done: set[tuple[str, str, int]], deadline: float) -> bool:
    """Runs a strategy, and writes what came out; whether there was time."""
    runner = Runner(bench, job, strategy_of(bench, job), state=args.state, deadline=deadline, say=_say)
    if job.name == "never":
        missing = [name for name in args.strategies if (job.case, name, job.seed) not in done]
        runner.watch({name: STRATEGIES[name] for name in missing if name in STRATEGIES})
    _say(f"{job.key}: {runner.total_steps} steps")
    if not runner.run():
        return False
    row = runner.result() | provenance()
    for one in (row, *runner.rows_of_followers(row)):
        json_lines.append(args.results, one)
    runner.clean_up()
    return True


def _done(rows: Sequence[Row]) -> set[tuple[str, str, int]]:
    return {(row["case"], row["strategy"], row["seed"]) for row in rows}


def provenance() -> dict[str, Any]:
    """Versions, hardware and date of a row; the commit is added where it is written."""
    return {
        "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
        "hardware": f"{len(os.sched_getaffinity(0))} core of {platform.processor() or platform.machine()}",
        "date": datetime.now(UTC).date().isoformat(),
    }


def _bench(args: argparse.Namespace, case: str) -> Bench:
    return Bench(case, CASES[case], state=args.state, data_dir=args.data_dir, weights_dir=args.weights)


def _say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the script."""
    parser = argparse.ArgumentParser(prog="python -m research.long_runs", description=__doc__)
    parser.add_argument("--data-dir", type=local_path, required=True, help="data directory of TFDS")
    parser.add_argument("--weights", type=local_path, help="folder of published weights")
    parser.add_argument("--state", type=local_path, required=True, help="folder for checkpoints of unfinished runs")
    parser.add_argument("--results", type=local_path, default=RESULTS, help="finished runs (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which it stops (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="default: all")
    parser.add_argument("--strategies", nargs="+", default=NAMES, choices=NAMES, help="default: all")
    parser.add_argument(
        "--first",
        type=int,
        default=FIRST,
        help="strategies that run with all seeds before the others (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--from-seed", type=int, default=0, help="the first of them (default: %(default)s)")
    work(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
