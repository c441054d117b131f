"""The networks of the training scripts, by the names of their command lines."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from models import gguf
from models.bert import bert_base, minilm
from models.deit import deit_tiny
from models.efficientnet_lite import efficientnet_lite0
from models.llama import smollm2_135m
from models.mobilenetv2 import mobilenetv2
from models.resnet import resnet50
from models.vgg import vgg11
from smartfrz_jax.pytrees.file_paths import Path
from train.data.augment import images
from train.data.open import Reads

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
    "smollm2-135m",
    "llama",
]

VOCABULARY = 30522  # tokens that the networks for text know: those of uncased BERT
SMOLLM2_VOCABULARY = 49152


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The network, and the weights that it starts from."""

    model: Name
    """the network; llama takes its sizes from --weights"""
    weights: Path | None = None
    """safetensors file to start from, or GGUF file of a decoder; from scratch without one"""
    weights_prefix: str | None = None
    """what is taken off the names in --weights (safetensors), such as module. of DataParallel"""
    head: Literal["new", "keep"] = "new"
    """whether the head of --weights is made anew or kept"""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """cifar: for images of 32x32; no early strides"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the computation; weights are float32"""
    scan: bool = False
    """scan over a transformer's blocks: compiles faster"""
    untied: bool = False
    """decoders: a head of its own, which starts as the embedding; for --keep-activations with a frozen front"""
    batch_norm: Literal["train", "fixed"] = "train"
    """fixed: BatchNorms use the statistics of --weights throughout; better for short runs on little data"""

    def __post_init__(self) -> None:
        if self.batch_norm == "fixed" and self.weights is None:
            raise ValueError(
                "--batch-norm: got fixed, which keeps the statistics of --weights, expected these, too; or leave it out"
            )
        if self.model == "llama" and not self.is_gguf:
            raise ValueError(f"--weights: got {self.weights} for llama, expected a GGUF file, which tells its sizes")
        if self.is_gguf and not self.is_decoder:
            raise ValueError(f"--weights: got a GGUF file for {self.model}, expected a safetensors file")
        if self.weights_prefix is not None and (self.weights is None or self.is_gguf):
            raise ValueError(f"--weights-prefix: got {self.weights_prefix}, expected --weights of safetensors, too")
        if self.untied and not self.is_decoder:
            raise ValueError(f"--untied: {self.model} has no embedding for a head; leave --untied out")

    @property
    def is_text(self) -> bool:
        """Whether the network reads text."""
        return self.model in ("bert-base", "minilm")

    @property
    def is_decoder(self) -> bool:
        """Whether the network models text."""
        return self.model in ("smollm2-135m", "llama")

    @property
    def is_gguf(self) -> bool:
        """Whether sizes, weights and tokenizer come from one file."""
        return self.weights is not None and self.weights.suffix == ".gguf"

    @property
    def reads(self) -> Reads:
        """What the network reads, as its published weights expect it."""
        if self.is_decoder:
            tokenizer = self.weights if self.is_gguf else None
            vocabulary = SMOLLM2_VOCABULARY if tokenizer is None else gguf.vocab_size(tokenizer)
            return Reads(self.model, "language", (), (), vocabulary, tokenizer)
        lite = self.model == "efficientnet-lite0"
        mean, std = (images.LITE_MEAN, images.LITE_STD) if lite else (images.IMAGENET_MEAN, images.IMAGENET_STD)
        return Reads(self.model, "text" if self.is_text else "image", mean, std, VOCABULARY)


def make_network(config: NetworkConfig, *, image_size: int, num_classes: int, seed: int) -> nnx.Module:
    """A network, freshly initialised.

    Args:
        config: Which one.
        image_size: Height and width of images.
        num_classes: Width of the head.
        seed: Of its weights and of its dropout.

    Returns:
        The network, with float32 weights.

    Raises:
        ValueError: If an option does not fit the network.
    """
    common: dict[str, Any] = {
        "num_classes": num_classes,
        "dtype": jnp.bfloat16 if config.precision == "bfloat16" else jnp.float32,
        "rngs": nnx.Rngs(params=seed, dropout=seed + 1),
    }
    if config.is_decoder:
        return _make_decoder(config, dtype=common["dtype"], rngs=common["rngs"])
    transformer = config.is_text or config.model.startswith("deit")
    if config.scan and not transformer:
        raise ValueError(f"scan: {config.model} has no stack of equal blocks; leave --scan out")
    if config.stem == "cifar" and (transformer or config.model.startswith("vgg")):
        raise ValueError(f"stem: {config.model} has no strided stem; leave --stem out")
    if config.batch_norm == "fixed" and (transformer or config.model == "vgg11"):
        raise ValueError(f"batch_norm: {config.model} has no BatchNorm; leave --batch-norm out")
    deit = partial(deit_tiny, image_size=image_size, scan=config.scan)
    text = {"vocab_size": VOCABULARY, "scan": config.scan}
    match config.model:
        case "resnet50":
            return resnet50(stem=config.stem, **common)
        case "vgg11" | "vgg11-bn":
            return vgg11(batch_norm=config.model == "vgg11-bn", **common)
        case "mobilenetv2":
            return mobilenetv2(stem=config.stem, **common)
        case "efficientnet-lite0":
            return efficientnet_lite0(stem=config.stem, **common)
        case "deit-tiny" | "deit-tiny-distilled":
            return deit(distilled=config.model == "deit-tiny-distilled", **common)
        case "bert-base":
            return bert_base(**text, **common)
        case "minilm":
            return minilm(**text, **common)
        case _:
            raise AssertionError(config.model)


def _make_decoder(config: NetworkConfig, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    """A decoder; of a GGUF file, with its weights."""
    if config.stem == "cifar" or config.batch_norm == "fixed":
        raise ValueError(f"stem, batch_norm: {config.model} has neither; leave --stem and --batch-norm out")
    kwargs = {"scan": config.scan, "dtype": dtype} | ({"tied": False} if config.untied else {})
    if config.is_gguf:
        assert config.weights is not None
        return gguf.llama(config.weights, **kwargs)
    return smollm2_135m(rngs=rngs, **kwargs)
