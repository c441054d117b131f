"""What the transformers share: attention, LayerNorm and dropout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """The type for what must not be computed in half precision.

    Example:
        >>> at_least_float32(jnp.bfloat16).__name__, at_least_float32(jnp.float64).__name__
        ('float32', 'float64')
    """
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def layer_norm(dim: int, *, epsilon: float, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm in at least float32, and with an output of that type."""
    dtype = at_least_float32(dtype)
    return nnx.LayerNorm(dim, epsilon=epsilon, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def make_dropout(rate: float, rngs: nnx.Rngs) -> nnx.Dropout:
    """Dropout, without a random stream where none would be drawn from."""
    return nnx.Dropout(rate, rngs=rngs if rate > 0 else None)


def attend(
    q: Float[Array, "n tokens heads d"],
    k: Float[Array, "n tokens heads d"],
    v: Float[Array, "n tokens heads d"],
    drop: nnx.Dropout | None,
    mask: Int[Array, "n tokens"] | Bool[Array, "n queries tokens"] | None = None,
) -> Float[Array, "n tokens dim"]:
    """Scaled dot-product attention, the softmax in at least float32.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        drop: Dropout on the attention weights, which ``jax.nn.dot_product_attention`` does not have; or None.
        mask: 0 for the tokens that are not attended to, by any token or by each; none by default.

    Returns:
        The heads' results side by side.
    """
    statistics = at_least_float32(q.dtype)
    logits = jnp.einsum("nqhd,nkhd->nhqk", q, k, preferred_element_type=statistics) / math.sqrt(q.shape[-1])
    if mask is not None:  # the least number, not -inf: a row of padding alone must not become NaN
        wanted = mask[:, None, None, :] != 0 if mask.ndim == 2 else mask[:, None]
        logits = jnp.where(wanted, logits, jnp.finfo(statistics).min)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    weights = weights if drop is None else drop(weights)
    return jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(*q.shape[:2], -1)
