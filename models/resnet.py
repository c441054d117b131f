"""Residual networks (He et al. 2015, arXiv 1512.03385), with the strided 3x3 convolution of torchvision ("v1.5").

Initialisation and module names follow torchvision's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from models.layers.batch_norm import BatchNorm
from models.layers.checks import check_images, check_stem
from models.layers.torch_names import torch_name

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
_Conv = partial(nnx.Conv, use_bias=False, kernel_init=_he_normal)


class Downsample(nnx.Module):
    """The projection of a shortcut: 1x1 convolution and BatchNorm."""

    def __init__(self, d_in: int, d_out: int, stride: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.conv = _Conv(d_in, d_out, (1, 1), strides=stride, padding="VALID", rngs=rngs, **dtypes)
        self.bn = BatchNorm(d_out, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "n h w d_in"]) -> Float[Array, "n h2 w2 d_out"]:
        """Projects ``x``."""
        return self.bn(self.conv(x))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions with a shortcut."""

    expansion = 1

    def __init__(self, d_in: int, width: int, stride: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.conv1 = _Conv(d_in, width, (3, 3), strides=stride, padding=1, rngs=rngs, **dtypes)
        self.bn1 = BatchNorm(width, rngs=rngs, **dtypes)
        self.conv2 = _Conv(width, width, (3, 3), padding=1, rngs=rngs, **dtypes)
        self.bn2 = BatchNorm(width, rngs=rngs, **dtypes)
        projects = stride != 1 or d_in != width
        self.downsample = nnx.data(Downsample(d_in, width, stride, rngs=rngs, **dtypes) if projects else None)

    def __call__(self, x: Float[Array, "n h w d_in"]) -> Float[Array, "n h2 w2 d_out"]:
        """Applies the block."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nnx.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions with a shortcut; four times as wide outside as inside."""

    expansion = 4

    def __init__(self, d_in: int, width: int, stride: int, *, rngs: nnx.Rngs, **dtypes: Any):
        d_out = width * self.expansion
        self.conv1 = _Conv(d_in, width, (1, 1), rngs=rngs, **dtypes)
        self.bn1 = BatchNorm(width, rngs=rngs, **dtypes)
        self.conv2 = _Conv(width, width, (3, 3), strides=stride, padding=1, rngs=rngs, **dtypes)
        self.bn2 = BatchNorm(width, rngs=rngs, **dtypes)
        self.conv3 = _Conv(width, d_out, (1, 1), rngs=rngs, **dtypes)
        self.bn3 = BatchNorm(d_out, rngs=rngs, **dtypes)
        projects = stride != 1 or d_in != d_out
        self.downsample = nnx.data(Downsample(d_in, d_out, stride, rngs=rngs, **dtypes) if projects else None)

    def __call__(self, x: Float[Array, "n h w d_in"]) -> Float[Array, "n h2 w2 d_out"]:
        """Applies the block."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return nnx.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nnx.Module):
    """A residual network for image classification.

    Args:
        stage_sizes: Blocks per stage; each stage after the first halves the resolution.
        widths: Inner width of the blocks of each stage.
        block: ``BasicBlock`` or ``Bottleneck``.
        num_classes: Width of the head.
        channels: Channels of the input.
        stem: ``"imagenet"``, a strided 7x7 convolution and max pooling; or ``"cifar"``, a 3x3 convolution, for small
            images.
        dtype: Type to compute in, such as ``jnp.bfloat16``; that of images and weights by default. BatchNorm's
            statistics and the logits are float32 always.
        param_dtype: Type of the weights.
        rngs: Random streams for initialisation.

    Raises:
        ValueError: If the numbers of ``stage_sizes`` and ``widths`` differ, or there is no such stem.

    Example:
        >>> def logits(images):
        ...     model = ResNet((1, 1), (8, 16), BasicBlock, num_classes=10, channels=1, stem="cifar", rngs=nnx.Rngs(0))
        ...     return model(images)
        >>> nnx.eval_shape(logits, jnp.ones((2, 28, 28, 1))).shape
        (2, 10)
    """

    def __init__(
        self,
        stage_sizes: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        block: type[BasicBlock] | type[Bottleneck] = Bottleneck,
        *,
        num_classes: int = 1000,
        channels: int = 3,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_stem(stem)
        if len(stage_sizes) != len(widths):
            raise ValueError(
                f"stage_sizes, widths: got {len(stage_sizes)} and {len(widths)} of them, expected one each per stage"
            )
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        kernel, stride, padding = (7, 2, 3) if stem == "imagenet" else (3, 1, 1)
        self.stem, self.channels = stem, channels
        self.conv1 = _Conv(channels, widths[0], (kernel, kernel), strides=stride, padding=padding, rngs=rngs, **dtypes)
        self.bn1 = BatchNorm(widths[0], rngs=rngs, **dtypes)
        d_in = widths[0]
        stages = []
        for stage, (size, width) in enumerate(zip(stage_sizes, widths, strict=True)):
            blocks = []
            for position in range(size):
                blocks.append(block(d_in, width, 2 if stage > 0 and position == 0 else 1, rngs=rngs, **dtypes))
                d_in = width * block.expansion
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        init = _uniform(d_in**-0.5)  # PyTorch's own for linear layers
        self.fc = nnx.Linear(d_in, num_classes, kernel_init=init, bias_init=init, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """Logits of a batch of images of any size, float32."""
        check_images(x, self.channels)
        x = nnx.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.fc(jnp.mean(x, axis=(1, 2))).astype(jnp.float32)

    @staticmethod
    def tensor_name(name: str) -> str:
        """Name that torchvision has for a variable.

        Args:
            name: Path of a parameter or a statistic, as ``smartfrz_jax.pytrees.paths`` gives it.

        Returns:
            The name.

        Example:
            >>> ResNet.tensor_name("stages/0/1/conv2/kernel"), ResNet.tensor_name("stages/2/0/downsample/bn/var")
            ('layer1.1.conv2.weight', 'layer3.0.downsample.1.running_var')
        """
        name = re.sub(r"^stages/(\d+)", lambda stage: f"layer{int(stage[1]) + 1}", name)
        return torch_name(name.replace("downsample/conv", "downsample/0").replace("downsample/bn", "downsample/1"))


def resnet50(**kwargs: Any) -> ResNet:
    """ResNet50: 25,557,032 parameters, 4,089,184,256 multiply-adds for an image of 224 x 224.

    Args:
        **kwargs: As for :class:`ResNet`, ``rngs`` at least.

    Example:
        >>> model = nnx.eval_shape(lambda: resnet50(rngs=nnx.Rngs(0)))
    """
    return ResNet((3, 4, 6, 3), **kwargs)


def _uniform(bound: float) -> nnx.Initializer:
    return lambda key, shape, dtype=jnp.float32, *_: jax.random.uniform(key, shape, dtype, -bound, bound)
