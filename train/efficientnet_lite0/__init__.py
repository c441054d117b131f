"""EfficientNet-Lite0 with its ImageNet weights in half precision; origin and licence are in ``README.md`` beside it."""

from __future__ import annotations

from pathlib import Path

from flax import nnx

from models import weights
from models.efficientnet_lite import EfficientNetLite, efficientnet_lite0

MEAN, SCALE = 127.0, 128.0  # the network reads (grey level - MEAN) / SCALE, of 0 to 255


def load(num_classes: int, *, seed: int, dropout: float = 0.2, drop_connect: float = 0.0) -> EfficientNetLite:
    """The network with the published weights, in float32, and a fresh head.

    Args:
        num_classes: Width of the head.
        seed: Of the head and of dropout.
        dropout: Rate in front of the head.
        drop_connect: Rate at which a block's branch is dropped for an example.

    Raises:
        FileNotFoundError: If the file is not in the repository.
    """
    rngs = nnx.Rngs(params=seed, dropout=seed + 1)
    model = efficientnet_lite0(num_classes=num_classes, dropout=dropout, drop_connect=drop_connect, rngs=rngs)
    weights.load(model, Path(__file__).with_name("efficientnet_lite0.safetensors"), new_head=True)
    return model
