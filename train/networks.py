"""The networks of the training scripts, by the names of their command lines."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx

from models.bert import bert_base, minilm
from models.deit import deit_tiny
from models.efficientnet_lite import efficientnet_lite0
from models.mobilenetv2 import mobilenetv2
from models.resnet import resnet50
from models.vgg import vgg11

if TYPE_CHECKING:
    from train.options import Options

Name = Literal[
    "resnet50",
    "vgg11",
    "vgg11-bn",
    "mobilenetv2",
    "efficientnet-lite0",
    "deit-tiny",
    "deit-tiny-distilled",
    "bert-base",
    "minilm",
]

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TENSORFLOW = (127 / 255,) * 3, (128 / 255,) * 3


class Normalisation(NamedTuple):
    """What a network expects of the channels of an image, on a scale from 0 to 1.

    Attributes:
        mean: Subtracted first.
        std: Divided by then.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def is_text(name: Name) -> bool:
    """Whether the network reads text."""
    return name in ("bert-base", "minilm")


def normalisation(name: Name) -> Normalisation:
    """What the weights of an image network were trained with."""
    return Normalisation(*(_TENSORFLOW if name == "efficientnet-lite0" else _IMAGENET))


def make_network(options: Options, *, num_classes: int, seed: int) -> nnx.Module:
    """The network that the command line asks for, freshly initialised.

    Args:
        options: The command line.
        num_classes: Width of the head.
        seed: Of its weights and of its dropout.

    Returns:
        The network, with float32 weights.

    Raises:
        ValueError: If an option does not fit the network.
    """
    common: dict[str, Any] = {
        "num_classes": num_classes,
        "dtype": jnp.bfloat16 if options.precision == "bfloat16" else jnp.float32,
        "rngs": nnx.Rngs(params=seed, dropout=seed + 1),
    }
    transformer = is_text(options.model) or options.model.startswith("deit")
    if options.scan and not transformer:
        raise ValueError(f"scan: {options.model} has no stack of equal blocks; leave --scan out")
    if options.stem == "cifar" and (transformer or options.model.startswith("vgg")):
        raise ValueError(f"stem: {options.model} has no strided stem; leave --stem out")
    size = 224 if options.image_size is None else options.image_size
    deit = partial(deit_tiny, image_size=size, scan=options.scan)
    match options.model:
        case "resnet50":
            return resnet50(stem=options.stem, **common)
        case "vgg11" | "vgg11-bn":
            return vgg11(batch_norm=options.model == "vgg11-bn", **common)
        case "mobilenetv2":
            return mobilenetv2(stem=options.stem, **common)
        case "efficientnet-lite0":
            return efficientnet_lite0(stem=options.stem, **common)
        case "deit-tiny" | "deit-tiny-distilled":
            return deit(distilled=options.model == "deit-tiny-distilled", **common)
        case "bert-base":
            return bert_base(scan=options.scan, **common)
        case "minilm":
            return minilm(scan=options.scan, **common)
