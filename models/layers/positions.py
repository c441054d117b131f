"""Position embeddings of vision transformers, for images of another size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def resample_pos_embed(
    pos_embed: Float[Array, "1 tokens dim"],
    grid: tuple[int, int],
    *,
    old_grid: tuple[int, int] | None = None,
    prefix_tokens: int = 1,
) -> Float[Array, "1 new_tokens dim"]:
    """Position embeddings for images of another size, by bicubic interpolation with antialiasing as in timm.

    Args:
        pos_embed: Position embeddings, first those of the class token and the like, then of the patches, row by row.
        grid: Rows and columns of patches of the new size.
        old_grid: Those of the old size; a square by default.
        prefix_tokens: Number of tokens before the patches: 1, or 2 if distilled. Theirs are kept.

    Returns:
        The new embeddings, of the dtype of the old; the old themselves where the grid stays the same.

    Raises:
        ValueError: If the old grid does not have as many patches as there are embeddings.

    Example:
        >>> resample_pos_embed(jnp.ones((1, 1 + 14 * 14, 192)), (2, 4)).shape
        (1, 9, 192)
    """
    patches, dim = pos_embed.shape[1] - prefix_tokens, pos_embed.shape[2]
    side = math.isqrt(max(patches, 0))
    rows, columns = old_grid or (side, side)
    if rows * columns != patches:
        raise ValueError(
            f"pos_embed, old_grid, prefix_tokens: got {pos_embed.shape[1]} embeddings, {old_grid} and {prefix_tokens}, "
            "expected prefix_tokens (2 if distilled) and one for each patch of old_grid (a square unless given)"
        )
    if (rows, columns) == tuple(grid):
        return pos_embed
    image = pos_embed[:, prefix_tokens:].reshape(1, rows, columns, dim).astype(jnp.float32)
    resampled = jax.image.resize(image, (1, *grid, dim), "cubic", antialias=True).astype(pos_embed.dtype)
    return jnp.concatenate([pos_embed[:, :prefix_tokens], resampled.reshape(1, -1, dim)], axis=1)
