"""Makes the paper's tables and figures again: ``python -m research.reproduce table2 figure5 --minutes 60``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from research import json_lines
from research.long_runs import __main__ as long_runs
from research.reproduce import questions, regimes, runs
from research.reproduce.figures import work as measuring
from research.reproduce.figures import write as figures
from research.reproduce.page import page
from research.reproduce.plans import PLANS, Plan
from research.reproduce.predictors import make
from research.reproduce.predictors.settings import LEARNED
from train.command_line import local_path
from train.log import write_whole

FOLDER = Path(__file__).parent
ROWS = "results.jsonl"  # of runs by train.finetune
QUESTIONS = "questions"

_DESCRIPTION = """\
Makes tables and figures of the paper again, and writes results.md, figures.md, questions.md and regimes.md.

  --scale cpu    smaller networks and images; for tables whole data sets, hours of one core a run: research.long_runs
  --scale paper  the paper's networks at 224 x 224, by train.finetune; --weights holds resnet50.safetensors and others

What is finished is not run again, and what was interrupted goes on. Without a name only the pages are written.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m research.reproduce",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = (*PLANS, *measuring.FIGURES, QUESTIONS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--scale", choices=("cpu", "paper"), default="cpu", help="default: %(default)s")
    parser.add_argument("--data-dir", type=local_path, help="data directory of TFDS")
    parser.add_argument("--weights", type=local_path, help="folder of published weights")
    parser.add_argument("--state", type=local_path, help="folder for unfinished runs")
    parser.add_argument("--seeds", type=int, default=3, help="of tables (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no run begins (default: %(default)s)")
    parser.add_argument(
        "--results", type=local_path, default=long_runs.RESULTS, help="finished long runs (default: the repository's)"
    )
    parser.add_argument(
        "--out", type=local_path, default=FOLDER, help="where pages are, and the rows of all but the long runs"
    )
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in names:
            parser.error(f"NAME: got {name}, expected some of {', '.join(names)}")
    code = 0
    if args.names:
        for name in ("data_dir", "weights", "state"):
            if getattr(args, name) is None:
                parser.error(f"--{name.replace('_', '-')} is needed to run {', '.join(args.names)}; see --help")
        try:
            code = _run(args)
        except runs.InterruptedRunError as error:
            print(error, file=sys.stderr)
            code = error.code
    of_long_runs = json_lines.read(args.results, dict)
    write_whole(args.out / "results.md", page(of_long_runs, json_lines.read(args.out / ROWS, dict)))
    write_whole(args.out / "regimes.md", regimes.page(of_long_runs))
    recorded = figures.recorded_curves()
    figures.write(args.out, recorded)
    predictors, shown = (json_lines.read(args.out / file, dict) for file in (make.ROWS, figures.ROWS))
    text = questions.page(predictors, shown, [curves for _, curves in recorded.values()])
    write_whole(args.out / "questions.md", text)
    return code


def _run(args: argparse.Namespace) -> int:
    """What is missing of the figures, which are short, and of the tables, until the time is up."""
    end = time.monotonic() + 60 * args.minutes
    args.state.mkdir(parents=True, exist_ok=True)
    shown = [name for name in args.names if name in measuring.FIGURES]
    tables = [PLANS[name] for name in args.names if name in PLANS]
    codes = [0]
    if shown:
        folders = measuring.Folders(args.state, args.data_dir, args.weights)
        results = args.out / figures.ROWS
        codes.append(measuring.work(shown, args.scale, folders, results=results, minutes=_left(end), say=_say))
    of_long_runs = [plan for plan in tables if args.scale == "cpu" and plan.cases]
    if of_long_runs:
        codes.append(_long_runs(args, of_long_runs, _left(end)))
    own = [plan for plan in tables if (plan.small if args.scale == "cpu" else plan.setups)]
    workshop = make.Workshop(args.state, args.data_dir, args.weights, _say)
    if QUESTIONS in args.names:
        make.work(workshop, LEARNED, results=args.out / make.ROWS, minutes=_left(end))
    rows = json_lines.read(args.out / ROWS, dict)
    unfinished = [plan for plan in own if any(runs.missing([plan], rows, args.seeds, args.scale))]
    for setting in dict.fromkeys(setting for plan in unfinished for setting in plan.settings):
        if _left(end):
            workshop.predictor(setting, LEARNED)
    if own:
        codes.append(
            runs.work(
                own,
                results=args.out / ROWS,
                out=args.state,
                data_dir=args.data_dir,
                weights_dir=args.weights,
                seeds=args.seeds,
                minutes=_left(end),
                scale=args.scale,
            )
        )
    return max(codes)


def _left(end: float) -> float:
    return max(0.0, end - time.monotonic()) / 60


def _say(text: str) -> None:
    print(text, flush=True)


def _long_runs(args: argparse.Namespace, plans: list[Plan], minutes: float) -> int:
    cases = dict.fromkeys(case for plan in plans for case in plan.cases)
    strategies = dict.fromkeys(name for plan in plans for name in ("never", *plan.strategies))
    options = ["--data-dir", args.data_dir, "--weights", args.weights, "--state", args.state]
    options += ["--minutes", minutes, "--seeds", args.seeds, "--results", args.results]
    return long_runs.main([*map(str, options), "--cases", *cases, "--strategies", *strategies])


if __name__ == "__main__":
    sys.exit(main())
