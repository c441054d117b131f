"""The typed command line of ``train.finetune``, generated from the configurations of what it makes."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from smartfrz_jax.freezing.returning import Returning
from smartfrz_jax.pytrees.file_paths import Path, as_path
from train.command_line import check_least
from train.data.open import DataConfig
from train.devices.config import DeviceConfig
from train.loop import LOG_EVERY
from train.networks import NetworkConfig
from train.optimizers import OptimizerConfig
from train.policies import PolicyConfig, Stages
from train.recovery.config import Every, RecoveryConfig, read_every

KeepActivations = Literal["no", "device", "host"]

_DESCRIPTION = """\
Fine-tunes (or trains) a network on a TFDS data set while a policy freezes its layers.

  python -m train.finetune --model efficientnet-lite0 --weights efficientnet_lite0.safetensors \\
      --data cifar10 --data-dir ~/tensorflow_datasets --policy auto --epochs 10 --out runs/auto

The output folder gets log.jsonl (a line for every step), checkpoints/ (restored with --resume), model.safetensors (the
trained weights, under the names they were loaded by), report.md and report.png.
"""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long it trains, and what is written."""

    out: Path
    """folder for all that is written"""
    epochs: int = 10
    """times that every example is seen"""
    batch_size: int = 32
    """examples of a step"""
    seed: int = 0
    """of initialisation, order, augmentation and dropout"""
    keep_activations: KeepActivations = "no"
    """where activations of frozen front layers are kept, so that these run once for every example, if that pays"""
    baseline: Path | None = None
    """--out of an earlier run, to compare with in the report"""
    keep_programs: Path | None = None
    """folder in which compiled programs are kept for later runs"""
    evaluate_every: int | None = None
    """steps between evaluations; without it, an epoch's"""
    log_every: int = LOG_EVERY
    """steps whose losses are fetched and written together; a loss that is not finite ends the run only then"""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """where metrics go, too: to --out/tensorboard, or to Weights & Biases (offline with WANDB_MODE=offline)"""
    profile: int = 0
    """steps, after the first ten, of which a trace for XProf or TensorBoard is written to --out/profile"""
    quiet: bool = False
    """no progress bar"""

    def __post_init__(self) -> None:
        check_least(self, epochs=1, batch_size=1, evaluate_every=1, log_every=1, profile=0)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a fine-tuning is asked to do; see ``python -m train.finetune --help``."""

    network: NetworkConfig
    data: DataConfig
    optimizer: OptimizerConfig
    policy: PolicyConfig
    run: RunConfig
    recovery: RecoveryConfig
    devices: DeviceConfig

    def __post_init__(self) -> None:
        keeps = f"--keep-activations: got {self.run.keep_activations}, expected"
        is_image = not (self.network.is_text or self.network.is_decoder)
        if self.run.keep_activations != "no" and is_image and self.data.augment != "none" and not self.data.views:
            raise ValueError(
                f"{keeps} --views, too, the number of augmented views of each image, or --augment none: an image that "
                "is augmented anew in every epoch is never the same"
            )
        if self.data.views and (self.run.keep_activations == "no" or self.data.augment == "none" or not is_image):
            raise ValueError(
                f"--views: got {self.data.views}, expected it with --keep-activations and images that are augmented; "
                "else leave it out"
            )
        if self.data.views and self.data.augment == "deit":
            raise ValueError(
                f"--views: got {self.data.views} with --augment deit, which mixes the images of a batch, expected "
                "--augment flip-crop or resized-crop"
            )
        if self.run.keep_activations != "no" and self.network.scan:
            raise ValueError(f"{keeps} no --scan: of scanned blocks the FLOPs would not be known")
        if self.recovery.unfreeze_on_regression and self.returning != "kept":
            raise ValueError(
                "--unfreeze-on-regression: got it with --returning fresh, expected --returning kept, so that the "
                "optimizer goes on with what it held of layers that train again"
            )

        if self.run.keep_activations != "no" and (self.devices.remat or self.devices.accumulate > 1):
            raise ValueError(f"{keeps} neither --remat nor --accumulate: with them a step has no front of its own")

    @property
    def returning(self) -> Returning:
        """What the optimizer holds of a layer that trains again."""
        return self.optimizer.returning or self.policy.returning

    @property
    def has_loops(self) -> bool:
        """Whether a step has loops, of which XLA counts one turn: its FLOPs are an account's."""
        return self.network.scan or self.devices.accumulate > 1

    def settings(self) -> dict[str, Any]:
        """All options by name, as JSON can hold them."""
        return {
            name: str(value) if isinstance(value, os.PathLike | tuple) else value
            for config in (self.network, self.data, self.optimizer, self.policy, self.run, self.recovery, self.devices)
            for name, value in dataclasses.asdict(config).items()
        }


def parse(argv: list[str] | None) -> Options:
    """Reads the command line; exits with a message if it is wrong.

    Args:
        argv: The arguments; ``sys.argv`` by default.
    """
    return tyro.cli(
        Options,
        prog="python -m train.finetune",
        description=_DESCRIPTION,
        args=argv,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
        registry=_REGISTRY,
    )


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _paths(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Local paths, with ``~`` expanded, and those of object stores, such as gs://bucket/run."""
    if set(get_args(info.type)) - {type(None)} != set(get_args(Path)):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: as_path(texts[0]),
        is_instance=lambda value: value is None or isinstance(value, os.PathLike),
        str_from_instance=lambda path: [str(path)],
    )


@_REGISTRY.primitive_rule
def _stages(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Stages] | None:
    """Pairs of numbers as one word."""
    if info.type != Stages:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="AT:SHARE,...",
        instance_from_str=lambda texts: _read_stages(texts[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda stages: [",".join(f"{at:g}:{share:g}" for at, share in stages)],
    )


@_REGISTRY.primitive_rule
def _every(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Every] | None:
    """Steps, or a time with its unit, as one word."""
    if set(get_args(info.type)) - {type(None)} != {Every}:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="STEPS|TIME",
        instance_from_str=lambda texts: read_every(texts[0]),
        is_instance=lambda value: value is None or isinstance(value, Every),
        str_from_instance=lambda every: [str(every)],
    )


def _read_stages(text: str) -> Stages:
    try:
        return tuple((float(at), float(share)) for at, share in (stage.split(":") for stage in text.split(",")))
    except ValueError:
        raise ValueError(
            f"got {text!r}, expected pairs AT:SHARE of numbers with commas between them, such as 0:0.5,0.5:1 for half "
            "of the network from the start and all but the head from half time on"
        ) from None
