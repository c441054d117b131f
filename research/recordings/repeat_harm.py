"""How well a second measurement of the harm of freezing agrees with the first.

Recorded runs are trained again, and their branches with other batches. How well the harm measured then tells the
targets of the first measurement stands beside what some predictors reach on the same runs. A perfect one, without the
noise of the second measurement, could do better than it. Runs are drawn at random among those of networks that are
trained from scratch here; the others are slow. Every run is a line of ``harm.jsonl`` in ``--out``; what is there is not
run again.

    python -m research.recordings.repeat_harm --recordings runs/collection --data-dir data/tfds --out runs/repeat
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import smartfrz_jax as sfj
from research import json_lines
from research.predictors import learning_runs
from research.predictors.variants import TARGETS, VARIANTS
from research.recordings.architectures import ARCHITECTURES
from research.recordings.plan import runs
from research.recordings.record import branch_moments, branches, prepare
from research.results import provenance, publish
from smartfrz_jax.learning.controls import CONTROLS, all_context
from smartfrz_jax.learning.evaluation import Evaluation
from smartfrz_jax.learning.examples import Examples, make_examples
from smartfrz_jax.learning.harm import fill
from smartfrz_jax.learning.recording import Recording
from smartfrz_jax.learning.splits import by_run, moments
from train.command_line import Interrupt, local_path, resumable

_TARGET = "branch_harm"
_OTHER_BATCHES = 1000  # added to the seed of a run
_CONTROL = "progress_and_depth"
_VARIANTS = ("t/T, depth", "t/T, depth, given, loss")


def chosen(recordings: list[Recording], n: int, seed: int) -> list[int]:
    """Indices of recordings to measure again, drawn at random, ascending.

    Args:
        recordings: All recordings.
        n: How many.
        seed: Of the draw.

    Raises:
        ValueError: If there are fewer.
    """
    slow = {name for name, architecture in ARCHITECTURES.items() if architecture.published}
    candidates = [i for i, recorded in enumerate(recordings) if recorded.metadata["architecture"] not in slow]
    if len(candidates) < n:
        raise ValueError(f"runs: got {n}, but there are {len(candidates)} recordings to choose from; ask for fewer")
    return sorted(random.Random(seed).sample(candidates, n))


def measure_again(recorded: Recording, args: argparse.Namespace) -> np.ndarray:
    """Harm of freezing in a recorded run, with other batches in the branches.

    Args:
        recorded: The recording.
        args: The command line.

    Returns:
        Like ``recorded.branch_harm``.

    Raises:
        ValueError: If the run is not in the list.
    """
    name = recorded.metadata["name"]
    run = next((run for run in runs() if run.name == name), None)
    if run is None:
        raise ValueError(
            f"recordings: {name} is not in the list of research.recordings.collect --list, so it cannot be run again"
        )
    setting = prepare(run, args.recordings, args.data_dir, None, print)
    snapshots: dict[int, Any] = {}
    wanted = set(branch_moments(setting))

    def after_step(step: int, state: Any, loss: Any) -> None:
        if step in wanted:
            snapshots[step] = jax.device_get(state)

    setting.train(setting.start(run.seed), setting.rates, seed=run.seed, after_step=after_step)
    return branches(setting, snapshots, run.seed + _OTHER_BATCHES)


def repeat(args: argparse.Namespace, interrupt: Interrupt) -> None:
    """Measures what is missing, and writes the table."""
    sfj.enable_compilation_cache(args.out / "programs")
    recordings, _ = learning_runs.load(args.recordings)
    file = args.out / "harm.jsonl"
    again = dict(json_lines.read(file, lambda row: (row["name"], np.array(row["harm"], np.float32))))
    indices = chosen(recordings, args.runs, args.seed)
    for index in interrupt.checked(indices):
        name = recordings[index].metadata["name"]
        if name not in again:
            again[name] = measure_again(recordings[index], args)
            json_lines.append(file, {"name": name, "harm": again[name].tolist()})
            print(f"{name}: measured again", flush=True)
    second = {index: again[recordings[index].metadata["name"]] for index in indices}
    origin = f"{provenance('research.recordings.repeat_harm')} {json_lines.commits(file)}"
    text = f"{origin}\n\n{table(recordings, second, args.stride)}"
    publish(text, args.out / "repeat.md", section="repeated", results=args.results)


def table(recordings: list[Recording], second: dict[int, np.ndarray], stride: int) -> str:
    """How well targets are told, on the runs measured again: by that measurement, and by predictors trained on others.

    Args:
        recordings: All recordings.
        second: What was measured the second time, by index of the recording.
        stride: Records between the moments that are judged.
    """
    examples = make_examples(recordings, criterion=TARGETS[_TARGET], stride=stride)
    held_out = by_run(examples, second)
    test = examples.select(held_out)
    repeated = [
        dataclasses.replace(rec, branch_harm=second.get(i, rec.branch_harm)) for i, rec in enumerate(recordings)
    ]
    targets = make_examples(repeated, criterion=TARGETS[_TARGET], stride=stride).select(held_out).target
    rows = [("the harm, measured again", _score(-_harm(test, repeated), test))]
    plain = sfj.learning.encode_examples(examples, all_context(examples))
    control = CONTROLS[_CONTROL](plain.select(~held_out), plain.select(held_out))
    rows.append((f"{_CONTROL} (logistic)", _score(control, test)))
    for name in _VARIANTS:
        variant = VARIANTS[name]
        predictor = variant.fit(variant.prepared(examples.select(~held_out)), seed=0)
        rows.append((name, _score(sfj.learning.predict(predictor, test), test)))
    lines = ["| told by | AUC | AUC, across layers |", "|---|--:|--:|"]
    lines += [f"| {name} | {score.auc:.3f} | {score.moment_auc:.3f} |" for name, score in rows]
    agree = float(np.mean(targets == test.target))
    return (
        f"{len(second)} runs, {len(test)} examples, {int(test.target.sum())} to freeze; the second measurement gives "
        f"the same target for {agree:.1%} of them.\n\n" + "\n".join(lines)
    )


def _harm(examples: Examples, recordings: list[Recording]) -> np.ndarray:
    """Harm as a share of the first loss, of every example; infinite where nothing is known of it."""
    harm = np.empty(len(examples))
    for run in np.unique(examples.run):
        recorded, here = recordings[run], examples.run == run
        assert recorded.branch_harm is not None
        filled = fill(recorded.branch_harm, recorded.steps, recorded.total_steps) / float(recorded.first_loss)
        harm[here] = filled[examples.moment[here], examples.layer[here]]
    return np.nan_to_num(harm, nan=np.inf)


def _score(value: np.ndarray, test: Examples) -> Evaluation:
    """How well a number tells the targets: it is replaced by its rank, as a probability is asked for."""
    _, rank = np.unique(value, return_inverse=True)
    return sfj.learning.evaluate(rank / max(1, rank.max()), test.target, groups=moments(test))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m research.recordings.repeat_harm", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("--recordings", type=local_path, required=True, help="folder of research.recordings.collect")
    parser.add_argument("--data-dir", type=local_path, required=True, help="data directory of TensorFlow Datasets")
    parser.add_argument("--out", type=local_path, default=Path("runs/repeat"), help="folder for everything written")
    parser.add_argument("--results", type=local_path, metavar="FILE", help="page to renew the table in, too")
    parser.add_argument("--runs", type=int, default=12, help="runs to measure again (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of the runs (default: %(default)s)")
    parser.add_argument("--stride", type=int, default=12, help="records between moments (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("runs", "stride"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: got {getattr(args, name)}, expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code: 0, 2 if something asked for is wrong, 130 if interrupted."""
    return resumable(repeat, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
