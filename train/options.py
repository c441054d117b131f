"""The typed command line of ``train.finetune``."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Literal, get_args

from smartfrz_jax.pytrees.file_paths import Path
from train.command_line import file_path
from train.data.wordpiece import MIN_LENGTH
from train.networks import Name
from train.optimizers import OptimizerName
from train.policies import PolicyName

KeepActivations = Literal["no", "device", "host"]

_DESCRIPTION = """\
Fine-tunes (or trains) a network on a TFDS data set while a policy freezes its layers.

  python -m train.finetune --model efficientnet-lite0 --weights efficientnet_lite0.safetensors \\
      --data cifar10 --data-dir ~/tensorflow_datasets --policy freezeout --epochs 10 --out runs/freezeout

The output folder gets log.jsonl (a line for every step), checkpoints/ (restored with --resume), model.safetensors (the
trained weights, under the names they were loaded by), report.md and report.png.
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a fine-tuning is asked to do; see ``python -m train.finetune --help``."""

    model: Name
    data: str
    data_dir: Path
    out: Path
    weights: Path | None
    weights_prefix: str | None
    head: str
    vocab: Path | None
    train_split: str
    evaluation_split: str | None
    image_size: int
    max_tokens: int
    augment: str
    workers: int
    epochs: int
    batch_size: int
    optimizer: OptimizerName
    learning_rate: float
    momentum: float
    weight_decay: float
    warmup_epochs: float
    clip: float | None
    precision: str
    stem: str
    scan: bool
    batch_norm: str
    policy: PolicyName
    t0: float
    spacing: str
    evaluations_per_epoch: int
    percentile: float
    tolerance: float
    budget: float
    stages: tuple[tuple[float, float], ...]
    predictor: str
    caution: float | None
    order: str
    patience: int
    window: int
    reference: Path | None
    lead: int
    min_saving: float
    keep_activations: KeepActivations
    seed: int
    resume: bool
    baseline: Path | None
    keep_programs: Path | None
    quiet: bool

    def settings(self) -> dict[str, str | float | bool | None]:
        """All options, as JSON can hold them."""
        return {
            name: str(value) if isinstance(value, os.PathLike | tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


def parse(argv: list[str] | None) -> Options:
    """Reads the command line; exits with a message if it is wrong.

    Args:
        argv: The arguments; ``sys.argv`` by default.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        prog="python -m train.finetune",
        description=_DESCRIPTION,
        formatter_class=type(
            "Formatter", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {}
        ),
    )
    add = parser.add_argument_group("network").add_argument
    add("--model", required=True, choices=get_args(Name), help="the network")
    add("--weights", type=file_path, help="safetensors file to start from; default: from scratch")
    add("--weights-prefix", help="what is taken off the names in --weights, such as module. of DataParallel")
    add("--head", choices=["new", "keep"], default="new", help="whether the head of --weights is made anew or kept")
    add(
        "--stem", choices=["imagenet", "cifar"], default="imagenet", help="cifar: for images of 32x32; no early strides"
    )
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of the computation; weights: float32")
    add("--scan", action="store_true", help="scan over a transformer's blocks: compiles faster")

    add(
        "--batch-norm",
        choices=["train", "fixed"],
        default="train",
        help="fixed: BatchNorms use the statistics of --weights throughout; better for short runs on little data",
    )

    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, help="TFDS name: cifar10, cifar100, imagenet2012, glue/mrpc, glue/cola, or another")
    add("--data-dir", type=file_path, required=True, help="folder of prepared TFDS data sets (array_record)")
    add("--train-split", default="train", help="split to train on, such as train[:500]")
    add("--evaluation-split", help="split to evaluate on; default: the usual one of the data set")
    add("--image-size", type=int, default=224, help="height and width that images are resized to")
    add("--vocab", type=file_path, help="WordPiece vocabulary (vocab.txt), for text")
    add("--max-tokens", type=int, default=128, help="longest text; the rest is cut off")
    add(
        "--augment",
        choices=["none", "flip-crop", "resized-crop", "deit"],
        default="flip-crop",
        help="of training images; deit: resized crop, flip, RandAugment, mixup, CutMix",
    )
    add("--workers", type=int, default=0, help="processes that decode images, where the set is not held in memory")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=10, help="times that every example is seen")
    add("--batch-size", type=int, default=32, help="examples of a step")
    add("--optimizer", choices=get_args(OptimizerName), default="sgd", help="the paper's is sgd")
    add("--learning-rate", type=float, default=0.01, help="at the start; annealed to 0 by a cosine")
    add("--momentum", type=float, default=0.9, help="of sgd")
    add("--weight-decay", type=float, default=0.0, help="of kernels and embeddings, not of biases and normalisations")
    add("--warmup-epochs", type=float, default=0.0, help="in which the learning rate rises from 0")
    add("--clip", type=float, help="largest norm of the gradients of active layers; default: none")
    add("--seed", type=int, default=0, help="of initialisation, order, augmentation and dropout")

    add = parser.add_argument_group("freezing").add_argument
    add("--policy", choices=get_args(PolicyName), default="never", help="what decides when layers freeze")
    add(
        "--predictor",
        default="default",
        help="smartfrz: default or paper, which come with the library, or the path of a checkpoint",
    )
    add("--caution", type=float, help="smartfrz, progress: from 0, save more, to 1, never lose (default: 0.95)")
    add(
        "--order",
        choices=["front_to_back", "any"],
        default="front_to_back",
        help="smartfrz: whether a layer waits for those before it; the paper's is any",
    )
    add("--patience", type=int, default=2, help="smartfrz: decisions in a row that it takes; the paper's is 1")
    add("--window", type=int, default=30, help="smartfrz: records that the predictor sees")
    add("--t0", type=float, default=0.5, help="freezeout: share of training after which the first layer freezes")
    add("--spacing", choices=["linear", "cubic"], default="linear", help="freezeout: of the moments of freezing")
    add("--evaluations-per-epoch", type=int, default=4, help="autofreeze, similarity_guided: decisions in an epoch")
    add(
        "--percentile", type=float, default=50, help="autofreeze: share of active layers taken as converged, in percent"
    )
    add("--tolerance", type=float, default=0.02, help="similarity_guided: change in CKA that counts as none")
    add("--reference", type=file_path, help="similarity_guided: model.safetensors of a finished run of that network")
    add(
        "--stages",
        type=_stages,
        default="0:0.5",
        metavar="AT:SHARE,...",
        help="static_prefix: from which share of training on, which share of the forward FLOPs is frozen, such as "
        "0:0.5,0.5:1",
    )
    add("--budget", type=float, default=0.5, help="random: share of the forward FLOPs to freeze")

    add("--lead", type=int, default=20, help="steps from a decision to its effect, in which its program is compiled")
    add("--min-saving", type=float, default=0.01, help="share of a step's FLOPs that a new program must save")

    add(
        "--keep-activations",
        choices=get_args(KeepActivations),
        default="no",
        help="where the activations of frozen front layers are kept, so that they run once for every example; only "
        "with --augment none, and where it pays",
    )

    add = parser.add_argument_group("run").add_argument
    add("--out", type=file_path, required=True, help="folder for all that is written")
    add(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in --out, or, before the first, from the start",
    )
    add("--baseline", type=file_path, help="--out of an earlier run, to compare with in the report")
    add("--keep-programs", type=file_path, help="folder in which compiled programs are kept for later runs")
    add("--quiet", action="store_true", help="no progress bar")
    options = Options(**vars(parser.parse_args(argv)))

    least = dict.fromkeys(("epochs", "batch_size", "image_size", "evaluations_per_epoch", "window", "patience"), 1)
    for name, smallest in (least | {"max_tokens": MIN_LENGTH}).items():
        got = getattr(options, name)
        if got < smallest:
            parser.error(f"argument --{name.replace('_', '-')}: got {got}, expected at least {smallest}")
    for name in ("learning_rate", "weight_decay", "warmup_epochs", "momentum", "workers", "lead", "min_saving"):
        if not 0 <= getattr(options, name) < float("inf"):
            parser.error(f"argument --{name.replace('_', '-')}: got {getattr(options, name)}, expected 0 or more")
    if options.clip is not None and not 0 < options.clip < float("inf"):
        parser.error(f"argument --clip: got {options.clip}, expected a norm above 0; leave it out for none")
    if options.keep_activations != "no" and options.augment != "none":
        parser.error("argument --keep-activations: an augmented example is never the same; pass --augment none, too")
    if options.keep_activations != "no" and options.scan:
        parser.error("argument --keep-activations: of scanned blocks the FLOPs would not be known; leave out --scan")
    if options.batch_norm == "fixed" and options.weights is None:
        parser.error("argument --batch-norm: fixed keeps the statistics of --weights; name them, or leave it out")
    if options.policy == "similarity_guided" and options.reference is None:
        parser.error("argument --policy: similarity_guided needs --reference; see --help")
    return options


def _stages(text: str) -> tuple[tuple[float, float], ...]:
    try:
        stages = tuple((float(at), float(share)) for at, share in (stage.split(":") for stage in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected pairs AT:SHARE of numbers with commas between them, such as 0:0.5,0.5:1 for half "
            "of the network from the start and all but the head from half time on"
        ) from None
    return stages
