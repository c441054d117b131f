"""EfficientNet-Lite0 with its ImageNet weights in half precision; where they come from is in ``README.md`` here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flax import nnx
from flax.typing import Dtype

from models import weights
from models.efficientnet_lite import EfficientNetLite, efficientnet_lite0
from models.layers.batch_norm import BatchNorm

WEIGHTS = Path(__file__).with_name("efficientnet_lite0.safetensors")
MEAN, SCALE = 127.0, 128.0  # the network reads (grey level - MEAN) / SCALE, of 0 to 255
_MOMENTUM = 0.9  # of BatchNorm's statistics: the original 0.99 still has ImageNet's after some hundred steps


def load(num_classes: int, *, seed: int, dtype: Dtype | None = None) -> EfficientNetLite:
    """The network with the published weights and a fresh head, in float32, ready to be fine-tuned for a short time.

    Args:
        num_classes: Width of the head.
        seed: Of the head.
        dtype: Type to compute in, such as ``jnp.bfloat16``; that of images and weights by default.

    Raises:
        FileNotFoundError: If the weights are not in the repository.
    """

    def make() -> EfficientNetLite:
        return efficientnet_lite0(num_classes=num_classes, dropout=0.0, drop_connect=0.0, dtype=dtype, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(make)  # random weights that are not used would each compile a program
    model.fc = nnx.Linear(model.fc.in_features, num_classes, dtype=dtype, rngs=nnx.Rngs(seed))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            module.momentum = _MOMENTUM
    weights.load(model, WEIGHTS, new_head=True)
    return model


def normalised(grey: np.ndarray) -> np.ndarray:
    """Images as the network reads them.

    Args:
        grey: Grey levels of 0 to 255, of shape ``(n, height, width, 1)``.

    Returns:
        float32 of shape ``(n, height, width, 3)``.
    """
    return np.repeat((grey.astype(np.float32) - MEAN) / SCALE, 3, axis=-1)
