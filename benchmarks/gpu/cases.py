"""The networks of the run on a GPU, computing in bfloat16, at full size and tiny."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import smartfrz_jax as sfj
from benchmarks.frozen_share import prefixes
from benchmarks.networks import CLASSES, NETWORKS, loss_fn
from benchmarks.networks import batch as random_batch
from models import mobilenetv2
from models.bert import Bert
from models.deit import DeiT
from models.resnet import Bottleneck, ResNet

NAMES = ("resnet50", "mobilenetv2", "deit_tiny", "bert_base")
TX = optax.sgd(1e-3, momentum=0.9)


class Sizes(NamedTuple):
    """How much is done.

    Attributes:
        batch: Examples of a step.
        pixels: Height and width of images.
        tokens: Of a text.
        rounds: Times that a step is timed.
        steps: Steps each time.
        run: Steps of a whole run.
        images: Different images of a whole run.
    """

    batch: int
    pixels: int
    tokens: int
    rounds: int
    steps: int
    run: int
    images: int


FULL = Sizes(batch=256, pixels=224, tokens=128, rounds=7, steps=5, run=600, images=6000)
TINY = Sizes(batch=4, pixels=32, tokens=8, rounds=2, steps=1, run=16, images=16)


class Skipped(Exception):  # noqa: N818 - nothing is wrong
    """Why something is not measured here."""


# The same modules, with fewer and narrower blocks.
_TINY: dict[str, Callable[..., nnx.Module]] = {
    "resnet50": partial(ResNet, (1, 1), (8, 8), Bottleneck),
    "mobilenetv2": partial(
        mobilenetv2.MobileNetV2,
        [mobilenetv2.Stage(1, 8, 1, 1), mobilenetv2.Stage(6, 8, 1, 2)],
        width_multiplier=0.25,
        dropout=0.0,
    ),
    "deit_tiny": partial(DeiT, patch_size=16, dim=24, depth=2, heads=3, drop_path=0.0),
    "bert_base": partial(Bert, dim=24, depth=2, heads=2, hidden=48, dropout=0.0, attention_dropout=0.0),
}


class Case:
    """A network, its batch, and prefixes of its layers.

    Args:
        name: One of :data:`NAMES`.
        tiny: Whether it is to be small enough for a processor.
    """

    def __init__(self, name: str, *, tiny: bool):
        self.name, self.tiny = name, tiny
        self.sizes = TINY if tiny else FULL
        self.reads_text = NETWORKS[name].reads_text
        make = _TINY[name] if tiny else NETWORKS[name].make
        options: dict[str, Any] = {"image_size": self.sizes.pixels} if name.startswith("deit") else {}
        self._make = partial(make, num_classes=CLASSES, dtype=jnp.bfloat16, **options)
        # One program, as making it variable by variable would be one for every shape.
        self._create = nnx.jit(lambda: self._make(rngs=nnx.Rngs(0)))

    @cached_property
    def arrays(self) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Random inputs and labels; synthetic, as only times and sizes come of them."""
        (inputs,), labels = random_batch(NETWORKS[self.name], self.sizes.batch, self.sizes.pixels)
        return (inputs[:, : self.sizes.tokens] if self.reads_text else inputs,), labels

    @cached_property
    def batch(self) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The same on the device."""
        return jax.tree.map(jnp.asarray, self.arrays)

    @cached_property
    def abstract(self) -> nnx.Module:
        """The network, with shapes in place of arrays."""
        return nnx.eval_shape(lambda: self._make(rngs=nnx.Rngs(0)))

    @cached_property
    def layers(self) -> sfj.Layers:
        """Its layers."""
        return sfj.nnx.find_layers(self.abstract, *self.arrays[0])

    @cached_property
    def account(self) -> sfj.Account:
        """The account of its train step."""
        return sfj.nnx.account(self.abstract, self.layers, loss_fn, *self.arrays, tx=TX)

    @cached_property
    def prefixes(self) -> list[tuple[float, sfj.Frozen]]:
        """For 0, 25, 50, 75 and 100 % of the forward FLOPs the nearest prefix, with the share that it really has.

        If it is tiny, for 0, 50 and 100 %.
        """
        return prefixes(self.account)[:: 2 if self.tiny else 1]

    def frozen(self, count: int) -> sfj.Frozen:
        """The first so many layers."""
        return sfj.Frozen(self.layers, frozenset(self.layers.names[:count]))

    def make(self, frozen: sfj.Frozen) -> tuple[nnx.Module, sfj.nnx.Optimizer]:
        """A network of its own, and its optimizer, with layers frozen."""
        model = self._create()
        optimizer = sfj.nnx.Optimizer(model, TX, layers=self.layers)
        optimizer.freeze(model, frozen)
        return model, optimizer

    def in_torch(self) -> Any:
        """The original network in PyTorch.

        Raises:
            Skipped: If a package that it is in is not there.
        """
        try:
            originals = importlib.import_module("tests.parity.originals")
        except ImportError as error:
            raise Skipped(str(error)) from error
        if not self.tiny:
            return originals.network(self.name, size=self.sizes.pixels)
        return _tiny_in_torch(self.name, originals)


@functools.cache
def _tiny_settings(name: str) -> dict[str, Any]:
    if name == "bert_base":
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        return {**sizes, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}
    if name == "mobilenetv2":
        return {"inverted_residual_setting": [[1, 8, 1, 1], [6, 8, 1, 2]], "width_mult": 0.25, "dropout": 0.0}
    return {}


def _tiny_in_torch(name: str, originals: Any) -> Any:
    """With the layers of the tiny networks here, and maybe more; widths may differ."""
    settings, vision = _tiny_settings(name), originals.torchvision.models
    match name:
        case "resnet50":
            return vision.ResNet(vision.resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES)
        case "mobilenetv2":
            return vision.MobileNetV2(num_classes=CLASSES, **settings)
        case "deit_tiny":
            model = "deit_tiny_patch16_224"
            return originals.timm.create_model(model, img_size=TINY.pixels, depth=2, num_classes=CLASSES)
        case _:
            return originals.BertForSequenceClassification(originals.BertConfig(**settings))
