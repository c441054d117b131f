"""The networks of the training scripts, by the names of their command lines."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
from flax import nnx

from models.bert import bert_base, minilm
from models.deit import deit_tiny
from models.efficientnet_lite import efficientnet_lite0
from models.mobilenetv2 import mobilenetv2
from models.resnet import resnet50
from models.vgg import vgg11
from train.data.augment import images

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

VOCABULARY = 30522  # tokens that the networks for text know: those of uncased BERT


def is_text(name: Name) -> bool:
    """Whether the network reads text."""
    return name in ("bert-base", "minilm")


def normalisation(name: Name) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels, on a scale from 0 to 1, that the published weights expect."""
    if name == "efficientnet-lite0":
        return images.LITE_MEAN, images.LITE_STD
    return images.IMAGENET_MEAN, images.IMAGENET_STD


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
    deit = partial(deit_tiny, image_size=options.image_size, scan=options.scan)
    text = {"vocab_size": VOCABULARY, "scan": options.scan}
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
            return bert_base(**text, **common)
        case "minilm":
            return minilm(**text, **common)
