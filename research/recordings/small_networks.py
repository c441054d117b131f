"""Two networks that are in the training set only, so that predictors see more kinds: MLP-Mixer and ConvNeXt, small."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import nnx

from models.deit import MLP, PatchEmbed
from models.layers.depthwise import depthwise_convolution

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class MixerBlock(nnx.Module):
    """Two MLPs, each behind a LayerNorm and beside a residual: one along the patches, one along the channels."""

    def __init__(self, patches: int, dim: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(dim, rngs=rngs)
        self.patches = MLP(patches, 2 * patches, dropout=0.0, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, rngs=rngs)
        self.channels = MLP(dim, 4 * dim, dropout=0.0, rngs=rngs)

    def __call__(self, x: Float[Array, "n patches dim"]) -> Float[Array, "n patches dim"]:
        """Applies the block."""
        x = x + self.patches(self.norm1(x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nnx.Module):
    """MLP-Mixer (arXiv 2105.01601).

    Args:
        image_size: Height and width of the images.
        patch_size: Height and width of a patch.
        dim: Channels.
        depth: Number of blocks.
        num_classes: Width of the head.
        rngs: Random streams.
    """

    def __init__(self, *, image_size: int, patch_size: int, dim: int, depth: int, num_classes: int, rngs: nnx.Rngs):
        self.embedding = PatchEmbed(patch_size, 3, dim, rngs=rngs)
        patches = (image_size // patch_size) ** 2
        self.blocks = nnx.List([MixerBlock(patches, dim, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.head = nnx.Linear(dim, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """Logits of some images."""
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=1))


class ConvNeXtBlock(nnx.Module):
    """A depthwise convolution, a LayerNorm and an MLP along the channels, beside a residual."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.depthwise = nnx.Conv(
            dim, dim, (5, 5), feature_group_count=dim, conv_general_dilated=depthwise_convolution, rngs=rngs
        )
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.channels = MLP(dim, 4 * dim, dropout=0.0, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w dim"]) -> Float[Array, "n h w dim"]:
        """Applies the block."""
        return x + self.channels(self.norm(self.depthwise(x)))


class ConvNeXt(nnx.Module):
    """ConvNeXt (arXiv 2201.03545), with kernels of 5 x 5 and without layer scale.

    Args:
        dims: Channels of every stage; each but the first begins by halving height and width, as does the stem.
        depth: Blocks in a stage.
        num_classes: Width of the head.
        rngs: Random streams.
    """

    def __init__(self, *, dims: tuple[int, ...], depth: int, num_classes: int, rngs: nnx.Rngs):
        before = (3, *dims)
        self.norms = nnx.List([nnx.LayerNorm(dim, rngs=rngs) for dim in dims])
        self.halving = nnx.List(
            [nnx.Conv(before[i], dim, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs) for i, dim in enumerate(dims)]
        )
        self.stages = nnx.List([nnx.List([ConvNeXtBlock(dim, rngs=rngs) for _ in range(depth)]) for dim in dims])
        self.norm = nnx.LayerNorm(dims[-1], rngs=rngs)
        self.head = nnx.Linear(dims[-1], num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """Logits of some images."""
        for halving, norm, stage in zip(self.halving, self.norms, self.stages, strict=True):
            x = norm(halving(x))
            for block in stage:
                x = block(x)
        return self.head(self.norm(jnp.mean(x, axis=(1, 2))))
