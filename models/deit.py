"""Vision transformer in the form of DeiT (Touvron et al. 2021, arXiv 2012.12877): pre-norm blocks and a class token.

DeiT-T is ``DeiT(dim=192, depth=12, heads=3, rngs=rngs)``; module names follow timm's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_init = nnx.initializers.truncated_normal(0.02)
_Linear = partial(nnx.Linear, kernel_init=_init)
_LayerNorm = partial(nnx.LayerNorm, epsilon=1e-6)


class Attention(nnx.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = _Linear(dim, 3 * dim, rngs=rngs)
        self.proj = _Linear(dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "n tokens dim"]) -> Float[Array, "n tokens dim"]:
        """Attends over the tokens."""
        n, tokens, dim = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads), 2, 0)
        return self.proj(jax.nn.dot_product_attention(q, k, v).reshape(n, tokens, dim))


class MLP(nnx.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs):
        self.fc1 = _Linear(dim, hidden, rngs=rngs)
        self.fc2 = _Linear(hidden, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "n tokens dim"]) -> Float[Array, "n tokens dim"]:
        """Applies the layers to the last axis."""
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, *, rngs: nnx.Rngs):
        self.norm1 = _LayerNorm(dim, rngs=rngs)
        self.attn = Attention(dim, heads, rngs=rngs)
        self.norm2 = _LayerNorm(dim, rngs=rngs)
        self.mlp = MLP(dim, dim * mlp_ratio, rngs=rngs)

    def __call__(self, x: Float[Array, "n tokens dim"]) -> Float[Array, "n tokens dim"]:
        """Applies the block."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DeiT(nnx.Module):
    """A vision transformer for image classification.

    Args:
        image_size: Height and width of the images.
        patch_size: Height and width of a patch.
        channels: Channels of the images.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads per block.
        mlp_ratio: Hidden width of the MLPs, as a multiple of ``dim``.
        num_classes: Width of the head.
        rngs: Random streams for initialisation.

    Raises:
        ValueError: If the patches do not tile the image, or the heads do not divide ``dim``.

    Example:
        >>> model = DeiT(image_size=32, patch_size=8, dim=64, depth=2, heads=2, num_classes=10, rngs=nnx.Rngs(0))
        >>> model(jnp.ones((1, 32, 32, 3))).shape
        (1, 10)
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: int = 4,
        num_classes: int = 1000,
        rngs: nnx.Rngs,
    ):
        if image_size % patch_size or dim % heads:
            raise ValueError(
                f"patch_size, heads: got {patch_size} and {heads}, expected divisors of image_size ({image_size}) and "
                f"of dim ({dim})"
            )
        patch = (patch_size, patch_size)
        self.patch_embed = nnx.Conv(channels, dim, patch, strides=patch, padding="VALID", kernel_init=_init, rngs=rngs)
        self.cls_token = nnx.Param(_init(rngs.params(), (1, 1, dim), jnp.float32))
        self.pos_embed = nnx.Param(_init(rngs.params(), (1, 1 + (image_size // patch_size) ** 2, dim), jnp.float32))
        self.blocks = nnx.List([Block(dim, heads, mlp_ratio, rngs=rngs) for _ in range(depth)])
        self.norm = _LayerNorm(dim, rngs=rngs)
        self.head = _Linear(dim, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """Logits of a batch of images."""
        x = self.patch_embed(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        cls = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.pos_embed[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
