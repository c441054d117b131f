"""Judges predictors on recorded runs that they did not see, beside simple controls; splits by architecture and more.

Every figure is a line of ``figures.jsonl`` in ``--out``; what is there, of the same recordings with the same stride, is
not computed again. The tables go to ``figures.md`` there, and, as a section, into the file of ``--results``.

    python -m research.predictors.evaluate --recordings runs/collection --out runs/evaluation
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np

import smartfrz_jax as sfj
from research import json_lines
from research.predictors import learning_runs
from research.predictors.figures import Figures, table
from research.predictors.folds import Split, folds
from research.predictors.variants import TARGETS, VARIANTS
from research.results import provenance, publish
from smartfrz_jax.learning.controls import CONTROLS, READING_WEIGHTS, all_context
from smartfrz_jax.learning.examples import Examples, make_examples
from smartfrz_jax.learning.recording import Recording
from smartfrz_jax.learning.splits import by_run, moments
from train.command_line import Interrupt, local_path, resumable


def jobs(
    args: argparse.Namespace, recordings: list[Recording]
) -> Iterator[tuple[str, Split, str, list[int], str, int]]:
    """Everything that is to be computed: all of one target and split first, there fold by fold.

    Unless predictors are asked for by name, those that read weights are left out if the recordings hold none; controls
    are in any case.
    """
    with_weights = _have_weights(recordings)
    controls = [name for name in CONTROLS if with_weights or name not in READING_WEIGHTS]
    variants = args.variants or [
        name for name, variant in VARIANTS.items() if with_weights or not variant.encoding.reads_weights
    ]
    for target in args.targets:
        for split in args.splits:
            for fold, held_out in folds(recordings, split):
                for control in controls:
                    yield target, split, fold, held_out, control, 0
                for seed in range(args.seeds):
                    for variant in variants:
                        yield target, split, fold, held_out, variant, seed


def evaluate(args: argparse.Namespace, interrupt: Interrupt) -> None:
    """Computes what is missing, and writes the tables."""
    recordings, left_out = learning_runs.load(args.recordings)
    print(f"{len(recordings)} recordings; {len(left_out)} more of networks that hardly learned are left out")
    file = args.out / "figures.jsonl"
    digest = learning_runs.digest(args.recordings)
    every = json_lines.read(file, Figures.parse)
    found = [row for row in every if (row.stride, row.recordings) == (args.stride, digest)]
    if len(found) < len(every):
        print(f"{len(every) - len(found)} lines of {file} are of another stride or other recordings, and left out")
    known = {row[:5] for row in found}
    prepared = Prepared(recordings, args.stride)
    for target, split, fold, held_out, variant, seed in interrupt.checked(jobs(args, recordings)):
        if (target, split, fold, variant, seed) in known:
            continue
        train, test = prepared.examples(variant, target)
        train, test = train.select(~by_run(train, held_out)), test.select(by_run(test, held_out))
        start = time.perf_counter()
        if variant in CONTROLS:
            probability = CONTROLS[variant](train, test)
        else:
            probability = sfj.learning.predict(VARIANTS[variant].fit(train, seed=seed), test)
        seconds = time.perf_counter() - start
        score = sfj.learning.evaluate(probability, test.target, groups=moments(test))
        within_runs = sfj.learning.evaluate(probability, test.target, groups=test.run).moment_auc
        row = Figures(
            target,
            split,
            fold,
            variant,
            seed,
            score.n,
            score.positives,
            score.auc,
            within_runs,
            score.moment_auc,
            score.balanced_accuracy,
            score.calibration_error,
            round(seconds, 1),
            args.stride,
            digest,
        )
        json_lines.append(file, row._asdict())
        found.append(row)
        print(
            f"{target:12s} {split:12s} {fold:14s} {variant:32s} seed {seed}: AUC {row.auc:.3f}, across layers "
            f"{row.moment_auc:.3f} ({row.positives} of {row.n} to freeze, {row.seconds:.0f} s)",
            flush=True,
        )
    write_tables(args, recordings, found)


class Prepared:
    """Examples in the forms that predictors and controls read; each is made once, for all targets.

    Args:
        recordings: The recordings.
        stride: Distance of moments in records.
    """

    def __init__(self, recordings: list[Recording], stride: int):
        self._recordings, self._stride = recordings, stride
        self._made: dict[str, tuple[Examples, Examples]] = {}
        self._targets: dict[str, np.ndarray] = {}

    def examples(self, variant: str, target: str) -> tuple[Examples, Examples]:
        """All examples to train on, and all to judge by.

        Args:
            variant: Name of a predictor or control.
            target: Name of the target.
        """
        if target not in self._targets:
            self._targets[target] = self._plain(target).target
        form = "control" if variant in CONTROLS else variant
        if form not in self._made:
            self._made[form] = self._make(form, self._plain(target))
        right = self._targets[target]
        train, test = self._made[form]
        repeated = np.tile(right, len(train) // len(test))
        return dataclasses.replace(train, target=repeated), dataclasses.replace(test, target=right)

    def _plain(self, target: str) -> Examples:
        return make_examples(self._recordings, criterion=TARGETS[target], stride=self._stride)

    def _make(self, form: str, plain: Examples) -> tuple[Examples, Examples]:
        if form == "control":
            encoded = sfj.learning.encode_examples(plain, all_context(plain))
            return encoded, encoded
        encoding = VARIANTS[form].encoding
        test = plain if encoding.weights != "none" else sfj.learning.encode_examples(plain, encoding)
        return VARIANTS[form].prepared(plain), test


def write_tables(args: argparse.Namespace, recordings: list[Recording], found: list[Figures]) -> None:
    """Prints the tables, and writes them to ``figures.md`` and a section of ``--results``.

    That of recordings without weights, which more are likely to have, is a section of its own.
    """
    parts = [
        f"{provenance('research.predictors.evaluate')} {json_lines.commits(args.out / 'figures.jsonl')} "
        f"{len(recordings)} recordings, every {args.stride}th moment. "
        "Means over folds, +- the standard deviation of that mean over seeds."
    ]
    for target in TARGETS:
        for split in get_args(Split):
            rows = [row for row in found if (row.target, row.split) == (target, split)]
            if rows:
                n, positives = (
                    sum({row.fold: getattr(row, field) for row in rows}.values()) for field in ("n", "positives")
                )
                parts.append(
                    f"### {target}, held out by {split} ({positives} of {n} examples to freeze)\n\n{table(rows)}"
                )
    text = "\n\n".join(parts)
    section = "predictors" if _have_weights(recordings) else "predictors without weights"
    publish(text, args.out / "figures.md", section=section, results=args.results)


def _have_weights(recordings: list[Recording]) -> bool:
    return recordings[0].weights.shape[2] > 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m research.predictors.evaluate", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument(
        "--recordings", type=local_path, required=True, help="recordings, as research.recordings.collect makes them"
    )
    parser.add_argument("--out", type=local_path, default=Path("runs/evaluation"), help="folder for everything written")
    parser.add_argument("--results", type=local_path, metavar="FILE", help="page to renew the tables in, too")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="what is supervised")
    parser.add_argument(
        "--splits", nargs="+", choices=get_args(Split), default=list(get_args(Split)), help="what is held out"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), help="predictors (default: all that the recordings allow)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each predictor (default: %(default)s)")
    parser.add_argument("--stride", type=int, default=12, help="records between moments (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("seeds", "stride"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: got {getattr(args, name)}, expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code: 0, 2 if something asked for is wrong, 130 if interrupted."""
    return resumable(evaluate, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
