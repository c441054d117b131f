"""Makes tables of the paper again: ``python -m research.reproduce table2 --scale cpu --minutes 60``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from research import json_lines
from research.long_runs import __main__ as long_runs
from research.reproduce import runs
from research.reproduce.page import page
from research.reproduce.plans import PLANS
from train.command_line import local_path
from train.log import write_whole

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.jsonl"

_DESCRIPTION = """\
Makes tables of the paper again, and writes results.md with the paper's figures beside them.

  --scale cpu    smaller networks and images, whole data sets: hours of one core for each run; research.long_runs
  --scale paper  the paper's networks at 224 x 224, by train.finetune; --weights holds resnet50.safetensors and others

What is finished is not run again, and what was interrupted goes on. Without a table only the page is written.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m research.reproduce",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(PLANS)}")
    parser.add_argument("--scale", choices=("cpu", "paper"), default="cpu", help="default: %(default)s")
    parser.add_argument("--data-dir", type=local_path, help="data directory of TFDS")
    parser.add_argument("--weights", type=local_path, help="folder of published weights")
    parser.add_argument("--state", type=local_path, help="folder for unfinished runs")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no run begins (default: %(default)s)")
    parser.add_argument("--results", type=local_path, help="finished runs; default: those in the repository")
    parser.add_argument("--out", type=local_path, default=FOLDER, help="where the page is written")
    args = parser.parse_args(argv)
    for name in args.tables:
        if name not in PLANS:
            parser.error(f"TABLE: got {name}, expected some of {', '.join(PLANS)}")
    code = 0
    if args.tables:
        for name in ("data_dir", "weights", "state"):
            if getattr(args, name) is None:
                parser.error(f"--{name.replace('_', '-')} is needed to run {', '.join(args.tables)}; see --help")
        code = _on_cpu(args) if args.scale == "cpu" else _on_paper_scale(args)
    cpu = args.results if args.results and args.scale == "cpu" else long_runs.RESULTS
    paper = args.results if args.results and args.scale == "paper" else RESULTS
    write_whole(args.out / "results.md", page(json_lines.read(cpu, dict), json_lines.read(paper, dict)))
    return code


def _on_cpu(args: argparse.Namespace) -> int:
    plans = [PLANS[name] for name in args.tables]
    cases = dict.fromkeys(case for plan in plans for case in plan.cases)
    strategies = dict.fromkeys(name for plan in plans for name in ("never", *plan.strategies))
    options = ["--data-dir", args.data_dir, "--weights", args.weights, "--state", args.state]
    options += ["--minutes", args.minutes, "--seeds", args.seeds, "--results", args.results or long_runs.RESULTS]
    return long_runs.main([*map(str, options), "--cases", *cases, "--strategies", *strategies])


def _on_paper_scale(args: argparse.Namespace) -> int:
    args.state.mkdir(parents=True, exist_ok=True)
    return runs.work(
        [PLANS[name] for name in args.tables],
        results=args.results or RESULTS,
        out=args.state,
        data_dir=args.data_dir,
        weights_dir=args.weights,
        seeds=args.seeds,
        minutes=args.minutes,
        say=print,
    )


if __name__ == "__main__":
    sys.exit(main())
