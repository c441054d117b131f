"""Residual networks (He et al. 2015, arXiv 1512.03385), with the strided 3x3 convolution of torchvision ("v1.5").

ResNet50 is ``ResNet((3, 4, 6, 3), block=Bottleneck, rngs=rngs)``; module names follow torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp
from flax import nnx

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
_Conv = partial(nnx.Conv, use_bias=False, kernel_init=_he_normal)
_BatchNorm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)


class Downsample(nnx.Module):
    """The projection of a shortcut: 1x1 convolution and BatchNorm."""

    def __init__(self, d_in: int, d_out: int, stride: int, *, rngs: nnx.Rngs):
        self.conv = _Conv(d_in, d_out, (1, 1), strides=stride, padding="VALID", rngs=rngs)
        self.bn = _BatchNorm(d_out, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w d_in"]) -> Float[Array, "n h2 w2 d_out"]:
        """Projects ``x``."""
        return self.bn(self.conv(x))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions with a shortcut."""

    expansion = 1

    def __init__(self, d_in: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = _Conv(d_in, width, (3, 3), strides=stride, padding=1, rngs=rngs)
        self.bn1 = _BatchNorm(width, rngs=rngs)
        self.conv2 = _Conv(width, width, (3, 3), padding=1, rngs=rngs)
        self.bn2 = _BatchNorm(width, rngs=rngs)
        projects = stride != 1 or d_in != width
        self.downsample = nnx.data(Downsample(d_in, width, stride, rngs=rngs) if projects else None)

    def __call__(self, x: Float[Array, "n h w d_in"]) -> Float[Array, "n h2 w2 d_out"]:
        """Applies the block."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nnx.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions with a shortcut; four times as wide outside as inside."""

    expansion = 4

    def __init__(self, d_in: int, width: int, stride: int, *, rngs: nnx.Rngs):
        d_out = width * self.expansion
        self.conv1 = _Conv(d_in, width, (1, 1), rngs=rngs)
        self.bn1 = _BatchNorm(width, rngs=rngs)
        self.conv2 = _Conv(width, width, (3, 3), strides=stride, padding=1, rngs=rngs)
        self.bn2 = _BatchNorm(width, rngs=rngs)
        self.conv3 = _Conv(width, d_out, (1, 1), rngs=rngs)
        self.bn3 = _BatchNorm(d_out, rngs=rngs)
        projects = stride != 1 or d_in != d_out
        self.downsample = nnx.data(Downsample(d_in, d_out, stride, rngs=rngs) if projects else None)

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
        rngs: Random streams for initialisation.

    Example:
        >>> model = ResNet((1, 1), (8, 16), BasicBlock, num_classes=10, channels=1, stem="cifar", rngs=nnx.Rngs(0))
        >>> model(jnp.ones((2, 28, 28, 1))).shape
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
        rngs: nnx.Rngs,
    ):
        kernel, stride, padding = (7, 2, 3) if stem == "imagenet" else (3, 1, 1)
        self.stem = stem
        self.conv1 = _Conv(channels, widths[0], (kernel, kernel), strides=stride, padding=padding, rngs=rngs)
        self.bn1 = _BatchNorm(widths[0], rngs=rngs)
        d_in = widths[0]
        stages = []
        for stage, (size, width) in enumerate(zip(stage_sizes, widths, strict=True)):
            blocks = []
            for position in range(size):
                blocks.append(block(d_in, width, 2 if stage > 0 and position == 0 else 1, rngs=rngs))
                d_in = width * block.expansion
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.fc = nnx.Linear(d_in, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """Logits of a batch of images."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.fc(jnp.mean(x, axis=(1, 2)))
