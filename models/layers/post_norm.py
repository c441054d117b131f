"""Transformer blocks with the norms behind the residual connections, as BERT has them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from flax import nnx

from models.layers.transformer import attend, layer_norm, make_dropout

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Linear = partial(nnx.Linear, kernel_init=nnx.initializers.normal(0.02))
bert_norm = partial(layer_norm, epsilon=1e-12)


class SelfAttention(nnx.Module):
    """Multi-head self-attention, without the projection of its output."""

    def __init__(self, dim: int, heads: int, *, attention_dropout: float, rngs: nnx.Rngs, **dtypes: Any):
        self.heads = heads
        self.query = Linear(dim, dim, rngs=rngs, **dtypes)
        self.key = Linear(dim, dim, rngs=rngs, **dtypes)
        self.value = Linear(dim, dim, rngs=rngs, **dtypes)
        self.dropout = make_dropout(attention_dropout, rngs)

    def __call__(
        self, x: Float[Array, "n tokens dim"], mask: Int[Array, "n tokens"] | None
    ) -> Float[Array, "n tokens dim"]:
        """Attends over the tokens where ``mask`` is not 0."""
        q, k, v = (layer(x).reshape(*x.shape[:2], self.heads, -1) for layer in (self.query, self.key, self.value))
        return attend(q, k, v, self.dropout, mask)


class Output(nnx.Module):
    """Linear layer, residual connection and LayerNorm."""

    def __init__(self, d_in: int, dim: int, *, dropout: float, rngs: nnx.Rngs, **dtypes: Any):
        self.dense = Linear(d_in, dim, rngs=rngs, **dtypes)
        self.dropout = make_dropout(dropout, rngs)
        self.LayerNorm = bert_norm(dim, rngs=rngs, **dtypes)

    def __call__(
        self, x: Float[Array, "n tokens d_in"], residual: Float[Array, "n tokens dim"]
    ) -> Float[Array, "n tokens dim"]:
        """Adds the transformed ``x`` to ``residual``, and normalises."""
        return self.LayerNorm(residual + self.dropout(self.dense(x))).astype(residual.dtype)


class Attention(nnx.Module):
    """Self-attention with its output layer."""

    def __init__(
        self, dim: int, heads: int, *, dropout: float, attention_dropout: float, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.self = SelfAttention(dim, heads, attention_dropout=attention_dropout, rngs=rngs, **dtypes)
        self.output = Output(dim, dim, dropout=dropout, rngs=rngs, **dtypes)

    def __call__(
        self, x: Float[Array, "n tokens dim"], mask: Int[Array, "n tokens"] | None
    ) -> Float[Array, "n tokens dim"]:
        """Attends over the tokens where ``mask`` is not 0."""
        return self.output(self.self(x, mask), x)


class Intermediate(nnx.Module):
    """Linear layer with an exact GELU."""

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.dense = Linear(dim, hidden, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "n tokens dim"]) -> Float[Array, "n tokens hidden"]:
        """Applies the layer to the last axis."""
        return nnx.gelu(self.dense(x), approximate=False)


class Layer(nnx.Module):
    """Post-norm transformer block.

    Attributes:
        frozen_params: Names of its frozen parameters; see :func:`smartfrz_jax.nnx.scan_blocks`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        dropout: float,
        attention_dropout: float,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        self.frozen_params: frozenset[str] = frozenset()
        self.attention = Attention(
            dim, heads, dropout=dropout, attention_dropout=attention_dropout, rngs=rngs, **dtypes
        )
        self.intermediate = Intermediate(dim, hidden, rngs=rngs, **dtypes)
        self.output = Output(hidden, dim, dropout=dropout, rngs=rngs, **dtypes)

    def __call__(
        self, x: Float[Array, "n tokens dim"], mask: Int[Array, "n tokens"] | None
    ) -> Float[Array, "n tokens dim"]:
        """Applies the block; tokens are attended to where ``mask`` is not 0."""
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)
