"""What keeping the activations of frozen layers saves in whole runs: FLOPs, time and accuracy, measured.

Every strategy is run with and without them, after ``never`` with the same seed, one run after the other. Every run is a
line of ``runs.jsonl`` in ``--out``; what is there is not run again. Time is worth something only where nothing runs
beside it.

    python -m research.trials.kept_runs --data-dir data/tfds --weights data/weights --cases lite0-cifar10
"""

from __future__ import annotations

import argparse
import fnmatch
import sys

import smartfrz_jax as sfj
from research import json_lines
from research.results import provenance, publish
from research.trials.cases import CASES
from research.trials.command_line import make_parser, matches
from research.trials.kept import KeptRun, measure, report
from research.trials.strategies import strategies
from research.trials.trial import Bench
from train.command_line import Interrupt, resumable


def compare(args: argparse.Namespace, interrupt: Interrupt) -> None:
    """Runs what is missing, and writes the tables."""
    sfj.enable_compilation_cache(args.out / "programs")
    file, every = args.out / "runs.jsonl", strategies()
    runs = json_lines.read(file, KeptRun.parse)
    known = {(run.case, run.strategy, run.seed, run.kept) for run in runs}
    names = ["never", *(name for name in every if name != "never" and matches(name, args.strategies))]
    for case in (case for case in CASES if matches(case, args.cases)):
        bench: Bench | None = None
        wanted = [
            (seed, name, kept)
            for seed in range(args.seeds)
            for name in names
            for kept in (False, *((True,) if name != "never" else ()))
            if (case, name, seed, kept) not in known
        ]
        for seed, name, kept in interrupt.checked(wanted):
            if bench is None:
                bench = Bench(
                    case, CASES[case], out=args.out, data_dir=args.data_dir, weights_dir=args.weights, say=print
                )
            runs.append(measure(bench, name, every[name], seed, kept=kept))
            json_lines.append(file, runs[-1]._asdict())
            how = ", activations kept" if kept else ""
            print(f"{case} {name} seed {seed}{how}: {runs[-1].accuracy:.3f}, {runs[-1].seconds:.0f} s", flush=True)
    text = f"{provenance('research.trials.kept_runs')} {json_lines.commits(file)}\n\n{report(runs)}"
    publish(text, args.out / "runs.md", section="kept", results=args.results)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("kept_runs", __doc__)
    parser.add_argument("--cases", nargs="+", default=["*"], help="patterns of cases (default: all)")
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=["static:half", "static:half,all*", "progress:0.5"],
        help="patterns of strategies beside never, of those without a predictor (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds, from 0 (default: %(default)s)")
    args = parser.parse_args(argv)
    for argument, names in (("cases", list(CASES)), ("strategies", list(strategies()))):
        for pattern in getattr(args, argument):
            if not fnmatch.filter(names, pattern):
                parser.error(f"argument --{argument}: {pattern!r} matches none of {', '.join(names)}")
    needy = [name for name, one in strategies().items() if one.needs and matches(name, args.strategies)]
    if needy:
        parser.error(f"argument --strategies: {needy[0]} needs a predictor; choose others")
    if args.seeds < 1:
        parser.error(f"argument --seeds: got {args.seeds}, expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code: 0, 2 if something asked for is wrong, 130 if interrupted."""
    return resumable(compare, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
