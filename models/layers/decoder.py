"""Blocks of decoders as Llama has them: RMSNorm, rotary positions, grouped queries and a gated MLP, without biases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.layers.transformer import at_least_float32, attend

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


def linear(init_std: float, **options: Any) -> Callable[[int, int], nnx.Linear]:
    """Makes linear layers of given widths, without bias; their weights are drawn with this standard deviation."""
    return partial(nnx.Linear, use_bias=False, kernel_init=nnx.initializers.normal(init_std), **options)


def rms_norm(dim: int, *, epsilon: float, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm in at least float32, and with an output of that type."""
    return nnx.RMSNorm(dim, epsilon=epsilon, dtype=at_least_float32(dtype), param_dtype=param_dtype, rngs=rngs)


def rotary_angles(tokens: int, d: int, theta: float, dtype: DTypeLike) -> Float[Array, "tokens half"]:
    """Angles of the rotations by which positions are told (Su et al. 2021, arXiv 2104.09864).

    Args:
        tokens: Number of positions, from 0 on.
        d: Width of a head; even.
        theta: Base of the wavelengths, which are from 2 pi to almost 2 pi ``theta`` tokens.
        dtype: Type to compute in; at least float32.

    Example:
        >>> rotary_angles(3, 4, 100.0, jnp.float32).tolist()
        [[0.0, 0.0], [1.0, 0.10000000149011612], [2.0, 0.20000000298023224]]
    """
    dtype = at_least_float32(dtype)
    frequencies = jnp.asarray([theta ** (-2 * i / d) for i in range(d // 2)], dtype)
    return jnp.arange(tokens, dtype=dtype)[:, None] * frequencies[None]


def rotate(
    x: Float[Array, "n tokens heads d"], angles: Float[Array, "tokens half"]
) -> Float[Array, "n tokens heads d"]:
    """Rotates entry ``i`` and entry ``i + d / 2`` of every head together, as in Hugging Face's files; see their paper.

    Args:
        x: Queries or keys; the result has their dtype.
        angles: From :func:`rotary_angles`.
    """
    cos, sin = (function(angles)[None, :, None, :] for function in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(angles.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def causal_mask(tokens: int, segment_ids: Int[Array, "n tokens"] | None = None) -> Bool[Array, "n_or_1 tokens tokens"]:
    """Which tokens (last axis) each token (the axis before) attends to: itself and those before it in its segment.

    Args:
        tokens: Length of the sequences.
        segment_ids: Equal for the tokens of one text, where several are packed into a sequence; one text by default.

    Example:
        >>> causal_mask(3, jnp.array([[0, 0, 1]])).astype(int).tolist()
        [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    """
    causal = jnp.tri(tokens, dtype=bool)[None]
    return causal if segment_ids is None else causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


class Attention(nnx.Module):
    """Self-attention with rotary positions, in which groups of queries share keys and values."""

    def __init__(self, dim: int, heads: int, kv_heads: int, *, init_std: float, rngs: nnx.Rngs, **dtypes: Any):
        d = dim // heads
        self.d = d
        projection = linear(init_std, rngs=rngs, **dtypes)
        self.q_proj = projection(dim, heads * d)
        self.k_proj = projection(dim, kv_heads * d)
        self.v_proj = projection(dim, kv_heads * d)
        self.o_proj = projection(heads * d, dim)

    def __call__(
        self,
        x: Float[Array, "n tokens dim"],
        mask: Bool[Array, "n_or_1 tokens tokens"],
        angles: Float[Array, "tokens half"],
    ) -> Float[Array, "n tokens dim"]:
        """Attends over the tokens that ``mask`` gives; ``angles`` are those of :func:`rotary_angles`."""
        q, k, v = (layer(x).reshape(*x.shape[:2], -1, self.d) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, angles), rotate(k, angles)
        k, v = (jnp.repeat(shared, q.shape[2] // shared.shape[2], axis=2) for shared in (k, v))
        return self.o_proj(attend(q, k, v, None, mask))


class GatedMLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int, *, init_std: float, rngs: nnx.Rngs, **dtypes: Any):
        projection = linear(init_std, rngs=rngs, **dtypes)
        self.gate_proj = projection(dim, hidden)
        self.up_proj = projection(dim, hidden)
        self.down_proj = projection(hidden, dim)

    def __call__(self, x: Float[Array, "n tokens dim"]) -> Float[Array, "n tokens dim"]:
        """Applies the layers to the last axis."""
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Pre-norm block of a decoder.

    Attributes:
        frozen_params: Names of its frozen parameters; see :func:`smartfrz_jax.nnx.scan_blocks`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        hidden: int,
        *,
        epsilon: float,
        init_std: float,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        self.frozen_params: frozenset[str] = frozenset()
        self.input_layernorm = rms_norm(dim, epsilon=epsilon, rngs=rngs, **dtypes)
        self.self_attn = Attention(dim, heads, kv_heads, init_std=init_std, rngs=rngs, **dtypes)
        self.post_attention_layernorm = rms_norm(dim, epsilon=epsilon, rngs=rngs, **dtypes)
        self.mlp = GatedMLP(dim, hidden, init_std=init_std, rngs=rngs, **dtypes)

    def __call__(
        self,
        x: Float[Array, "n tokens dim"],
        mask: Bool[Array, "n_or_1 tokens tokens"],
        angles: Float[Array, "tokens half"],
    ) -> Float[Array, "n tokens dim"]:
        """Applies the block, with arguments as of :class:`Attention`."""
        x = x + self.self_attn(self.input_layernorm(x), mask, angles)
        return x + self.mlp(self.post_attention_layernorm(x))
