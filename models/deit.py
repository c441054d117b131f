"""Vision transformers in the form of DeiT (Touvron et al. 2021, arXiv 2012.12877): pre-norm blocks and a class token.

DeiT-T is :func:`deit_tiny`; module names follow timm's, and :meth:`DeiT.tensor_name` gives those of its files.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.layers.checks import check_images, check_rate
from models.layers.torch_names import torch_name
from models.layers.transformer import at_least_float32, attend, layer_norm, make_dropout
from smartfrz_jax.nnx import scan_blocks

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# DeiT truncates at -2 and 2, that is at a hundred standard deviations: not at all.
_init = nnx.initializers.normal(0.02)
# DeiT leaves the patches' convolution as torch makes it: uniform within 1 / sqrt(fan_in).
_conv_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_Linear = partial(nnx.Linear, kernel_init=_init)
_layer_norm = partial(layer_norm, epsilon=1e-6)


class PatchEmbed(nnx.Module):
    """Linear embedding of the patches of an image."""

    def __init__(self, patch_size: int, channels: int, dim: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.proj = nnx.Conv(
            channels,
            dim,
            (patch_size, patch_size),
            strides=(patch_size, patch_size),
            padding="VALID",
            kernel_init=_conv_init,
            rngs=rngs,
            **dtypes,
        )

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n patches dim"]:
        """Embeds the patches, row by row."""
        x = self.proj(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Attention(nnx.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(
        self, dim: int, heads: int, *, dropout: float, attention_dropout: float, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.heads = heads
        self.qkv = _Linear(dim, 3 * dim, rngs=rngs, **dtypes)
        self.attn_drop = make_dropout(attention_dropout, rngs)
        self.proj = _Linear(dim, dim, rngs=rngs, **dtypes)
        self.proj_drop = make_dropout(dropout, rngs)

    def __call__(self, x: Float[Array, "n tokens dim"]) -> Float[Array, "n tokens dim"]:
        """Attends over the tokens."""
        n, tokens, dim = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads), 2, 0)
        return self.proj_drop(self.proj(attend(q, k, v, self.attn_drop)))


class MLP(nnx.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int, *, dropout: float, rngs: nnx.Rngs, **dtypes: Any):
        self.fc1 = _Linear(dim, hidden, rngs=rngs, **dtypes)
        self.drop1 = make_dropout(dropout, rngs)
        self.fc2 = _Linear(hidden, dim, rngs=rngs, **dtypes)
        self.drop2 = make_dropout(dropout, rngs)

    def __call__(self, x: Float[Array, "n tokens dim"]) -> Float[Array, "n tokens dim"]:
        """Applies the layers to the last axis."""
        return self.drop2(self.fc2(self.drop1(nnx.gelu(self.fc1(x), approximate=False))))


class DropPath(nnx.Dropout):
    """Stochastic depth: drops a residual branch for whole examples, with probability ``rate * depth``.

    Args:
        rate: The rate of the last block.
        depth: Where the block is, from 0 for the first to 1 for the last. It is a variable, not a static attribute, so
            that blocks that differ in nothing else can be scanned over.
        rngs: Random streams.
    """

    def __init__(self, rate: float, depth: float, *, rngs: nnx.Rngs):
        super().__init__(rate, broadcast_dims=(1, 2), rngs=rngs if rate > 0 else None)
        self.depth = nnx.Variable(jnp.asarray(depth, jnp.float32)) if rate > 0 else nnx.data(None)

    def __call__(self, inputs: Float[Array, "n tokens dim"]) -> Float[Array, "n tokens dim"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Drops examples, and scales up the others so that the mean is kept."""
        if self.deterministic or self.rate == 0:
            return inputs
        assert self.rngs is not None
        assert self.depth is not None
        keep = 1 - self.rate * self.depth[...]
        kept = jax.random.bernoulli(self.rngs(), keep, (inputs.shape[0], 1, 1))
        return jnp.where(kept, inputs / keep.astype(inputs.dtype), jnp.zeros_like(inputs))


class Block(nnx.Module):
    """Pre-norm transformer block.

    Attributes:
        frozen_params: Names of its frozen parameters; see :func:`smartfrz_jax.nnx.scan_blocks`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: int,
        *,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
        depth: float,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        self.frozen_params: frozenset[str] = frozenset()
        self.norm1 = _layer_norm(dim, rngs=rngs, **dtypes)
        self.attn = Attention(dim, heads, dropout=dropout, attention_dropout=attention_dropout, rngs=rngs, **dtypes)
        self.drop_path1 = DropPath(drop_path, depth, rngs=rngs)
        self.norm2 = _layer_norm(dim, rngs=rngs, **dtypes)
        self.mlp = MLP(dim, dim * mlp_ratio, dropout=dropout, rngs=rngs, **dtypes)
        self.drop_path2 = DropPath(drop_path, depth, rngs=rngs)

    def __call__(self, x: Float[Array, "n tokens dim"]) -> Float[Array, "n tokens dim"]:
        """Applies the block."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class DeiT(nnx.Module):
    """A vision transformer for image classification.

    As all NNX modules it is made in training mode; ``model.eval()`` turns dropout and stochastic depth off.

    Args:
        image_size: Height and width of the images, a number or a pair.
        patch_size: Height and width of a patch.
        channels: Channels of the images.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads per block.
        mlp_ratio: Hidden width of the MLPs, as a multiple of ``dim``.
        num_classes: Width of the head.
        distilled: Whether there is a distillation token, with a head of its own.
        dropout: Rate of dropout behind the embeddings, the attention and the layers of the MLPs.
        attention_dropout: Rate of dropout on the attention weights.
        drop_path: Rate of stochastic depth in the last block; it rises linearly from 0 in the first.
        scan: Whether to run the blocks as a scan over their stacked weights, which compiles faster; see
            :func:`smartfrz_jax.nnx.scan_blocks`. It changes neither parameters nor results.
        dtype: Type to compute in, such as ``jnp.bfloat16``; ``param_dtype`` by default. Norms, softmax and heads are
            in at least float32.
        param_dtype: Type of the parameters.
        rngs: Random streams for initialisation and dropout.

    Raises:
        ValueError: If the patches do not tile the image, the heads do not divide ``dim``, or a rate is not one.

    Example:
        >>> def logits(images):
        ...     model = DeiT(image_size=32, patch_size=8, dim=64, depth=2, heads=2, num_classes=10, rngs=nnx.Rngs(0))
        ...     return model(images)
        >>> nnx.eval_shape(logits, jnp.ones((1, 32, 32, 3))).shape
        (1, 10)
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        channels: int = 3,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: int = 4,
        num_classes: int = 1000,
        distilled: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        scan: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or width % patch_size or dim % heads:
            raise ValueError(
                f"patch_size, heads: got {patch_size} and {heads}, expected divisors of image_size ({image_size}) and "
                f"of dim ({dim})"
            )
        for argument, rate in (
            ("dropout", dropout),
            ("attention_dropout", attention_dropout),
            ("drop_path", drop_path),
        ):
            check_rate(rate, argument)
        dtype = param_dtype if dtype is None else dtype
        self.image_shape = (height, width, channels)
        self.scan = scan
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}  # of every layer
        self.patch_embed = PatchEmbed(patch_size, channels, dim, rngs=rngs, **dtypes)
        patches = (height // patch_size) * (width // patch_size)
        self.cls_token = nnx.Param(_init(rngs.params(), (1, 1, dim), param_dtype))
        if distilled:
            self.dist_token = nnx.Param(_init(rngs.params(), (1, 1, dim), param_dtype))
        self.pos_embed = nnx.Param(_init(rngs.params(), (1, 1 + distilled + patches, dim), param_dtype))
        self.pos_drop = make_dropout(dropout, rngs)
        self.blocks = nnx.List(
            [
                Block(
                    dim,
                    heads,
                    mlp_ratio,
                    dropout=dropout,
                    attention_dropout=attention_dropout,
                    drop_path=drop_path,
                    depth=i / max(depth - 1, 1),
                    rngs=rngs,
                    **dtypes,
                )
                for i in range(depth)
            ]
        )
        self.norm = _layer_norm(dim, rngs=rngs, **dtypes)
        dtypes["dtype"] = at_least_float32(dtype)
        self.head = _Linear(dim, num_classes, rngs=rngs, **dtypes)
        self.distilled = distilled
        if distilled:
            self.head_dist = _Linear(dim, num_classes, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """Logits of a batch of images; of a distilled network, the mean of its two heads.

        Raises:
            ValueError: If the images are not of the size that the network was made for.
        """
        if self.distilled:
            logits, distilled_logits = self.both_logits(x)
            return (logits + distilled_logits) / 2
        return self.head(self._tokens(x)[:, 0])

    def both_logits(self, x: Float[Array, "n h w c"]) -> tuple[Float[Array, "n classes"], Float[Array, "n classes"]]:
        """Logits of the class head and of the distillation head, for a loss that compares the latter with a teacher.

        Raises:
            ValueError: If the network is not distilled, or the images are not of the size that it was made for.
        """
        if not self.distilled:
            raise ValueError("both_logits: this network has one head; make it with distilled=True, or call it instead")
        x = self._tokens(x)
        return self.head(x[:, 0]), self.head_dist(x[:, 1])

    def _tokens(self, x: Float[Array, "n h w c"]) -> Float[Array, "n tokens dim"]:
        height, width, channels = self.image_shape
        check_images(x, channels)
        if x.shape[1:3] != (height, width):
            raise ValueError(
                f"x: got images of {x.shape[1]} x {x.shape[2]}, expected {height} x {width}; resize them, or make the "
                "network with their image_size (models.weights resamples position embeddings)"
            )
        x = self.patch_embed(x)
        prefix = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        tokens = [jnp.broadcast_to(token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1])) for token in prefix]
        x = self.pos_drop(jnp.concatenate([*tokens, x], axis=1) + self.pos_embed[...].astype(x.dtype))
        if self.scan:
            x = scan_blocks(self.blocks, x)
        else:
            for block in self.blocks:
                x = block(x)
        return self.norm(x)

    @staticmethod
    def tensor_name(name: str) -> str:
        """Name in timm's files of a parameter, given its name here.

        Example:
            >>> DeiT.tensor_name("blocks/3/attn/qkv/kernel"), DeiT.tensor_name("norm/scale")
            ('blocks.3.attn.qkv.weight', 'norm.weight')
        """
        return torch_name(name)


def deit_tiny(**kwargs: Any) -> DeiT:
    """DeiT-T: 12 blocks, 192 wide, with 3 heads, and stochastic depth of 0.1 as in DeiT's recipe.

    Args:
        **kwargs: Arguments of :class:`DeiT`, ``rngs`` among them; they go before those of DeiT-T.

    Example:
        >>> model = nnx.eval_shape(lambda: deit_tiny(distilled=True, rngs=nnx.Rngs(0)))
        >>> model.pos_embed.shape
        (1, 198, 192)
    """
    return DeiT(**dict[str, Any](dim=192, depth=12, heads=3, drop_path=0.1) | kwargs)
