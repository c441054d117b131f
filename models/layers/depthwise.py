"""Depthwise convolutions that are fast on CPUs.

XLA's CPU backend takes 20 to 100 times longer for a depthwise convolution than for reading and writing its images, and
computes the gradient of the kernel for every *pair* of channels. Here it is what it is by definition: a sum, over the
positions of the kernel, of the shifted image times a weight for every channel, which XLA makes one loop of. The two
gradients are sums of the same kind, and have rules of their own, for the derivative of the loop is not such a sum.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_Pair = tuple[int, int]

# As many rows, from all over the image, are added up before the sum over all rows: XLA makes one fast loop of the
# former, but reads the image once for every channel in the latter.
_ROWS = 8


def depthwise_convolution(
    x: Float[Array, "n h w channels"],
    kernel: Float[Array, "kh kw 1 channels"],
    strides: Sequence[int],
    padding: str | Sequence[_Pair],
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
    *,
    feature_group_count: int,
    **options: Any,
) -> Float[Array, "n h2 w2 channels"]:
    """``jax.lax.conv_general_dilated`` for the ``conv_general_dilated`` of ``nnx.Conv``, another program on CPUs.

    It depends on JAX's default backend at the time of tracing. On others than CPU, and for convolutions that are
    dilated or not depthwise, it *is* ``jax.lax.conv_general_dilated``. On CPU there are no forward-mode derivatives;
    sums are taken in float32 where images or weights are narrower.

    Args:
        x: Images.
        kernel: Kernel.
        strides: Strides.
        padding: ``"SAME"`` or ``"VALID"`` as TensorFlow has them, or what to add before and behind each axis.
        lhs_dilation: Dilation of the images.
        rhs_dilation: Dilation of the kernel.
        feature_group_count: Number of groups; that of channels in a depthwise convolution.
        **options: As for ``jax.lax.conv_general_dilated``; channels last.

    Returns:
        Images of the type of ``x``.

    Example:
        >>> from flax import nnx
        >>> conv = nnx.Conv(
        ...     8,
        ...     8,
        ...     (3, 3),
        ...     feature_group_count=8,
        ...     use_bias=False,
        ...     conv_general_dilated=depthwise_convolution,
        ...     rngs=nnx.Rngs(0),
        ... )
        >>> conv(jnp.ones((2, 5, 5, 8))).shape
        (2, 5, 5, 8)
    """
    is_depthwise = feature_group_count == x.shape[-1] == kernel.shape[-1]
    if jax.default_backend() != "cpu" or not is_depthwise or {*lhs_dilation, *rhs_dilation} != {1}:
        options |= {"lhs_dilation": lhs_dilation, "rhs_dilation": rhs_dilation}
        return lax.conv_general_dilated(x, kernel, strides, padding, feature_group_count=feature_group_count, **options)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    (top, bottom), (left, right) = padding
    return _convolution(x, kernel, (strides[0], strides[1]), ((top, bottom), (left, right)))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
@partial(jax.jit, static_argnums=(2, 3))
def _convolution(
    x: Float[Array, "n h w channels"],
    kernel: Float[Array, "kh kw 1 channels"],
    strides: _Pair,
    padding: tuple[_Pair, _Pair],
) -> Float[Array, "n h2 w2 channels"]:
    sizes = zip(x.shape[1:3], kernel.shape[:2], strides, padding, strict=True)
    rows, cols = ((size + sum(pads) - width) // stride + 1 for size, width, stride, pads in sizes)
    padded, weights = _padded(_wide(x), padding), _wide(kernel)[:, :, None, None]
    products = (
        _part(_part(padded, 1, i, rows, strides[0]), 2, j, cols, strides[1]) * weights[i, j]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )
    return _sum(products).astype(x.dtype)


def _forward(x: Any, kernel: Any, strides: _Pair, padding: tuple[_Pair, _Pair]) -> tuple[Any, tuple[Any, Any]]:
    return _convolution(x, kernel, strides, padding), (x, kernel)


def _backward(
    strides: _Pair, padding: tuple[_Pair, _Pair], residuals: tuple[Any, Any], dy: Float[Array, "n h2 w2 channels"]
) -> tuple[Any, Any]:
    x, kernel = residuals
    size, outs = x.shape[1:3], dy.shape[1:3]
    before = _reach(kernel.shape, strides)
    after = [max(-(-(n + low) // s) - out, 0) for n, (low, _), s, out in zip(size, padding, strides, outs, strict=True)]
    after[0] = max(after[0], -outs[0] % _piece(outs[0]))
    # One array for both: XLA would compute what ``dy`` is made of again in every loop that reads it. Two functions, so
    # that one gradient alone is computed where one alone is used.
    padded = _padded(_wide(dy), zip(before, after, strict=True))
    dx = _input_gradient(padded, kernel, size, strides, padding)
    dkernel = _kernel_gradient(padded, x, kernel.shape[:2], outs, strides, padding)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_convolution.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _input_gradient(
    dy: Float[Array, "n h3 w3 channels"],
    kernel: Float[Array, "kh kw 1 channels"],
    size: _Pair,
    strides: _Pair,
    padding: tuple[_Pair, _Pair],
) -> Float[Array, "n h w channels"]:
    batch, *_, channels = dy.shape
    weights = _wide(kernel)[:, :, None, None]
    # Pixels that are a stride apart see the same positions of the kernel; all those make one phase.
    top, left = _reach(kernel.shape, strides)
    rows, cols = (-(-(n + low) // stride) for n, (low, _), stride in zip(size, padding, strides, strict=True))

    def phase(row: int, col: int) -> Float[Array, "n rows cols channels"]:
        products = [
            _part(_part(dy, 1, top - i // strides[0], rows), 2, left - j // strides[1], cols) * weights[i, j]
            for i in range(row, kernel.shape[0], strides[0])
            for j in range(col, kernel.shape[1], strides[1])
        ]
        return _sum(products) if products else jnp.zeros((batch, rows, cols, channels), dy.dtype)

    across = (jnp.stack([phase(row, col) for col in range(strides[1])], axis=3) for row in range(strides[0]))
    whole = jnp.stack(list(across), axis=2).reshape(batch, rows * strides[0], cols * strides[1], channels)
    return _part(_part(whole, 1, padding[0][0], size[0]), 2, padding[1][0], size[1])


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _kernel_gradient(
    dy: Float[Array, "n h3 w3 channels"],
    x: Float[Array, "n h w channels"],
    size: _Pair,
    outs: _Pair,
    strides: _Pair,
    padding: tuple[_Pair, _Pair],
) -> Float[Array, "kh kw 1 channels"]:
    piece = _piece(outs[0])
    missing = -outs[0] % piece
    rows, cols = outs[0] + missing, outs[1]
    top, left = _reach(size, strides)
    # With a column of the zeros before, or XLA would read what was padded, and compute it again.
    zeros = min(left, 1)
    cols += zeros
    dy = _part(_part(dy, 1, top, rows), 2, left - zeros, cols)[None]
    (above, below), (before, behind) = padding
    padded = _padded(_wide(x), [(above, below + missing * strides[0]), (before + zeros * strides[1], behind)])
    sums = []
    for i in range(size[0]):
        band = _windows(_part(padded, 1, i, rows, strides[0]), size[1], cols, strides[1])
        sums.append(_sum(_part(band, 2, at, piece) * _part(dy, 2, at, piece) for at in range(0, rows, piece)))
    return jnp.stack(sums).sum(axis=2).sum(axis=(2, 3))[:, :, None]


def _reach(size: Sequence[int], strides: _Pair) -> list[int]:
    """How far before a pixel, in strides, the outputs begin that see it."""
    return [-(-width // stride) - 1 for width, stride in zip(size[:2], strides, strict=True)]


def _piece(rows: int) -> int:
    return -(-rows // _ROWS)


def _windows(
    x: Float[Array, "n h w channels"], width: int, n: int, stride: int
) -> Float[Array, "width n h cols channels"]:
    """The columns that each position of a kernel sees: ``[j, :, :, i]`` is column ``i * stride + j``."""
    # If copies of a row are read as rows of one column more, each starts one column later than the one before.
    batch, rows, cols, channels = x.shape
    copies = jnp.broadcast_to(x[:, :, None], (batch, rows, width + 1, cols, channels))
    skewed = copies.reshape(batch, rows, (width + 1) * cols, channels)[:, :, : width * (cols + 1)]
    windows = skewed.reshape(batch, rows, width, cols + 1, channels)
    return jnp.moveaxis(_part(windows, 3, 0, n, stride), 2, 0)


def _part(x: Any, axis: int, start: int, n: int, stride: int = 1) -> Any:
    """``n`` elements along an axis."""
    return lax.slice_in_dim(x, start, start + (n - 1) * stride + 1, stride, axis)


def _padded(x: Float[Array, "n h w channels"], padding: Iterable[_Pair]) -> Float[Array, "n h2 w2 channels"]:
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*pads, 0) for pads in padding), (0, 0, 0)))


def _wide(x: Any) -> Any:
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _sum(terms: Iterable[Any]) -> Any:
    return functools.reduce(operator.add, terms)
