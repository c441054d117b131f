"""One prepared run for a GPU, most valuable figures first; called again, it goes on where it stopped.

Every task is a process of its own, so that one that fails, or runs out of memory, takes no other with it, and adds a
line to the file of results. Networks compute in bfloat16; a step has 256 images of 224 x 224, or texts of 128 tokens.
Inputs are synthetic but in the whole run, which is on Fashion-MNIST's images.

Usage: python -m benchmarks.gpu [--minutes 9] [--out FILE] [--only TASK ...] [--commit NAME], then --report.
With --tiny everything runs at a size for processors, to see that it works; those figures say nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import smartfrz_jax as sfj
from benchmarks.gpu import plan, report
from research import json_lines
from train.command_line import local_path
from train.log import write_whole

RESULTS = Path(__file__).with_name("results.jsonl")
PAGE = Path(__file__).parents[2] / "docs/benchmarks/gpu.md"
_PROGRAMS = Path("runs/gpu/programs")
_LAST_LINES = 3  # of the errors of a task that failed


def work(args: argparse.Namespace) -> int:
    """Measures what is missing until the time is up; returns the number of tasks that failed."""
    deadline, failed = time.monotonic() + 60 * args.minutes, 0
    for task in plan.missing(json_lines.read(args.out, dict), tiny=args.tiny):
        left = deadline - time.monotonic()
        if args.only and task.name not in args.only:
            continue
        if left < task.seconds:
            print(f"{task.name}: left for another time, it may take {task.seconds} s", flush=True)
            continue
        begin = time.monotonic()
        try:
            error = _run(task, args, left)
        except subprocess.TimeoutExpired:
            print(f"{task.name}: stopped, the time is up", flush=True)
            break
        if error:
            failed += 1
            json_lines.append(args.out, _with_commit(plan.row_of(task, tiny=args.tiny, failed=error), args))
        print(f"{task.name}: {error or 'done'} ({time.monotonic() - begin:.0f} s)", flush=True)
    return failed


def _run(task: plan.Task, args: argparse.Namespace, seconds: float) -> str:
    """Measures a task in another process; returns the end of what it says if it fails."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--task", task.name, "--out", str(args.out)]
    command += ["--programs", str(args.programs), *(["--tiny"] if args.tiny else [])]
    command += ["--commit", args.commit] if args.commit else []
    environment = os.environ | plan.ENVIRONMENT.get(task.kind, {})
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=seconds, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode == 0:
        return ""
    return f"exit code {done.returncode}: " + " / ".join(done.stderr.splitlines()[-_LAST_LINES:])


def measure(args: argparse.Namespace) -> None:
    """Measures one task here."""
    sfj.enable_compilation_cache(args.programs)
    (task,) = (task for task in plan.TASKS if task.name == args.task)
    row = plan.measure(task, json_lines.read(args.out, dict), tiny=args.tiny)
    if "skipped" in row:
        print(f"{task.name}: skipped, {row['skipped']}", flush=True)
    json_lines.append(args.out, _with_commit(row, args))


def _with_commit(row: dict[str, object], args: argparse.Namespace) -> dict[str, object]:
    return row | ({"commit": args.commit} if args.commit else {})


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    names = [task.name for task in plan.TASKS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it stops (default: %(default)s)")
    parser.add_argument("--out", type=local_path, default=RESULTS, help="the results (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=names, default=[], metavar="TASK", help=", ".join(names))
    parser.add_argument("--tiny", action="store_true", help="at a size for processors")
    parser.add_argument("--commit", help="where the files are no git repository: the commit that they are of")
    parser.add_argument("--programs", type=local_path, default=_PROGRAMS, help="where compiled programs are kept")
    parser.add_argument("--task", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help=f"only write {PAGE.name} from the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; the exit code is 1 if a task failed."""
    args = parse(argv)
    if args.report:
        write_whole(PAGE, report.page(json_lines.read_with_commit(args.out)))
        return 0
    if args.task:
        measure(args)
        return 0
    return min(1, work(args))


if __name__ == "__main__":
    sys.exit(main())
