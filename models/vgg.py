"""VGG networks (Simonyan and Zisserman 2014, arXiv 1409.1556), with and without BatchNorm.

Initialisation and module names follow torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax

from models.layers.batch_norm import BatchNorm
from models.layers.checks import check_images, check_rate
from models.layers.sequential import Sequential
from models.layers.torch_names import torch_name

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_Conv = partial(nnx.Conv, kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"))
_Linear = partial(nnx.Linear, kernel_init=nnx.initializers.normal(0.01))
_MAP = 7


class VGG(nnx.Module):
    """A plain stack of 3x3 convolutions and three linear layers.

    The last map is averaged to 7x7 cells before the linear layers, whatever its size; cells of a smaller map repeat.

    Args:
        widths: For each stage the widths of its convolutions; 2x2 max pooling ends every stage.
        batch_norm: Whether BatchNorm follows every convolution.
        hidden: Width of the two hidden linear layers.
        num_classes: Width of the head.
        channels: Channels of the input.
        dropout: Rate behind each hidden linear layer.
        dtype: Type to compute in, such as ``jnp.bfloat16``; that of images and weights by default. BatchNorm's
            statistics and the logits are float32 always.
        param_dtype: Type of the weights.
        rngs: Random streams for initialisation and dropout.

    Raises:
        ValueError: If ``dropout`` is not a rate.

    Example:
        >>> def logits(images):
        ...     model = VGG([[4], [8, 8]], hidden=16, num_classes=10, rngs=nnx.Rngs(0))
        ...     return model(images)
        >>> nnx.eval_shape(logits, jnp.ones((2, 32, 32, 3))).shape
        (2, 10)
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]],
        *,
        batch_norm: bool = False,
        hidden: int = 4096,
        num_classes: int = 1000,
        channels: int = 3,
        dropout: float = 0.5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_rate(dropout, "dropout")
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.channels, self.least = channels, 2 ** len(widths)
        features: list[Any] = []
        d_in = channels
        for stage in widths:
            for width in stage:
                features.append(_Conv(d_in, width, (3, 3), padding=1, rngs=rngs, **dtypes))
                features.extend([BatchNorm(width, rngs=rngs, **dtypes)] if batch_norm else [])
                features.append(nnx.relu)
                d_in = width
            features.append(_max_pool)
        self.features = Sequential(features)
        classifier: list[Any] = []
        d_in *= _MAP * _MAP
        for _ in range(2):
            drop = nnx.Dropout(dropout, rngs=rngs if dropout else None)
            classifier += [_Linear(d_in, hidden, rngs=rngs, **dtypes), nnx.relu, drop]
            d_in = hidden
        self.classifier = Sequential([*classifier, _Linear(d_in, num_classes, rngs=rngs, **dtypes)])

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """Logits of a batch of images of any size that the poolings leave something of, float32."""
        check_images(x, self.channels, least=self.least)
        x = self.features(x)
        x = adaptive_mean(adaptive_mean(x, 1, _MAP), 2, _MAP)
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # PyTorch flattens with the channels first
        return self.classifier(x).astype(jnp.float32)

    @staticmethod
    def tensor_name(name: str) -> str:
        """Name that torchvision has for a variable.

        Args:
            name: Path of a parameter or a statistic, as ``smartfrz_jax.pytrees.paths`` gives it.

        Returns:
            The name.

        Example:
            >>> VGG.tensor_name("features/0/kernel")
            'features.0.weight'
        """
        return torch_name(name)


def vgg11(*, batch_norm: bool = False, **kwargs: Any) -> VGG:
    """VGG11: 132,863,336 parameters, 7,609,090,048 multiply-adds for an image of 224 x 224.

    Args:
        batch_norm: Whether BatchNorm follows every convolution; makes it 132,868,840 parameters.
        **kwargs: As for :class:`VGG`, ``rngs`` at least.

    Example:
        >>> model = nnx.eval_shape(lambda: vgg11(batch_norm=True, rngs=nnx.Rngs(0)))
    """
    return VGG([[64], [128], [256, 256], [512, 512], [512, 512]], batch_norm=batch_norm, **kwargs)


def adaptive_mean(x: Float[Array, "..."], axis: int, cells: int) -> Float[Array, "..."]:
    """Means over ``cells`` windows that cover an axis evenly, as PyTorch's ``AdaptiveAvgPool2d`` takes them.

    Window ``i`` of an axis of size ``n`` goes from ``floor(i n / cells)`` to ``ceil((i + 1) n / cells)``.

    Args:
        x: Any array.
        axis: The axis.
        cells: Its size in the result; may be larger than in ``x``.

    Returns:
        An array like ``x`` but for the size of the axis.

    Example:
        >>> adaptive_mean(jnp.array([1.0, 2.0, 3.0]), 0, 2).tolist()
        [1.5, 2.5]
    """
    size = x.shape[axis]
    if size == cells:
        return x
    windows = [lax.slice_in_dim(x, i * size // cells, -(-(i + 1) * size // cells), axis=axis) for i in range(cells)]
    return jnp.stack([jnp.mean(window, axis) for window in windows], axis)


def _max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    return nnx.max_pool(x, (2, 2), (2, 2))
