"""EfficientNet-Lite (EfficientNet: Tan and Le 2019, arXiv 1905.11946; Lite: Google's TPU repository).

EfficientNet without squeeze-and-excite and with ReLU6 in place of swish. Padding, BatchNorm and the initialisation of
convolutions follow TensorFlow's original, module names and the head's initialisation its PyTorch port.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from models.layers.batch_norm import BatchNorm
from models.layers.checks import check_images, check_rate, check_stem
from models.layers.depthwise import depthwise_convolution
from models.layers.torch_names import torch_name
from models.mobilenetv2 import rounded_width

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_STEM, _HEAD = 32, 1280  # not scaled in Lite


class Stage(NamedTuple):
    """Blocks of one width.

    Attributes:
        expansion: Width inside a block, as a multiple of the width of its input.
        width: Width of their output.
        blocks: Their number.
        stride: Stride of the first.
        kernel: Height and width of the depthwise convolution.
    """

    expansion: int
    width: int
    blocks: int
    stride: int
    kernel: int


STAGES = (
    Stage(1, 16, 1, 1, 3),
    Stage(6, 24, 2, 2, 3),
    Stage(6, 40, 2, 2, 5),
    Stage(6, 80, 3, 2, 3),
    Stage(6, 112, 3, 1, 5),
    Stage(6, 192, 4, 2, 5),
    Stage(6, 320, 1, 1, 3),
)


class MBConv(nnx.Module):
    """1x1 expansion (unless the factor is one), depthwise convolution, linear 1x1 projection, and a shortcut.

    The branch beside the shortcut is dropped for whole examples at the rate ``drop``.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        kernel: int,
        stride: int,
        expansion: int,
        drop: float,
        *,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        kwargs = {"rngs": rngs, **dtypes}
        inside = d_in * expansion
        self.shortcut = stride == 1 and d_in == d_out
        self.expand_conv = nnx.data(_conv(d_in, inside, 1, **kwargs) if expansion != 1 else None)
        self.bn0 = nnx.data(_norm(inside, **kwargs) if expansion != 1 else None)
        self.depthwise_conv = _conv(
            inside, inside, kernel, stride, groups=inside, conv_general_dilated=depthwise_convolution, **kwargs
        )
        self.bn1 = _norm(inside, **kwargs)
        self.project_conv = _conv(inside, d_out, 1, **kwargs)
        self.bn2 = _norm(d_out, **kwargs)
        drop = drop if self.shortcut else 0.0
        self.drop = nnx.Dropout(drop, broadcast_dims=(1, 2, 3), rngs=rngs if drop else None)

    def __call__(self, x: Float[Array, "n h w d_in"]) -> Float[Array, "n h2 w2 d_out"]:
        """Applies the block."""
        y = x
        if self.expand_conv is not None and self.bn0 is not None:
            y = nnx.relu6(self.bn0(self.expand_conv(y)))
        y = nnx.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + self.drop(y) if self.shortcut else y


class EfficientNetLite(nnx.Module):
    """EfficientNet-Lite for image classification.

    Args:
        stages: What lies between the first and the last convolution.
        width_multiplier: Factor of the stages' widths, which are rounded to multiples of 8.
        depth_multiplier: Factor of the stages' numbers of blocks, rounded up, but for the first and the last stage.
        num_classes: Width of the head.
        channels: Channels of the input.
        stem: ``"imagenet"``, a first convolution of stride 2; or ``"cifar"``, of stride 1, for small images.
        dropout: Rate in front of the head.
        drop_connect: Rate at which a block's branch is dropped for an example; it grows linearly from 0 at the first
            block to just below this at the last.
        dtype: Type to compute in, such as ``jnp.bfloat16``; that of images and weights by default. BatchNorm's
            statistics and the logits are float32 always.
        param_dtype: Type of the weights.
        rngs: Random streams for initialisation, dropout and stochastic depth.

    Raises:
        ValueError: If there is no such stem, or ``dropout`` or ``drop_connect`` is not a rate.

    Example:
        >>> def logits(images):
        ...     model = EfficientNetLite([Stage(6, 8, 2, 2, 3)], num_classes=10, rngs=nnx.Rngs(0))
        ...     return model(images)
        >>> nnx.eval_shape(logits, jnp.ones((2, 32, 32, 3))).shape
        (2, 10)
    """

    def __init__(
        self,
        stages: Sequence[Stage] = STAGES,
        *,
        width_multiplier: float = 1.0,
        depth_multiplier: float = 1.0,
        num_classes: int = 1000,
        channels: int = 3,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        dropout: float = 0.2,
        drop_connect: float = 0.2,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_stem(stem)
        check_rate(dropout, "dropout")
        check_rate(drop_connect, "drop_connect")
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.channels = channels
        self.conv_stem = _conv(channels, _STEM, 3, 2 if stem == "imagenet" else 1, **kwargs)
        self.bn0 = _norm(_STEM, **kwargs)
        depths = [
            stage.blocks if index in (0, len(stages) - 1) else math.ceil(stage.blocks * depth_multiplier)
            for index, stage in enumerate(stages)
        ]
        blocks: list[MBConv] = []
        d_in = _STEM
        for stage, depth in zip(stages, depths, strict=True):
            d_out = rounded_width(stage.width, width_multiplier)
            for position in range(depth):
                stride = stage.stride if position == 0 else 1
                drop = drop_connect * len(blocks) / sum(depths)
                blocks.append(MBConv(d_in, d_out, stage.kernel, stride, stage.expansion, drop, **kwargs))
                d_in = d_out
        self.blocks = nnx.List(blocks)
        self.conv_head = _conv(d_in, _HEAD, 1, **kwargs)
        self.bn1 = _norm(_HEAD, **kwargs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs if dropout else None)
        self.fc = nnx.Linear(_HEAD, num_classes, kernel_init=_dense_init, **kwargs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """Logits of a batch of images of any size, float32."""
        check_images(x, self.channels)
        x = nnx.relu6(self.bn0(self.conv_stem(x)))
        for block in self.blocks:
            x = block(x)
        x = nnx.relu6(self.bn1(self.conv_head(x)))
        return self.fc(self.dropout(jnp.mean(x, axis=(1, 2)))).astype(jnp.float32)

    @staticmethod
    def tensor_name(name: str) -> str:
        """Name that the PyTorch port has for a variable.

        Args:
            name: Path of a parameter or a statistic, as ``smartfrz_jax.pytrees.paths`` gives it.

        Returns:
            The name.

        Example:
            >>> EfficientNetLite.tensor_name("blocks/1/expand_conv/kernel"), EfficientNetLite.tensor_name("bn0/mean")
            ('_blocks.1._expand_conv.weight', '_bn0.running_mean')
        """
        *modules, leaf = name.split("/")
        return torch_name("/".join([*(part if part.isdigit() else f"_{part}" for part in modules), leaf]))


def efficientnet_lite0(**kwargs: Any) -> EfficientNetLite:
    """EfficientNet-Lite0: 4,652,008 parameters, 385,187,552 multiply-adds for an image of 224 x 224.

    Args:
        **kwargs: As for :class:`EfficientNetLite`, ``rngs`` at least.

    Example:
        >>> model = nnx.eval_shape(lambda: efficientnet_lite0(rngs=nnx.Rngs(0)))
    """
    return EfficientNetLite(**kwargs)


def _conv(d_in: int, d_out: int, kernel: int, stride: int = 1, *, groups: int = 1, **kwargs: Any) -> nnx.Conv:
    # Not truncated, and without the number of groups in the fan-out: a depthwise kernel has one output per group.
    init = nnx.initializers.normal(math.sqrt(2 * groups / (kernel * kernel * d_out)))
    return nnx.Conv(
        d_in,
        d_out,
        (kernel, kernel),
        strides=stride,
        padding="SAME",
        feature_group_count=groups,
        use_bias=False,
        kernel_init=init,
        **kwargs,
    )


def _norm(width: int, **kwargs: Any) -> BatchNorm:
    return BatchNorm(width, momentum=0.99, epsilon=1e-3, **kwargs)


def _dense_init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32, *_: Any) -> jax.Array:
    # As the PyTorch port. TensorFlow's bound is 1 / sqrt(classes): logits of 12 with 10 classes, which does not train.
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)
