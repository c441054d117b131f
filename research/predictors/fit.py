r"""Trains a predictor on recorded runs, and writes its checkpoint.

    python -m research.predictors.fit --recordings runs/collection --target branch_harm \
        --variant 't/T, depth, given, loss' --out runs/predictors/predictor

With ``--without`` the recordings of networks and data sets are left out, so that the predictor can be tried on them;
``--held-out`` writes a file with what it reads of every twelfth moment of these, before it is trained, and judges it on
that. Such a file holds no weights, so the predictor must read none.
"""

from __future__ import annotations

import argparse
import sys

import smartfrz_jax as sfj
from research.predictors import held_out, learning_runs
from research.predictors.variants import TARGETS, VARIANTS
from smartfrz_jax.learning.controls import two_scalar_coefficients
from smartfrz_jax.learning.examples import make_examples
from smartfrz_jax.learning.recording import Recording
from train.command_line import local_path

_HELD_OUT_STRIDE = 12  # records between moments


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m research.predictors.fit", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument(
        "--recordings", type=local_path, required=True, help="recordings, as research.recordings.collect makes them"
    )
    parser.add_argument("--out", type=local_path, required=True, help="folder of the checkpoint to make")
    parser.add_argument("--target", choices=list(TARGETS), required=True, help="what is supervised")
    parser.add_argument("--variant", choices=list(VARIANTS), required=True, help="what the predictor reads")
    parser.add_argument("--without", nargs="*", default=[], help="networks and data sets to leave out")
    parser.add_argument("--held-out", type=local_path, metavar="FILE", help="file to make of what is left out (.npz)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    parser.add_argument("--stride", type=int, default=4, help="records between moments (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.held_out is not None and not args.without:
        parser.error("argument --held-out: nothing is left out; name networks or data sets with --without")
    if args.held_out is not None and args.held_out.suffix != ".npz":
        parser.error(f"argument --held-out: got {args.held_out}, expected a name that ends with .npz")
    if args.held_out is not None and (reads := VARIANTS[args.variant].encoding.weights) != "none":
        parser.error(
            f"argument --held-out: {args.variant!r} reads weights ({reads}), which such a file does not hold; choose a "
            "--variant that reads none, or judge it with research.predictors.evaluate"
        )
    if args.stride < 1:
        parser.error(f"argument --stride: got {args.stride}, expected at least 1")
    return args


def _about(recorded: Recording) -> set[str]:
    """Names of its network and of its data set."""
    return {str(recorded.metadata[name]) for name in ("architecture", "data") if name in recorded.metadata}


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns the exit code: 0, or 2 if something asked for is wrong."""
    args = parse(argv)
    try:
        if args.out.exists():
            raise FileExistsError(f"out: {args.out} exists; choose another folder, or remove it")
        recordings, left_out = learning_runs.load(args.recordings)
        known = set[str]().union(*map(_about, recordings))
        for unknown in sorted(set(args.without) - known):
            raise ValueError(f"without: no recording is of {unknown!r}; they are of {', '.join(sorted(known))}")
        chosen = [recorded for recorded in recordings if not _about(recorded) & set(args.without)]
        examples = make_examples(chosen, criterion=TARGETS[args.target], stride=args.stride)
        two = ", ".join(f"{value:.2f}" for value in two_scalar_coefficients(examples))
        variant = VARIANTS[args.variant]
        if args.held_out is not None:
            rest = [recorded for recorded in recordings if _about(recorded) & set(args.without)]
            unseen = make_examples(rest, criterion=TARGETS[args.target], stride=_HELD_OUT_STRIDE)
            held_out.write(args.held_out, sfj.learning.encode_examples(unseen, variant.encoding))
        predictor = variant.fit(variant.prepared(examples, seed=args.seed), seed=args.seed)
        predictor.save(args.out)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    score = sfj.learning.evaluate(sfj.learning.predict(predictor, examples), examples.target)
    print(
        f"{args.out}: {args.variant}, {args.target}, {len(chosen)} of {len(recordings)} recordings "
        f"({len(left_out)} more of networks that hardly learned are left out), {len(examples)} "
        f"examples; on those it was trained on: AUC {score.auc:.3f}, {score.positives / score.n:.0%} to freeze; "
        f"the two-scalar rule has coefficients ({two})"
    )
    if args.held_out is not None:
        score = held_out.judge(args.held_out, predictor)
        print(
            f"{args.held_out}: {score.n} examples of {', '.join(args.without)}: AUC {score.auc:.3f}, across layers "
            f"{score.moment_auc:.3f}, balanced accuracy {score.balanced_accuracy:.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
