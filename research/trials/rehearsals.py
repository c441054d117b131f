"""Whether a rehearsal tells if freezing from the start is harmless: short runs beside the long ones they stand for.

For every fine-tuning what ``PLAN`` rehearses is tried with some seeds, and what may follow run at full length with some
of these. Results are lines of ``rehearsals.jsonl`` and ``results.jsonl`` in ``--out``; what is there is not run again.

    python -m research.trials.rehearsals --data-dir data/tfds --weights data/weights
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import sys
from collections.abc import Iterator

import smartfrz_jax as sfj
from research import json_lines
from research.recordings.plan import runs
from research.results import provenance, publish
from research.trials.cases import CASES, Case
from research.trials.command_line import make_parser, matches
from research.trials.rehearsed import Plan, Rehearsed, report
from research.trials.result import Result
from research.trials.strategies import strategies
from research.trials.trial import Bench
from train.command_line import Interrupt, resumable

# The rest from 60 % of the run on: from half time it costs EfficientNet-Lite0 twice as much for little more saved.
PLAN = Plan(rehearsed="static:half", ready="static:half,all:0.6", otherwise="progress:0.95")
_HELD_OUT = 2000
_LONG = 4  # times the steps of the closed loop's case


def cases() -> dict[str, Case]:
    """Fine-tunings by name: those of the closed loop, one of them longer, and of recorded runs the pre-trained ones."""
    strong = CASES["lite0-cifar10"]
    longer = dataclasses.replace(strong.setup, steps=_LONG * strong.setup.steps)
    pretrained = [run for run in runs() if run.pretraining != "scratch" and run.epochs is None]
    return {
        **CASES,
        "lite0-cifar10-long": strong._replace(setup=longer),
        **{run.name: Case(run, _HELD_OUT) for run in pretrained},
    }


def compare(args: argparse.Namespace, interrupt: Interrupt) -> None:
    """Runs what is missing, and writes the tables."""
    sfj.enable_compilation_cache(args.out / "programs")
    files = args.out / "rehearsals.jsonl", args.out / "results.jsonl"
    rehearsals, results = json_lines.read(files[0], Rehearsed.parse), json_lines.read(files[1], Result.parse)
    for name in interrupt.checked(name for name in cases() if matches(name, args.cases)):
        measure(name, args, rehearsals, results, interrupt)
    origin = f"{provenance('research.trials.rehearsals')} {json_lines.commits(*files)}"
    text = f"{origin}\n\n{report(rehearsals, results, PLAN)}"
    publish(text, args.out / "rehearsals.md", section="rehearsals", results=args.results)


def measure(
    name: str, args: argparse.Namespace, rehearsals: list[Rehearsed], results: list[Result], interrupt: Interrupt
) -> None:
    """Runs what is missing of a fine-tuning, and puts it at the end of the lists and files."""
    done = {(row.case, row.seed, row.share) for row in rehearsals}
    known = {(row.case, row.seed, row.strategy) for row in results}
    every = strategies()
    bench: Bench | None = None
    for seed, what in interrupt.checked(wanted(args)):
        if (name, seed, what) in done | known:
            continue
        if bench is None:
            case = cases()[name]
            bench = Bench(name, case, out=args.out, data_dir=args.data_dir, weights_dir=args.weights, say=print)
        if isinstance(what, str):
            results.append(bench.trial(what, every[what], seed, predictor=None))
            json_lines.append(args.out / "results.jsonl", results[-1]._asdict())
            print(f"{name} seed {seed}, {what}: accuracy {results[-1].accuracy:.4f}", flush=True)
        else:
            rehearsal, compute = bench.rehearse({PLAN.rehearsed: every[PLAN.rehearsed]}, what, seed)
            rehearsals.append(Rehearsed(name, seed, what, compute, rehearsal))
            json_lines.append(args.out / "rehearsals.jsonl", rehearsals[-1].as_json())
            print(f"{name} seed {seed}, {what} of the run: {rehearsal}", flush=True)


def wanted(args: argparse.Namespace) -> Iterator[tuple[int, float | str]]:
    """What is to be run of each fine-tuning, with its seed: rehearsals by their share of the steps, then strategies."""
    yield from ((seed, share) for seed in range(args.seeds) for share in args.shares)
    yield from ((seed, name) for seed in range(args.full_seeds) for name in args.strategies)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("rehearsals", __doc__)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=list(CASES),
        help="patterns of fine-tunings: those of closed_loop, lite0-cifar10-long (of 800 steps), or recorded runs",
    )
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0.05, 0.1], help="steps of rehearsals, as shares of the full run's"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of rehearsals, from 0 (default: %(default)s)")
    parser.add_argument("--full-seeds", type=int, default=3, help="seeds of full runs (default: %(default)s)")
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=[name for name, strategy in strategies().items() if strategy.needs is None],
        default=["never", *PLAN],
        metavar="STRATEGY",
        help=f"what is run at full length: %(choices)s (default: never {' '.join(PLAN)})",
    )
    args = parser.parse_args(argv)
    known = cases()
    for pattern in args.cases:
        if not fnmatch.filter(known, pattern):
            parser.error(f"argument --cases: {pattern!r} matches none of {', '.join(known)}")
    if args.seeds < 1 or not 0 <= args.full_seeds <= args.seeds:
        parser.error(
            f"arguments --seeds, --full-seeds: got {args.seeds} and {args.full_seeds}, expected at least one seed, and "
            "no more full runs than rehearsals"
        )
    if not all(0 < share < 1 for share in args.shares):
        parser.error(f"argument --shares: got {args.shares}, expected shares above 0 and below 1")
    for name, case in known.items():
        if matches(name, args.cases) and not round(min(args.shares) * case.setup.steps):
            parser.error(
                f"argument --shares: got {min(args.shares)}, which is none of the {case.setup.steps} steps of {name}; "
                f"expected at least {1 / case.setup.steps:.2g}"
            )
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code: 0, 2 if something asked for is wrong, 130 if interrupted."""
    return resumable(compare, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
