"""Makes one recording of the training set, in a process that ``python -m research.recordings.collect`` starts."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

import smartfrz_jax as sfj
from research.recordings.plan import Run, runs
from research.recordings.record import record
from smartfrz_jax.learning import recording_files
from train.command_line import local_path


def shortened(run: Run, steps: int | None) -> Run:
    """The run with another number of steps, if one is given."""
    return run if steps is None else dataclasses.replace(run, steps=steps)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code: 0, 1 if the recording could not be made, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m research.recordings", description=__doc__)
    parser.add_argument("name", choices=[run.name for run in runs()], metavar="NAME", help="name of the run")
    parser.add_argument("--out", type=local_path, required=True)
    parser.add_argument("--data-dir", type=local_path, required=True)
    parser.add_argument("--weights", type=local_path)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    run = shortened(next(run for run in runs() if run.name == args.name), args.steps)
    try:
        sfj.enable_compilation_cache(args.out / "programs")
        recorded = record(run, args.out, args.data_dir, args.weights, lambda text: print(text, flush=True))
        recording_files.save(recorded, args.out, run.name)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"{run.name}: {error}", file=sys.stderr)
        return 1
    seconds = ", ".join(f"{part} {taken:.0f}" for part, taken in recorded.metadata["seconds"].items())
    accuracy = recorded.metadata["held_out"]["accuracy"]
    print(f"{run.name}: accuracy {accuracy:.3f}, {time.perf_counter() - begin:.0f} s ({seconds})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
