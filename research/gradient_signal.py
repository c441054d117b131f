"""Whether the gradients of the first steps tell if a network's front can be frozen from the start.

The share of the signal in every layer's gradients, beside what freezing the front came to in full runs that
``research.trials.rehearsals`` made. Every measurement is a line of ``gradient_signal.jsonl``; what is there is not
made again.

    python -m research.gradient_signal --data-dir data/tfds --weights data/weights
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path

import smartfrz_jax as sfj
from research import json_lines
from research.results import provenance, publish
from research.trials.command_line import make_parser
from research.trials.gradient_signal import FRONT, Signal, measure, report
from research.trials.rehearsals import cases
from research.trials.result import Result, beside_never
from research.trials.trial import Bench
from train.command_line import Interrupt, local_path, resumable

_FULL_RUNS = Path(__file__).resolve().parents[1] / "benchmarks" / "rehearsals" / "results.jsonl"


def compare(args: argparse.Namespace, interrupt: Interrupt) -> None:
    """Measures what is missing, and writes the table."""
    sfj.enable_compilation_cache(args.out / "programs")
    file = args.out / "gradient_signal.jsonl"
    signals, results = json_lines.read(file, Signal.parse), json_lines.read(args.full_runs, Result.parse)
    known = {(signal.case, signal.seed, signal.steps) for signal in signals}
    wanted = {name: max(2, round(args.share * cases()[name].setup.steps)) for name in chosen(args.cases, results)}
    for name, steps in wanted.items():
        bench: Bench | None = None
        for seed in interrupt.checked(seed for seed in range(args.seeds) if (name, seed, steps) not in known):
            if bench is None:
                case = cases()[name]
                bench = Bench(name, case, out=args.out, data_dir=args.data_dir, weights_dir=args.weights, say=print)
            signals.append(measure(bench, steps, seed))
            json_lines.append(file, signals[-1]._asdict())
            print(f"{name} seed {seed}: measured in {steps} steps", flush=True)
    signals = [signal for signal in signals if signal.steps == wanted.get(signal.case)]
    text = f"{provenance('research.gradient_signal')} {json_lines.commits(file)}\n\n{report(signals, results)}"
    publish(text, args.out / "gradient_signal.md", section="gradient signal", results=args.results)


def chosen(patterns: list[str], results: list[Result]) -> list[str]:
    """Names of fine-tunings with full runs, in the order of these.

    Raises:
        ValueError: If a pattern matches none of them.
    """
    known = [case for case, strategy in beside_never(results) if strategy == FRONT]
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise ValueError(
                f"cases: {pattern!r} matches none of {', '.join(known) or 'the full runs, which are none'}"
            )
    return [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("gradient_signal", __doc__)
    parser.add_argument(
        "--full-runs",
        type=local_path,
        default=_FULL_RUNS,
        metavar="FILE",
        help=f"results.jsonl of research.trials.rehearsals with {FRONT} and never (default: those of the repository)",
    )
    parser.add_argument(
        "--cases", nargs="+", default=["*"], help="patterns of fine-tunings (default: all with full runs)"
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.05,
        help="steps, two at least, as a share of the full run's (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=2, help="seeds, from 0 (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 < args.share <= 1:
        parser.error(f"argument --share: got {args.share}, expected a share above 0 and at most 1")
    if args.seeds < 1:
        parser.error(f"argument --seeds: got {args.seeds}, expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code: 0, 2 if something asked for is wrong, 130 if interrupted."""
    return resumable(compare, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
