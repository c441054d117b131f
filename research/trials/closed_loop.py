"""Compares freezing policies in the closed loop: accuracy against compute and time, seed by seed against ``never``.

Every run is a line of ``results.jsonl`` in ``--out``; what is there is not run again, so the comparison can be stopped
and gone on with, and seeds or strategies added. ``results.md`` and a picture for each case are made anew each time, and
so is a section of the file of ``--results``.

    python -m research.trials.closed_loop --data-dir data/tfds --weights data/weights --predictors runs/predictors
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import smartfrz_jax as sfj
from research import json_lines
from research.results import provenance, write_section
from research.trials import report
from research.trials.cases import CASES
from research.trials.command_line import make_parser
from research.trials.result import Result
from research.trials.strategies import Strategy, strategies
from research.trials.trial import Bench
from train.command_line import Interrupt, local_path, resumable


def wanted(args: argparse.Namespace, results: list[Result]) -> Iterator[tuple[str, str, Strategy, int]]:
    """What is still to be run: all strategies with one seed before the next.

    Of shorter schedules all learning rates are tried with seed 0 and only the best of each length with the others.
    ``results`` may grow in the meantime.
    """
    every = strategies()
    for seed in range(args.seeds):
        for case in args.cases:
            for name, strategy in asked(args).items():
                known = {(result.case, result.strategy, result.seed): result for result in results}
                if strategy.needs and find_predictor(args, case, strategy.needs) is None:
                    continue
                if strategy.length < 1 and seed > 0:
                    tried = [known.get((case, other, 0)) for other in every if every[other].length == strategy.length]
                    best = max(filter(None, tried), key=lambda result: result.accuracy, default=None)
                    if best is None or best.strategy != name:
                        continue
                if (case, name, seed) not in known:
                    yield case, name, strategy, seed


def asked(args: argparse.Namespace) -> dict[str, Strategy]:
    """The strategies that are asked for, by name."""
    return {
        name: strategy
        for name, strategy in strategies().items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in args.strategies)
    }


def left_out(args: argparse.Namespace) -> dict[str, list[str]]:
    """Names of strategies that are asked for and lack their predictor, by what is missing."""
    found: dict[str, list[str]] = {}
    for case in args.cases:
        for name, strategy in asked(args).items():
            if strategy.needs and find_predictor(args, case, strategy.needs) is None:
                missing = "--predictors" if args.predictors is None else str(args.predictors / case / strategy.needs)
                found.setdefault(missing, []).append(name)
    return found


def find_predictor(args: argparse.Namespace, case: str, kind: str) -> Path | None:
    """Checkpoint of the predictor that has not seen the network and data of a case; ``None`` if there is none."""
    if args.predictors is None:
        return None
    path = args.predictors / case / kind
    return path if path.is_dir() else None


def compare(args: argparse.Namespace, interrupt: Interrupt) -> None:
    """Runs what is missing, and writes the report."""
    sfj.enable_compilation_cache(args.out / "programs")
    file = args.out / "results.jsonl"
    results = json_lines.read(file, Result.parse)
    for missing, names in left_out(args).items():
        print(f"left out for want of {missing}: {', '.join(dict.fromkeys(names))}")
    bench: Bench | None = None
    for case, name, strategy, seed in interrupt.checked(wanted(args, results)):
        if bench is None or bench.name != case:
            bench = Bench(case, CASES[case], out=args.out, data_dir=args.data_dir, weights_dir=args.weights, say=print)
        result = bench.trial(
            name,
            strategy,
            seed,
            predictor=find_predictor(args, case, strategy.needs) if strategy.needs else None,
        )
        json_lines.append(file, result._asdict())
        results.append(result)
        print(
            f"{case:16s} {name:20s} seed {seed}: accuracy {result.accuracy:.4f}, compute {result.compute:.2f}, "
            f"kept {result.compute_cached:.2f}, {result.seconds:.0f} s",
            flush=True,
        )
    if not results:
        raise ValueError("predictors: there is nothing to compare, as all that is asked for lacks its predictor")
    write_report(args, results)


def write_report(args: argparse.Namespace, results: list[Result]) -> None:
    """Writes ``results.md``, a picture for each case, and the section of ``--results``."""
    pictures = args.pictures or args.out
    pictures.mkdir(parents=True, exist_ok=True)
    for case, of_case in _by_case(results).items():
        report.picture(report.rows(of_case), pictures / f"{case}.png", case)
    (args.out / "results.md").write_text(f"{_text(args, results, args.out)}\n")
    if args.results is not None:
        write_section(args.results, "closed loop", _text(args, results, args.results.parent))
    print(f"table and pictures are in {args.out}{f' and {pictures}' if pictures != args.out else ''}")


def _by_case(results: list[Result]) -> dict[str, list[Result]]:
    found = {case: [result for result in results if result.case == case] for case in CASES}
    return {case: of_case for case, of_case in found.items() if of_case}


def _text(args: argparse.Namespace, results: list[Result], base: Path) -> str:
    """The tables, with links to the pictures from a folder."""
    parts = [f"{provenance('research.trials.closed_loop')} {json_lines.commits(args.out / 'results.jsonl')}"]
    for case, of_case in _by_case(results).items():
        link = Path(os.path.relpath((args.pictures or args.out) / f"{case}.png", base)).as_posix()
        parts.append(f"### {case}\n\n![accuracy against compute]({link})\n\n{report.table(report.rows(of_case))}")
        parts.append(f"At the same compute:\n\n{report.matched(of_case)}")
        parts.append(f"With kept activations:\n\n{report.matched(of_case, cached=True)}")
    return "\n\n".join(parts)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("closed_loop", __doc__)
    parser.add_argument("--pictures", type=local_path, metavar="FOLDER", help="folder for pictures (default: --out)")
    parser.add_argument(
        "--predictors",
        type=local_path,
        help="folder with those of each case as research.predictors.fit --without makes them: CASE/predictor, and "
        "CASE/paper_predictor, CASE/cka_predictor and so on for those trained otherwise; without it no smartfrz",
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="what to compare on")
    parser.add_argument("--strategies", nargs="+", default=["*"], help="patterns of what to compare, such as static:*")
    parser.add_argument("--seeds", type=int, default=3, help="seeds, from 0 (default: %(default)s)")
    args = parser.parse_args(argv)
    for pattern in args.strategies:
        if not fnmatch.filter(strategies(), pattern):
            parser.error(f"argument --strategies: {pattern!r} matches none of {', '.join(strategies())}")
    if args.predictors is not None and not args.predictors.is_dir():
        parser.error(
            f"argument --predictors: no folder {args.predictors}; make one with research.predictors.fit, or leave "
            "the option out to do without smartfrz"
        )
    if args.seeds < 1:
        parser.error(f"argument --seeds: got {args.seeds}, expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code: 0, 2 if something asked for is wrong, 130 if interrupted."""
    return resumable(compare, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
