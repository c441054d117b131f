"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381).

Initialisation and module names follow torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from models.layers.batch_norm import BatchNorm
from models.layers.checks import check_images, check_rate, check_stem
from models.layers.depthwise import depthwise_convolution
from models.layers.sequential import Sequential
from models.layers.torch_names import torch_name

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_Conv = partial(nnx.Conv, use_bias=False, kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"))


class Stage(NamedTuple):
    """Blocks of one width.

    Attributes:
        expansion: Width inside a block, as a multiple of the width of its input.
        width: Width of their output.
        blocks: Their number.
        stride: Stride of the first.
    """

    expansion: int
    width: int
    blocks: int
    stride: int


STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


def _conv_norm(d_in: int, d_out: int, kernel: int, stride: int = 1, *, depthwise: bool = False, **kwargs: Any):
    groups = {"feature_group_count": d_in, "conv_general_dilated": depthwise_convolution} if depthwise else {}
    conv = _Conv(d_in, d_out, (kernel, kernel), strides=stride, padding=kernel // 2, **groups, **kwargs)
    return Sequential([conv, BatchNorm(d_out, **kwargs), nnx.relu6])


class InvertedResidual(nnx.Module):
    """1x1 expansion (unless the factor is one), 3x3 depthwise convolution, linear 1x1 projection, and a shortcut."""

    def __init__(self, d_in: int, d_out: int, stride: int, expansion: int, *, rngs: nnx.Rngs, **dtypes: Any):
        kwargs = {"rngs": rngs, **dtypes}
        inside = d_in * expansion
        layers: list[Any] = [] if expansion == 1 else [_conv_norm(d_in, inside, 1, **kwargs)]
        layers.append(_conv_norm(inside, inside, 3, stride, depthwise=True, **kwargs))
        layers += [_Conv(inside, d_out, (1, 1), **kwargs), BatchNorm(d_out, **kwargs)]
        self.conv = Sequential(layers)
        self.shortcut = stride == 1 and d_in == d_out

    def __call__(self, x: Float[Array, "n h w d_in"]) -> Float[Array, "n h2 w2 d_out"]:
        """Applies the block."""
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nnx.Module):
    """MobileNetV2 for image classification.

    Args:
        stages: What lies between the first and the last convolution.
        width_multiplier: Factor of all widths; they are rounded to multiples of 8, and that of the last convolution
            is at least 1280.
        num_classes: Width of the head.
        channels: Channels of the input.
        stem: ``"imagenet"``, a first convolution of stride 2; or ``"cifar"``, of stride 1, for small images.
        dropout: Rate in front of the head.
        dtype: Type to compute in, such as ``jnp.bfloat16``; that of images and weights by default. BatchNorm's
            statistics and the logits are float32 always.
        param_dtype: Type of the weights.
        rngs: Random streams for initialisation and dropout.

    Raises:
        ValueError: If there is no such stem, or ``dropout`` is not a rate.

    Example:
        >>> def logits(images):
        ...     model = MobileNetV2([Stage(6, 16, 2, 2)], width_multiplier=0.25, num_classes=10, rngs=nnx.Rngs(0))
        ...     return model(images)
        >>> nnx.eval_shape(logits, jnp.ones((2, 32, 32, 3))).shape
        (2, 10)
    """

    def __init__(
        self,
        stages: Sequence[Stage] = STAGES,
        *,
        width_multiplier: float = 1.0,
        num_classes: int = 1000,
        channels: int = 3,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        dropout: float = 0.2,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_stem(stem)
        check_rate(dropout, "dropout")
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.channels = channels
        width = rounded_width(32, width_multiplier)
        features: list[Any] = [_conv_norm(channels, width, 3, 2 if stem == "imagenet" else 1, **kwargs)]
        for stage in stages:
            d_out = rounded_width(stage.width, width_multiplier)
            for position in range(stage.blocks):
                stride = stage.stride if position == 0 else 1
                features.append(InvertedResidual(width, d_out, stride, stage.expansion, **kwargs))
                width = d_out
        last = rounded_width(1280, max(1.0, width_multiplier))
        self.features = Sequential([*features, _conv_norm(width, last, 1, **kwargs)])
        linear = nnx.Linear(last, num_classes, kernel_init=nnx.initializers.normal(0.01), **kwargs)
        self.classifier = Sequential([nnx.Dropout(dropout, rngs=rngs if dropout else None), linear])

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """Logits of a batch of images of any size, float32."""
        check_images(x, self.channels)
        return self.classifier(jnp.mean(self.features(x), axis=(1, 2))).astype(jnp.float32)

    @staticmethod
    def tensor_name(name: str) -> str:
        """Name that torchvision has for a variable.

        Args:
            name: Path of a parameter or a statistic, as ``smartfrz_jax.pytrees.paths`` gives it.

        Returns:
            The name.

        Example:
            >>> MobileNetV2.tensor_name("features/2/conv/1/1/mean")
            'features.2.conv.1.1.running_mean'
        """
        return torch_name(name)


def mobilenetv2(**kwargs: Any) -> MobileNetV2:
    """MobileNetV2: 3,504,872 parameters, 300,774,272 multiply-adds for an image of 224 x 224.

    Args:
        **kwargs: As for :class:`MobileNetV2`, ``rngs`` at least.

    Example:
        >>> model = nnx.eval_shape(lambda: mobilenetv2(rngs=nnx.Rngs(0)))
    """
    return MobileNetV2(**kwargs)


def rounded_width(width: int, multiplier: float) -> int:
    """A width times ``multiplier``, as a multiple of 8 that is not more than a tenth below it.

    Example:
        >>> rounded_width(24, 1.0), rounded_width(24, 0.5), rounded_width(16, 0.7)
        (24, 16, 16)
    """
    exact = width * multiplier
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded
